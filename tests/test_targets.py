"""Which modules an adapter goes on, by a configuration's fields."""

from __future__ import annotations

import warnings

import pytest
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from conftest import adapted_paths, block_sizes, trainable
from oftv2 import TargetWarning, unwrap_model, wrap_model
from small_models import mlp

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION}
PROJECTIONS |= {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in MLP}


def ending(*names):
    return {path for path in PROJECTIONS if path.endswith(names)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_linear_is_every_linear_layer_but_the_output_head(tiny_llama, tied):
    model = wrap_model(tiny_llama(tie_word_embeddings=tied), block_size=8)
    assert adapted_paths(model) == PROJECTIONS
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert trainable(model) == {f"{path}.generators.default" for path in PROJECTIONS}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"target_modules": ("q_proj", "v_proj")}, ending("q_proj", "v_proj"), id="suffixes"),
        pytest.param({"target_modules": ("self_attn.q_proj",)}, ending("q_proj"), id="dotted-suffix"),
        pytest.param({"target_modules": ("model.layers.1.mlp.up_proj",)}, ending("1.mlp.up_proj"), id="exact"),
        pytest.param({"target_modules": ("lm_head",)}, {"lm_head"}, id="head-by-name"),
        pytest.param({"target_modules": ("embed_tokens",)}, {"model.embed_tokens"}, id="embedding-by-name"),
        pytest.param({"target_modules": r".*\.(q|k)_proj"}, ending("q_proj", "k_proj"), id="regex"),
        pytest.param(
            {"target_modules": r"model\.layers\.0\.mlp\.\w+_proj"}, ending(*(f"0.mlp.{n}" for n in MLP)), id="path"
        ),
        pytest.param(
            {"exclude_modules": ("o_proj", "down_proj")}, PROJECTIONS - ending("o_proj", "down_proj"), id="ex"
        ),
        pytest.param({"exclude_modules": r".*mlp\..*"}, ending(*ATTENTION), id="exclude-regex"),
        pytest.param({"exclude_modules": ("mlp",)}, ending(*ATTENTION), id="exclude-parent"),
        pytest.param(
            {"exclude_modules": r"model\.layers\.0"}, {p for p in PROJECTIONS if ".1." in p}, id="exclude-layer"
        ),
        pytest.param({"layers": [1]}, {path for path in PROJECTIONS if ".1." in path}, id="layers"),
        pytest.param(
            {"layers": [0], "target_modules": ("q_proj",)}, ending("0.self_attn.q_proj"), id="layers-and-names"
        ),
        pytest.param(
            {"target_modules": r".*_proj", "exclude_modules": ("mlp.up_proj",), "layers": (0,)},
            {path for path in PROJECTIONS if ".0." in path} - ending("up_proj"),
            id="regex-exclude-layers",
        ),
    ],
)
def test_choosing_targets(tiny_llama, fields, expected):
    model = tiny_llama()
    wrap_model(model, block_size=8, **fields)
    assert adapted_paths(model) == expected


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_task_heads_are_trained_in_full_by_default(kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0}
    config = {"llama": LlamaConfig, "bert": BertConfig}[kind](**sizes, num_attention_heads=2, num_labels=3)
    head = {"llama": {"score.weight"}, "bert": {"classifier.weight", "classifier.bias"}}[kind]
    model = AutoModelForSequenceClassification.from_config(config)
    wrap_model(model, block_size=8)
    layers = adapted_paths(model)
    assert layers
    assert all(path.startswith(model.base_model_prefix + ".") for path in layers)
    assert trainable(model) == head | {f"{path}.generators.default" for path in layers}
    unwrap_model(model)
    wrap_model(model, block_size=8, modules_to_save=())
    assert trainable(model) == {f"{path}.generators.default" for path in layers}
    assert adapted_paths(model) == layers  # the head is neither trained nor rotated


def test_classifiers_of_timm_are_trained_in_full_by_default():
    classifiers = {"get_classifier": lambda self: (self[2][0], nn.Identity()), "__module__": "timm.models.deit"}
    make = type("DistilledTransformer", (nn.Sequential,), classifiers)
    model = wrap_model(nn.ModuleDict({"timm": make(*mlp(32, 16, 8), mlp(8, 4))}), block_size=8)
    assert adapted_paths(model) == {"timm.0", "timm.1"}
    assert trainable(model) == {"timm.2.0.weight", "timm.2.0.bias", *(f"timm.{i}.generators.default" for i in "01")}


def test_convolutions_that_are_left_are_told_where_they_are_nearly_all():
    def net():
        return nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(64, 8))

    with pytest.warns(TargetWarning, match=r"the 2 convolutions \(0, …\) .*=\['all-linear', '0'\] rotates"):
        wrap_model(net(), block_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TargetWarning)
        wrap_model(net(), block_size=8, target_modules=["all-linear", "0"])
        wrap_model(net(), block_size=8, target_modules=["3"])
        wrap_model(net(), block_size=8, modules_to_save=["0"])
        wrap_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8)), block_size=8)


def test_modules_to_save_are_trained_in_full_and_not_rotated(tiny_llama):
    model = wrap_model(tiny_llama(tie_word_embeddings=False), block_size=8, modules_to_save=("lm_head", "1.mlp"))
    full = {f"model.layers.1.mlp.{name}.weight" for name in MLP} | {"lm_head.weight"}
    rotated = PROJECTIONS - ending(*(f"1.mlp.{name}" for name in MLP))
    assert adapted_paths(model) == rotated
    assert trainable(model) == full | {f"{path}.generators.default" for path in rotated}


def test_block_size_pattern_matches_path_ends_and_the_first_match_wins(tiny_llama):
    pattern = {r"0\.self_attn\.q_proj": 4, "q_proj": 16, r"mlp\..*": 2}
    sizes = block_sizes(wrap_model(tiny_llama(), block_size=8, block_size_pattern=pattern))
    assert sizes["model.layers.0.self_attn.q_proj"] == 4
    assert sizes["model.layers.1.self_attn.q_proj"] == 16
    assert {sizes[path] for path in ending(*MLP)} == {2}
    assert {sizes[path] for path in ending("k_proj", "v_proj", "o_proj")} == {8}


def test_adjust_block_size_takes_the_nearest_divisor_only_where_needed():
    model = wrap_model(mlp(64, 48, 60, 20, 8), block_size=32, adjust_block_size=True)
    assert block_sizes(model) == {"0": 32, "1": 24, "2": 30, "3": 20}


def test_num_blocks_divides_every_layer_into_so_many():
    model = wrap_model(mlp(64, 48, 8), num_blocks=4)
    assert block_sizes(model) == {"0": 16, "1": 12}
    assert {path: tuple(p.shape) for path, p in model.named_parameters() if p.requires_grad} == {
        "0.generators.default": (4, 16 * 15 // 2),
        "1.generators.default": (4, 12 * 11 // 2),
    }
