"""Which modules an adapter goes on"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from conftest import randomize
from oftv2 import (
    OFTConfig,
    OFTEmbedding,
    OFTLayer,
    OFTLinear,
    disable_adapter,
    merge,
    print_trainable_parameters,
    unwrap_model,
    wrap_model,
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION}
PROJECTIONS |= {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in MLP}


def adapted(model):
    return {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, OFTLayer)}


def ending(*names):
    return {path for path in PROJECTIONS if path.endswith(names)}


def block_sizes(model):
    return {path: module.rotation.block_size for path, module in model.named_modules() if isinstance(module, OFTLayer)}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def mlp(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def encoder(**fields):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **fields)
    return nn.TransformerEncoder(layer, 2).eval()


# ---------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_linear_is_every_linear_layer_but_the_output_head(tiny_llama, tied):
    model = wrap_model(tiny_llama(tie_word_embeddings=tied), block_size=8)
    assert adapted(model) == PROJECTIONS
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
    assert adapted(model) == expected


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_task_heads_are_trained_in_full_by_default(kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0}
    config = {"llama": LlamaConfig, "bert": BertConfig}[kind](**sizes, num_attention_heads=2, num_labels=3)
    head = {"llama": {"score.weight"}, "bert": {"classifier.weight", "classifier.bias"}}[kind]
    model = AutoModelForSequenceClassification.from_config(config)
    wrap_model(model, block_size=8)
    layers = adapted(model)
    assert layers
    assert all(path.startswith(model.base_model_prefix + ".") for path in layers)
    assert trainable(model) == head | {f"{path}.generators.default" for path in layers}
    unwrap_model(model)
    wrap_model(model, block_size=8, modules_to_save=())
    assert trainable(model) == {f"{path}.generators.default" for path in layers}
    assert adapted(model) == layers  # the head is neither trained nor rotated


def test_modules_to_save_are_trained_in_full_and_not_rotated(tiny_llama):
    model = wrap_model(tiny_llama(tie_word_embeddings=False), block_size=8, modules_to_save=("lm_head", "1.mlp"))
    full = {f"model.layers.1.mlp.{name}.weight" for name in MLP} | {"lm_head.weight"}
    rotated = PROJECTIONS - ending(*(f"1.mlp.{name}" for name in MLP))
    assert adapted(model) == rotated
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


# ---------------------------------------------------------------------------------------------- kinds of models


def test_plain_models_of_sequential_and_moduledict():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 16), "body": mlp(16, 32, 16)})
    wrap_model(model, OFTConfig(block_size=8))
    assert adapted(model) == {"body.0", "body.1"}
    assert type(model["embed"]) is nn.Embedding
    wrap_model(unwrap_model(model), block_size=8, target_modules=("embed", "1"))
    assert adapted(model) == {"embed", "body.1"}
    assert isinstance(model["embed"], OFTEmbedding)
    ids = torch.arange(10)
    plain = model["body"](model["embed"](ids))
    randomize(model)
    changed = model["body"](model["embed"](ids))
    assert not torch.allclose(plain, changed)
    with disable_adapter(model):
        assert torch.equal(model["body"](model["embed"](ids)), plain)


def test_gpt2s_conv1d(tiny_gpt2):
    ids = torch.arange(8)[None]
    plain = tiny_gpt2(ids).logits
    wrap_model(tiny_gpt2, block_size=8)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert adapted(tiny_gpt2) == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in names}
    assert all(type(module) is OFTLinear for module in tiny_gpt2.modules() if isinstance(module, OFTLayer))
    assert torch.equal(tiny_gpt2(ids).logits, plain)
    assert tiny_gpt2.transformer.h[0].mlp.c_proj.generators["default"].shape == (8, 28)  # d is 64: the rows of (d, n)
    tiny_gpt2(ids).logits.square().sum().backward()
    gradients = [p.grad for p in tiny_gpt2.parameters() if p.requires_grad]
    assert len(gradients) == 8
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.fixture
def tiny_gpt2():
    config = GPT2Config(vocab_size=64, n_embd=16, n_inner=64, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


class Shared(nn.Module):
    """One linear layer at two paths of its own, and inside one block at two paths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.block = nn.Sequential(nn.Linear(16, 16))
        self.again = self.block

    def forward(self, x):
        return self.again(self.block(self.second(self.first(x).tanh()).tanh()).tanh())


def test_a_shared_module_gets_one_adapter_at_all_its_paths():
    model, x = Shared(), torch.randn(5, 16)
    original, plain = model.first, model(x)
    wrap_model(model, block_size=8)
    assert adapted(model) == {"first", "second", "block.0", "again.0"}
    assert model.first is model.second
    assert model.block is model.again
    assert trainable(model) == {"first.generators.default", "block.0.generators.default"}
    randomize(model, std=0.2)
    turned = model(x)
    R = torch.block_diag(*(model.first.delta().detach() + torch.eye(8)))
    S = torch.block_diag(*(model.block[0].delta().detach() + torch.eye(8)))
    y = x
    for _ in range(2):
        y = original(y @ R).tanh()
    y = model.block[0].base_layer(y @ S).tanh()
    torch.testing.assert_close(turned, model.block[0].base_layer(y @ S))
    unwrap_model(model)
    assert model.first is original
    assert model.second is original
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("path", ["first", "second"])
def test_a_shared_module_can_be_named_by_any_of_its_paths(path):
    assert adapted(wrap_model(Shared(), block_size=8, target_modules=(path,))) == {"first", "second"}


@pytest.mark.parametrize("path", ["first", "second"])
def test_excluding_one_path_of_a_shared_module_excludes_the_module(path):
    assert adapted(wrap_model(Shared(), block_size=8, exclude_modules=(path,))) == {"block.0", "again.0"}


@pytest.mark.parametrize(
    ("where", "mask"),
    [("encoder", False), ("encoder", True), ("layer", False), ("layer", True), ("nested", False)],
    ids=["encoder", "encoder-padded", "layer", "layer-padded", "nested"],
)
def test_torchs_fused_encoder_does_not_bypass_the_adapter(where, mask):
    model = nn.Sequential(encoder()) if where == "nested" else encoder() if where == "encoder" else encoder().layers[0]
    nested = [module.use_nested_tensor for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    arguments = {"src_key_padding_mask": padding} if mask else {}
    kept = ~padding if mask else torch.ones(3, 5, dtype=torch.bool)

    def run(fast):
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            with torch.no_grad():
                return model(x, **arguments)[kept]
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    plain = run(fast=True)
    wrap_model(model, block_size=8)
    assert {path.rsplit(".", 1)[-1] for path in adapted(model)} == {"linear1", "linear2"}  # no out_proj
    torch.testing.assert_close(run(fast=True), plain)
    randomize(model, std=0.3)
    model.eval()  # what is written through .data shows after a change of mode
    slow = run(fast=False)
    assert (slow - plain).abs().max() > 0.05
    torch.testing.assert_close(run(fast=True), slow)
    merge(model)
    torch.testing.assert_close(run(fast=True), slow)
    after = [module.use_nested_tensor for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    assert after == nested


# ---------------------------------------------------------------------------------------------- what stays


def test_the_wrapped_model_is_the_same_object_and_behaves_like_it(tiny_llama):
    model = tiny_llama()
    ids = torch.arange(3, 9)[None]
    kind, config, body = type(model), model.config, model.model
    plain, generated = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    model.note = "mine"
    assert wrap_model(model, block_size=8) is model
    assert isinstance(model, kind)
    assert model.config is config
    assert model.model is body
    assert model.note == "mine"
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.get_input_embeddings() is body.embed_tokens
    assert not model.training
    assert not any(module.training for module in model.modules())
    layer = body.layers[0].self_attn.q_proj
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (64, 64, (64, 64))
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    randomize(model, std=0.2)
    assert not torch.allclose(model(ids).logits, plain)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == generated.shape


def test_fields_go_on_top_of_a_config(tiny_llama):
    config = OFTConfig(block_size=8, target_modules=("q_proj",))
    model = wrap_model(tiny_llama(), config, block_size=16)
    assert set(block_sizes(model).values()) == {16}
    assert adapted(model) == ending("q_proj")
    assert config.block_size == 8


def test_wrapping_prints_nothing(tiny_llama, capfd, recwarn):
    unwrap_model(wrap_model(tiny_llama(), block_size=8))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_print_trainable_parameters_uses_the_known_words(tiny_llama, capsys):
    model = wrap_model(tiny_llama(), block_size=8, target_modules=("q_proj",))
    base = sum(p.numel() for name, p in model.named_parameters() if "generators" not in name)
    capsys.readouterr()
    print_trainable_parameters(model)
    trains = 2 * 8 * 28  # layers, blocks, numbers in a block
    total = base + trains
    expected = f"trainable params: {trains:,} || all params: {total:,} || trainable%: {100 * trains / total:.4f}\n"
    assert capsys.readouterr().out == expected
