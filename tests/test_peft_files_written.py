"""Adapter files to PEFT: the real PEFT reads them and computes the same."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import build, perturb
from oftv2 import AdapterError, PeftFormatWarning, load_adapter, save_adapter, wrap_model
from peers import from_peft, relative
from small_models import IDS, IMAGES, VECTORS, answer, bert, conv2d, embedding, gpt2, linear

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def suffixes():
    """Names of which each is the end of another."""
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.ModuleDict({"a": nn.Linear(32, 32)})})
    model.forward = lambda x: model["b"]["a"](model["a"](x))
    return model


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
    first, second = load_file(tmp_path / "theirs" / FILE), load_file(tmp_path / "again" / FILE)
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


def test_what_peft_says_of_a_folder_that_it_cannot_read(tmp_path):
    save_adapter(wrap_model(build(linear), block_size=8), tmp_path, format="oftv2")
    with pytest.raises(KeyError, match=r"PEFT cannot read: load it with oftv2\.load_adapter"):
        peft.PeftModel.from_pretrained(build(linear), tmp_path)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(AdapterError, match='"peft", "oftv2" or None'):
        save_adapter(wrap_model(build(linear), block_size=8), tmp_path, format="lora")
