"""Adapter files to PEFT and from PEFT: what the real PEFT reads and writes computes the same here."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from conftest import build, perturb
from oftv2 import (
    AdapterError,
    ConfigError,
    OFTConfig,
    PeftFormatWarning,
    load_adapter,
    save_adapter,
    wrap_model,
)
from peers import fill, output, peft_generators, relative

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VECTORS = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))
IMAGES = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(8))
IDS = torch.arange(12).view(2, 6)


def linear():
    return nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))


def embedding():
    return nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8))


def conv2d():
    return nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1))


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def suffixes():
    """Names of which each is the end of another."""
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.ModuleDict({"a": nn.Linear(32, 32)})})
    model.forward = lambda x: model["b"]["a"](model["a"](x))
    return model


@torch.no_grad()
def answer(model, inputs):
    return output(model(inputs))


def from_peft(base, folder):
    """PEFT's model, loaded without a warning of any kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers', about what PEFT calls there
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # where PEFT has to adjust it
        return peft.PeftModel.from_pretrained(base, folder).eval()


def tensors_of(folder):
    return safetensors.torch.load_file(folder / FILE)


# ---------------------------------------------------------------------------------------------- to PEFT

CASES = {
    "linear": (linear, VECTORS, {"block_size": 8}),
    "two-terms": (linear, VECTORS, {"block_size": 8, "neumann_terms": 2}),
    "three-terms": (linear, VECTORS, {"block_size": 8, "neumann_terms": 3}),
    "six-terms": (linear, VECTORS, {"block_size": 8, "neumann_terms": 6}),
    "cayley": (linear, VECTORS, {"block_size": 8, "parametrization": "cayley"}),
    "bare-series": (linear, VECTORS, {"block_size": 8, "parametrization": "neumann", "neumann_terms": 1}),
    "scaled": (linear, VECTORS, {"block_size": 8, "scale_generators": True}),
    "scaled-cayley": (linear, VECTORS, {"block_size": 8, "scale_generators": True, "parametrization": "cayley"}),
    "constraint": (linear, VECTORS, {"block_size": 8, "constraint": 0.3}),
    "constraint-scaled": (linear, VECTORS, {"block_size": 8, "constraint": 0.1, "scale_generators": True}),
    "block-share": (linear, VECTORS, {"block_size": 8, "block_share": True}),
    "dropout": (linear, VECTORS, {"block_size": 8, "dropout": 0.3}),
    "num-blocks": (linear, VECTORS, {"num_blocks": 4}),
    "adjusted": (linear, VECTORS, {"block_size": 32, "adjust_block_size": True}),
    "some": (linear, VECTORS, {"block_size": 8, "target_modules": ("2",)}),
    "suffixes": (suffixes, VECTORS, {"block_size": 8, "target_modules": "a"}),
    "modules-to-save": (linear, VECTORS, {"block_size": 8, "modules_to_save": ("4",)}),
    "bias-all": (linear, VECTORS, {"block_size": 8, "bias": "all", "target_modules": ("0",)}),
    "bias-oft-only": (linear, VECTORS, {"block_size": 8, "bias": "oft_only", "modules_to_save": ("4",)}),
    "embedding": (embedding, IDS, {"block_size": 4, "target_modules": ("0", "1")}),
    "conv2d": (conv2d, IMAGES, {"block_size": 4, "target_modules": ("0", "2")}),
    "task-head": (bert, IDS, {"block_size": 8}),
}


@pytest.mark.parametrize(("make", "inputs", "fields"), CASES.values(), ids=CASES.keys())
def test_peft_computes_the_same_from_a_saved_adapter(make, inputs, fields, tmp_path):
    trained = perturb(wrap_model(build(make), **fields))
    wanted = answer(trained, inputs)
    assert relative(answer(build(make), inputs), wanted) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(trained, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", CONFIG, FILE]
    theirs = from_peft(build(make), tmp_path)
    assert relative(answer(theirs, inputs), wanted) < 1e-6
    assert torch.equal(answer(load_adapter(build(make), tmp_path), inputs), wanted)


@pytest.mark.parametrize(("make", "inputs", "fields"), CASES.values(), ids=CASES.keys())
def test_what_peft_writes_back_computes_the_same_here(make, inputs, fields, tmp_path):
    """Through PEFT and back: no description of this library's in the file any more, and the same numbers."""
    trained = perturb(wrap_model(build(make), **fields))
    wanted = answer(trained, inputs)
    save_adapter(trained, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from_peft(build(make), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        loaded = load_adapter(build(make), tmp_path / "theirs")
    assert relative(answer(loaded, inputs), wanted) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(loaded, tmp_path / "again")
    first, second = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "again")
    assert second.keys() == {key for key in first if not key.endswith("0.base_layer.weight")}
    for key, value in second.items():
        assert torch.equal(value, first[key]), key


def test_a_llama_reaches_peft_with_identical_logits(tiny_llama, tmp_path):
    trained = perturb(wrap_model(tiny_llama(), block_size=16, target_modules=("embed_tokens", "q_proj", "down_proj")))
    save_adapter(trained, tmp_path)
    theirs = from_peft(tiny_llama(), tmp_path)
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    ids = torch.randint(3, 128, (2, 9))
    assert relative(answer(theirs, ids), answer(trained, ids)) < 1e-6
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["down_proj", "embed_tokens", "q_proj"]


def test_grouped_projections_are_saved_under_their_own_names(tiny_llama, tmp_path):
    trained = perturb(wrap_model(tiny_llama(), block_size=16, group_projections=True))
    save_adapter(trained, tmp_path, format="peft")
    ids = torch.randint(3, 128, (2, 9))
    assert relative(answer(from_peft(tiny_llama(), tmp_path), ids), answer(trained, ids)) < 1e-6


def shared():
    layer = nn.Linear(32, 32)
    return nn.Sequential(layer, layer)


def with_norm():
    return nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8))


REFUSED = {
    "one-term": (linear, {"block_size": 8, "neumann_terms": 1}, "neumann_terms=1"),
    "old-series": (linear, {"block_size": 8, "parametrization": "neumann"}, "series of PEFT before 0.18"),
    "sizes": (linear, {"block_size": 8, "block_size_pattern": {"0": 16, "2|4": 4}}, "differ from layer to layer"),
    "conv1d": (gpt2, {"block_size": 8}, "is a Conv1D"),
    "kernels": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3)),
        {"block_size": 4, "target_modules": ("0",)},
        r"Conv2d with kernel \(3, 3\)",
    ),
    "shared": (shared, {"block_size": 8}, "under several paths"),
    "tied": (gpt2, {"block_size": 8, "modules_to_save": ("lm_head",), "target_modules": ("wpe",)}, "is tied to"),
    "buffers": (with_norm, {"block_size": 8, "modules_to_save": ("1",)}, "has buffers"),
}


@pytest.mark.parametrize(("make", "fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_peft_cannot_express_is_named_and_not_lost(make, fields, message, tmp_path):
    trained = perturb(wrap_model(build(make), **fields))
    with pytest.raises(AdapterError, match=message):
        save_adapter(trained, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    with pytest.warns(PeftFormatWarning, match=message):
        save_adapter(trained, tmp_path / "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(trained, tmp_path / "own", format="oftv2")
    for folder in ("default", "own"):
        state = load_adapter(build(make), tmp_path / folder).state_dict()
        assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(AdapterError, match='"peft", "oftv2" or None'):
        save_adapter(wrap_model(build(linear), block_size=8), tmp_path, format="lora")


# ---------------------------------------------------------------------------------------------- from PEFT


def peft_folder(make, folder, fields, change=lambda values: None):
    """An adapter that PEFT made, trained in the end, and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(build(make)), peft.OFTConfig(**fields))
        perturb(model)
        fill(model, std=0.1)
        model.save_pretrained(folder)
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))
    return model.eval()


PEFT_CASES = {
    "linear": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0", "2"]}),
    "exact": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0", "2"], "use_cayley_neumann": False}),
    **{
        f"terms-{t}": (
            linear,
            VECTORS,
            {"oft_block_size": 8, "target_modules": ["0"], "num_cayley_neumann_terms": t},
        )
        for t in (2, 3, 4, 5, 6, 8)
    },
    "blocks": (linear, VECTORS, {"oft_block_size": 0, "r": 4, "target_modules": "all-linear"}),
    "adjusted": (linear, VECTORS, {"oft_block_size": 7, "target_modules": ["0", "2"]}),
    "block-share": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0"], "block_share": True}),
    "coft": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0"], "coft": True, "eps": 0.2}),
    "bias-all": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0"], "bias": "all"}),
    "bias-oft-only": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0"], "bias": "oft_only"}),
    "saved": (linear, VECTORS, {"oft_block_size": 8, "target_modules": ["0"], "modules_to_save": ["4", "score"]}),
    "embedding": (embedding, IDS, {"oft_block_size": 4, "target_modules": ["0", "1"]}),
    "conv2d": (conv2d, IMAGES, {"oft_block_size": 4, "target_modules": ["0", "2"]}),
    "task-head": (bert, IDS, {"oft_block_size": 8, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("make", "inputs", "fields"), PEFT_CASES.values(), ids=PEFT_CASES.keys())
def test_what_peft_saved_computes_the_same_here(make, inputs, fields, wrap, tmp_path):
    theirs = peft_folder(make, tmp_path, fields)
    wanted = answer(theirs, inputs)
    assert relative(answer(build(make), inputs), wanted) > 1e-3
    model = build(make)
    if wrap:
        heads = {name.split(".")[0] for name in dict(model.named_modules())} & {"4", "classifier"}
        saves = tuple(heads) if {"modules_to_save", "task_type"} & set(fields) else ()
        config = dataclasses.replace(OFTConfig.from_peft(fields), modules_to_save=saves)
        if fields["oft_block_size"] == 7:
            config = dataclasses.replace(config, block_size_pattern={"0": 8, "2": 6})
        model = wrap_model(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
    assert relative(answer(model, inputs), wanted) < 1e-6
    if wrap:
        return
    save_adapter(model, tmp_path / "again", format="peft")
    first, second = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert relative(answer(from_peft(build(make), tmp_path / "again"), inputs), wanted) < 1e-6


def test_a_llama_from_peft_with_embeddings_and_its_own_save_of_them(tiny_llama, tmp_path):
    fields = {"oft_block_size": 16, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft_folder(tiny_llama, tmp_path, fields)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in tensors_of(tmp_path))
    ids = torch.randint(3, 128, (2, 9))
    model = load_adapter(build(tiny_llama), tmp_path)
    assert relative(answer(model, ids), answer(theirs, ids)) < 1e-6


def test_an_adapter_in_pytorchs_format(tmp_path):
    theirs = peft_folder(linear, tmp_path, {"oft_block_size": 8, "target_modules": ["0"]})
    torch.save(tensors_of(tmp_path), tmp_path / "adapter_model.bin")
    (tmp_path / FILE).unlink()
    assert relative(answer(load_adapter(build(linear), tmp_path), VECTORS), answer(theirs, VECTORS)) < 1e-6


def test_dropout_that_peft_never_applied_is_loaded_as_none(tmp_path):
    peft_folder(linear, tmp_path, {"oft_block_size": 8, "target_modules": ["0"], "module_dropout": 0.2})
    with pytest.warns(PeftFormatWarning, match=r"module_dropout=0.2 .* never applied"):
        model = load_adapter(build(linear), tmp_path)
    assert model[0].rotation.dropout == 0


@pytest.mark.parametrize("t", [1, 0])
def test_a_series_that_rotates_nothing(t, tmp_path):
    fields = {"oft_block_size": 8, "target_modules": ["0"], "num_cayley_neumann_terms": t}
    theirs = peft_folder(linear, tmp_path, fields)
    with pytest.warns(PeftFormatWarning, match="is the identity"):
        model = load_adapter(build(linear), tmp_path)
    assert torch.equal(answer(model, VECTORS), answer(build(linear), VECTORS))
    assert relative(answer(theirs, VECTORS), answer(model, VECTORS)) < 1e-6


def before_018(Q, t):
    """PEFT 0.17's series, written down anew: every power from the first on is doubled."""
    R, power = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q).clone(), torch.eye(Q.shape[-1], dtype=Q.dtype)
    for _ in range(1, t):
        power = power @ Q
        R = R + 2 * power
    return R


@pytest.mark.parametrize("t", [2, 3, 5, 6])
def test_an_adapter_of_peft_before_018(t, tmp_path):
    fields = {"oft_block_size": 8, "target_modules": ["0"], "num_cayley_neumann_terms": t}
    theirs = peft_folder(linear, tmp_path, fields, change=lambda values: values.pop("peft_version"))
    if t > 2:
        with pytest.warns(PeftFormatWarning, match=r"before 0\.18.*as_trained=True"):
            model = load_adapter(build(linear), tmp_path)
        assert relative(answer(model, VECTORS), answer(theirs, VECTORS)) < 1e-6
        with pytest.warns(PeftFormatWarning, match="the series that it was trained with"):
            model = load_adapter(build(linear), tmp_path, as_trained=True)
    else:  # the two are one
        model = load_adapter(build(linear), tmp_path, as_trained=True)
    delta = model[0].rotation.delta(model[0].generators["default"].double())
    packed = next(iter(peft_generators(theirs).values())).detach().double()
    rows, columns = torch.triu_indices(8, 8, 1)
    Q = torch.zeros(4, 8, 8, dtype=torch.float64)
    Q[:, rows, columns] = packed
    assert relative(delta + torch.eye(8, dtype=torch.float64), before_018(Q - Q.mT, t)) < 1e-12
    x = VECTORS.double()
    assert model[0].rotation.delta(model[0].generators["default"].requires_grad_()).requires_grad
    rotated = x @ torch.block_diag(*before_018(Q - Q.mT, t))
    assert relative(model[0](VECTORS).double(), build(linear)[0].double()(rotated)) < 1e-6


FOREIGN = {
    "lora": (lambda folder: set_config(folder, peft_type="LORA"), "LORA adapter"),
    "no-type": (lambda folder: (folder / CONFIG).write_text("{}"), "no peft_type"),
    "broken": (lambda folder: (folder / CONFIG).write_text("{"), "does not hold PEFT's description"),
    "no-config": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "newer": (lambda folder: set_config(folder, oft_spin=3), "oft_spin.*newer PEFT"),
    "old": (lambda folder: rename(folder, ".oft_R.weight", ".oft_r.default"), "PEFT 0.15 or older"),
    "shape": (lambda folder: reshape(folder), "no packed skew-symmetric"),
    "other-model": (lambda folder: rename(folder, "model.0.", "model.9."), "9: this Sequential has no such module"),
}


def set_config(folder, **fields):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **fields}))


def rename(folder, old, new):
    tensors = {key.replace(old, new): value for key, value in tensors_of(folder).items()}
    safetensors.torch.save_file(tensors, folder / FILE)


def reshape(folder):
    tensors = {key: value[:, :-1].contiguous() for key, value in tensors_of(folder).items()}
    safetensors.torch.save_file(tensors, folder / FILE)


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_what_cannot_be_taken_over_is_refused(change, message, tmp_path):
    peft_folder(linear, tmp_path, {"oft_block_size": 8, "target_modules": ["0"]})
    change(tmp_path)
    model = build(linear)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path)
    assert type(model[0]) is nn.Linear


def test_a_head_that_peft_trained_apart_from_its_tied_embedding(tmp_path):
    fields = {"oft_block_size": 8, "target_modules": ["wpe"], "modules_to_save": ["lm_head"]}
    theirs = peft_folder(gpt2, tmp_path, fields)
    with pytest.raises(AdapterError, match=r"lm_head.weight was trained apart from transformer.wte.weight.*untie"):
        load_adapter(build(gpt2), tmp_path)
    model = build(gpt2)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    load_adapter(model, tmp_path)
    assert relative(answer(model, IDS), answer(theirs, IDS)) < 1e-6


# ---------------------------------------------------------------------------------------------- image trainers


def single_file(path, metadata, **extra):
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "lora_unet_down_proj_in.oft_R.weight": 0.1 * torch.randn(4, 28, generator=generator),
        "lora_unet_mid.oft_R.weight": 0.1 * torch.randn(2, 28, generator=generator),
    }
    safetensors.torch.save_file({**tensors, **extra}, path, metadata)
    return tensors


def unet():
    return nn.ModuleDict({"down": nn.ModuleDict({"proj_in": nn.Linear(32, 8)}), "mid": nn.Conv2d(4, 6, 2)})


SD_SCRIPTS = {"ss_network_module": "networks.oft_v2"}
ONE_TRAINER = {"ot_config": json.dumps({"peft_type": "OFT_2"})}


@pytest.mark.parametrize("metadata", [SD_SCRIPTS, ONE_TRAINER], ids=["sd-scripts", "OneTrainer"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_file_of_an_image_trainer(metadata, scaled, tmp_path):
    """Linear: ``x·R·Wᵀ``; convolutions, in both programs: kernels ``W·R``; R of five terms in PEFT's count."""
    extra = {"lora_unet_down_proj_in.oft_R.scaled_oft": torch.tensor(1)} if scaled else {}
    tensors = single_file(tmp_path / "style.safetensors", metadata, **extra)
    plain, model = build(unet), load_adapter(build(unet), tmp_path / "style.safetensors")
    rotations = []
    for key, value in tensors.items():
        rows, columns = torch.triu_indices(8, 8, 1)
        Q = torch.zeros(len(value), 8, 8)
        Q[:, rows, columns] = value / 28**0.5 if scaled and "down" in key else value
        Q = Q - Q.mT
        identity = torch.eye(8)
        rotations.append(torch.block_diag(*(identity + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)))
    wanted = plain["down"]["proj_in"](VECTORS @ rotations[0])
    assert relative(model["down"]["proj_in"](VECTORS), wanted) < 1e-6
    images = IMAGES[:, :4]
    with torch.no_grad():
        plain["mid"].weight.copy_((plain["mid"].weight.flatten(1) @ rotations[1]).view_as(plain["mid"].weight))
    assert relative(model["mid"](images), plain["mid"](images)) < 1e-6


UNCERTAIN = {
    "nothing-noted": ({}, {}, "cannot be told"),
    "another-module": ({"ss_network_module": "networks.oft"}, {}, "cannot be told"),
    "dora": (SD_SCRIPTS, {"lora_unet_mid.dora_scale": torch.ones(6)}, "dora_scale changes norms"),
    "elsewhere": (SD_SCRIPTS, {"lora_te_text.oft_R.weight": torch.zeros(2, 28)}, "1 of 3 layers"),
}


@pytest.mark.parametrize(("metadata", "extra", "message"), UNCERTAIN.values(), ids=UNCERTAIN.keys())
def test_a_file_that_is_not_certainly_plain_rotations_of_this_model(metadata, extra, message, tmp_path):
    single_file(tmp_path / "style.safetensors", metadata or None, **extra)
    with pytest.raises(AdapterError, match=message):
        load_adapter(build(unet), tmp_path / "style.safetensors")


# ---------------------------------------------------------------------------------------------- configurations


def test_pefts_configuration_becomes_this_librarys():
    theirs = peft.OFTConfig(
        r=4,
        oft_block_size=0,
        target_modules=["v", "q"],
        exclude_modules="k",
        module_dropout=0.1,
        num_cayley_neumann_terms=6,
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        bias="all",
        block_share=True,
        coft=True,
        eps=0.1,
    )
    assert OFTConfig.from_peft(theirs.to_dict()) == OFTConfig(
        num_blocks=4,
        target_modules=("q", "v"),
        exclude_modules="k",
        dropout=0.1,
        neumann_terms=4,
        layers=(0, 2),
        layers_pattern=("layers",),
        bias="all",
        block_share=True,
        constraint=0.1,
        modules_to_save=(),
    )
    assert OFTConfig.from_peft({"target_modules": "all-linear"}) == OFTConfig(neumann_terms=3, modules_to_save=())


SAME = {
    "size": ({"oft_block_size": 16}, {"block_size": 16}),
    "blocks": ({"r": 4, "oft_block_size": 0}, {"num_blocks": 4}),
    "dropout": ({"module_dropout": 0.25}, {"dropout": 0.25}),
    "exact": ({"use_cayley_neumann": False}, {"parametrization": "cayley"}),
    "terms": ({"num_cayley_neumann_terms": 8}, {"neumann_terms": 6}),
    "layers": ({"layers_to_transform": 0}, {"layers": (0,)}),
}


@pytest.mark.parametrize(("theirs", "ours"), SAME.values(), ids=SAME.keys())
def test_fields_under_pefts_names(theirs, ours):
    one, other = (wrap_model(nn.Sequential(nn.Linear(32, 8)), **fields) for fields in (theirs, ours))
    assert one._oftv2.configs == other._oftv2.configs
    config = OFTConfig(**theirs)
    assert config == OFTConfig(**ours) == dataclasses.replace(config) == OFTConfig.from_json(config.to_json())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"oft_block_size": 8, "block_size": 8}, "oft_block_size is PEFT's name for block_size"),
        ({"r": 8, "num_blocks": 8}, "r is PEFT's name for num_blocks"),
        ({"r": 8, "oft_block_size": 8}, "r and oft_block_size are both given"),
        ({"module_dropout": 0.1, "dropout": 0.1}, "module_dropout is PEFT's name for dropout"),
        ({"use_cayley_neumann": True, "parametrization": "cayley"}, "set the same thing"),
        ({"num_cayley_neumann_terms": 6, "neumann_terms": 4}, "set the same thing"),
        ({"num_cayley_neumann_terms": 1}, "is the identity"),
        ({"layers_to_transform": [0], "layers": (0,)}, "layers_to_transform is PEFT's name for layers"),
    ],
    ids=str,
)
def test_a_field_under_both_names_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        wrap_model(linear(), **fields)
    with pytest.raises(ConfigError, match=message):
        OFTConfig(**fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LORA", "target_modules": ["q"]}, "another kind of adapter"),
        ({"target_modules": None}, "leaves the choice to PEFT"),
        ({"target_modules": ["q"], "rank_pattern": {"q": 3}}, "rank_pattern"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_taken_over(values, message):
    with pytest.raises(ConfigError, match=message):
        OFTConfig.from_peft(values)


def test_layers_are_counted_in_the_named_lists():
    tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), "heads": nn.ModuleList()})
    tower["heads"].append(nn.Linear(8, 8))
    model = wrap_model(copy.deepcopy(tower), block_size=4, layers=(0, 1), layers_pattern="layers")
    assert [name for name, layer in model.named_modules() if hasattr(layer, "rotations")] == ["layers.0", "layers.1"]
