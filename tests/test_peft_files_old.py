"""Files of PEFT 0.14, whose OFT scaled the outputs too: they were written by it, with what it answered beside them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from oftv2 import AdapterError, disable_adapter, load_adapter, merge, save_adapter, set_adapter, wrap_model
from oftv2.__main__ import main
from oftv2.errors import PeftFormatWarning
from oftv2.inspection import inspect_adapter

FILES = Path(__file__).parent / "files" / "peft-0.14.0"
CASES = ("blocks", "shared", "coft")  # "shared" has a module trained in full too; "coft" was not projected yet
SCALED = r"PEFT 0\.14 or 0\.15, which scaled the outputs too"


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Linear(16, 6)
        self.two = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 2)
        base = {k.removeprefix("base."): v for k, v in load_file(FILES / "blocks" / "answer.safetensors").items()}
        self.load_state_dict({key: value for key, value in base.items() if key not in ("x", "y")})
        self.to(dtype)

    def forward(self, x):
        return self.head(self.two(torch.tanh(self.one(self.conv(x).flatten(2).mean(1).mul(3)))))


def answer(case):
    held = load_file(FILES / case / "answer.safetensors")
    return held["x"], held["y"]


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def copied(tmp_path):
    """A file that may be changed."""
    folder = tmp_path / "old"
    shutil.copytree(FILES / "blocks", folder)
    return folder


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(load_file(path)), path)


@pytest.mark.parametrize("case", CASES)
def test_the_model_answers_as_that_peft_did(case, tmp_path):
    (x, y), model = answer(case), Model()
    plain = model(x)
    assert error(plain, y) > 0.01
    with pytest.warns(PeftFormatWarning, match=SCALED):
        load_adapter(model, FILES / case)
    assert error(model(x), y) < 1e-6
    with disable_adapter(model):
        assert torch.equal(model(x), plain)
    save_adapter(model, tmp_path, format="oftv2")
    assert torch.equal(load_adapter(Model(), tmp_path)(x), model(x))
    merge(model)
    assert error(model(x), y) < 1e-6


def test_a_constraint_is_in_the_values_and_not_kept_up():
    with pytest.warns(PeftFormatWarning, match="not kept up further"):
        load_adapter(Model(), FILES / "coft")


@pytest.mark.filterwarnings("ignore::oftv2.errors.PeftFormatWarning")
@pytest.mark.parametrize("case", ["blocks", "shared"])
def test_todays_peft_reads_it_once_it_is_saved_anew(case, tmp_path):
    x, y = answer(case)
    model = Model()
    if case == "blocks":  # whose convolution PEFT's OFT cannot compute
        change = tmp_path / "linear"
        shutil.copytree(FILES / case, change)
        change_tensors(change, lambda tensors: {key: value for key, value in tensors.items() if ".conv." not in key})
        load_adapter(model, change)
        y = model(x)
    else:
        load_adapter(model, FILES / case)
    save_adapter(model, tmp_path / "new", format="peft")
    theirs = PeftModel.from_pretrained(Model(), tmp_path / "new")
    assert peft.__version__ >= "0.18"
    assert error(theirs(x), y) < 1e-6


@pytest.mark.filterwarnings("ignore::oftv2.errors.PeftFormatWarning")
def test_beside_other_adapters():
    (x, y), model = answer("blocks"), Model()
    wrap_model(model, target_modules=["one"], block_size=4)
    load_adapter(model, FILES / "blocks", adapter_name="old")
    assert error(model(x), Model()(x)) < 1e-6
    set_adapter(model, "old", trainable=False)
    assert error(model(x), y) < 1e-6
    set_adapter(model, "default")
    assert error(model(x), Model()(x)) < 1e-6
    load_adapter(model, FILES / "blocks", adapter_name="old")  # over itself: from the base's weights again
    set_adapter(model, "old")
    assert error(model(x), y) < 1e-6
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > model.one.base_layer.weight.numel()


@pytest.mark.filterwarnings("ignore::oftv2.errors.PeftFormatWarning")
def test_in_half_precision():
    x, y = answer("blocks")
    model = load_adapter(Model(torch.bfloat16), FILES / "blocks")
    assert model.one.base_layer.weight.dtype == torch.bfloat16
    assert error(model(x.bfloat16()).float(), y) < 0.02


def test_scales_of_one_leave_the_weights_alone(copied):
    ones = lambda tensors: {k: torch.ones_like(v) if k.endswith("oft_s") else v for k, v in tensors.items()}  # noqa: E731
    change_tensors(copied, ones)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_adapter(Model(), copied)
    assert torch.equal(model.one.base_layer.weight, Model().one.weight)
    assert main(["convert", str(copied), str(copied.parent / "new"), "--to", "oftv2"]) == 0


def test_inspection_tells_of_the_scales_and_conversion_asks_for_the_base(tmp_path, capsys):
    assert "scaled the outputs too: 3 layers" in inspect_adapter(FILES / "blocks")
    assert main(["convert", str(FILES / "blocks"), str(tmp_path / "new"), "--to", "oftv2"]) == 1
    assert "--base" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


WRONG = {
    "no-scale": (lambda t: {k: v for k, v in t.items() if not k.endswith("two.oft_s")}, r"two\.oft_r .*with an oft_s"),
    "no-rotation": (lambda t: {k: v for k, v in t.items() if not k.endswith("two.oft_r")}, r"two\.oft_s .*no \(n, 1\)"),
    "flat": (
        lambda t: {k: v.flatten(1) if "one.oft_r" in k else v for k, v in t.items()},
        r"one\.oft_r of shape \(2, 64",
    ),
    "nan": (lambda t: {k: v * float("nan") if "one.oft_s" in k else v for k, v in t.items()}, "one.oft_s holds NaN"),
    "outputs": (lambda t: {k: v[:3] if "one.oft_s" in k else v for k, v in t.items()}, "one: .* scales 3 outputs"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_broken_is_refused(change, message, copied):
    change_tensors(copied, lambda tensors: {k: v.contiguous() for k, v in change(tensors).items()})
    model = Model()
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, copied)
    assert type(model.one) is nn.Linear


def test_a_constraint_on_shared_blocks_is_refused(copied):
    path = copied / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "coft": True, "block_share": True}))
    with pytest.raises(AdapterError, match="coft and block_share together"):
        load_adapter(Model(), copied)


def test_a_quantized_weight_cannot_be_scaled():
    bnb = pytest.importorskip("bitsandbytes")
    model = Model()
    weight = bnb.nn.Params4bit(model.one.weight.detach(), quant_type="nf4", requires_grad=False)
    model.one = bnb.nn.Linear4bit(16, 6, quant_type="nf4")
    model.one.weight = weight
    model.to("cpu")
    with pytest.raises(AdapterError, match=r"one: the adapter scales 6 outputs too .* not quantized"):
        load_adapter(model, FILES / "blocks")


def test_tied_weights_are_not_scaled_for_both():
    model = Model()
    model.peer = nn.Linear(16, 6)
    model.peer.weight = model.one.weight
    with pytest.raises(AdapterError, match=r"one\.weight was trained apart from peer\.weight"):
        load_adapter(model, FILES / "blocks")
