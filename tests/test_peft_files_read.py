"""Adapter files from PEFT: what the real PEFT writes computes the same here."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import build, perturb
from oftv2 import AdapterError, OFTConfig, PeftFormatWarning, load_adapter, save_adapter, wrap_model
from peers import fill, from_peft, peft_generators, relative
from small_models import IDS, IMAGES, VECTORS, answer, bert, conv2d, embedding, gpt2, linear

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    first, second = load_file(tmp_path / FILE), load_file(tmp_path / "again" / FILE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert relative(answer(from_peft(build(make), tmp_path / "again"), inputs), wanted) < 1e-6


def test_a_llama_from_peft_with_embeddings_and_its_own_save_of_them(tiny_llama, tmp_path):
    fields = {"oft_block_size": 16, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft_folder(tiny_llama, tmp_path, fields)
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / FILE))
    ids = torch.randint(3, 128, (2, 9))
    model = load_adapter(build(tiny_llama), tmp_path)
    assert relative(answer(model, ids), answer(theirs, ids)) < 1e-6


def test_an_adapter_in_pytorchs_format(tmp_path):
    theirs = peft_folder(linear, tmp_path, {"oft_block_size": 8, "target_modules": ["0"]})
    torch.save(load_file(tmp_path / FILE), tmp_path / "adapter_model.bin")
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
    "shape": (lambda folder: reshape(folder), "no packed skew-symmetric"),
    "other-model": (lambda folder: rename(folder, "model.0.", "model.9."), "9: this Sequential has no such module"),
}


def set_config(folder, **fields):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **fields}))


def rename(folder, old, new):
    tensors = {key.replace(old, new): value for key, value in load_file(folder / FILE).items()}
    safetensors.torch.save_file(tensors, folder / FILE)


def reshape(folder):
    tensors = {key: value[:, :-1].contiguous() for key, value in load_file(folder / FILE).items()}
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
