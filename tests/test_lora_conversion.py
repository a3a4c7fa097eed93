"""Adapters as LoRA: every kind of layer, the error that is reported, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import randomize
from oftv2 import AdapterError, wrap_model
from oftv2.conversion import save_as_lora
from peers import from_peft, relative
from small_models import answer

IDS = torch.arange(3, 15).view(2, 6)


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config)


def embedding():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 8), nn.Linear(8, 4))


def conv2d():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, (1, 2)))


LORA = {
    "conv1d": (gpt2, IDS, {"block_size": 8}),
    "conv1d-and-linear": (gpt2, IDS, {"block_size": 8, "modules_to_save": ("lm_head",), "bias": "oft_only"}),
    "embedding": (embedding, IDS, {"block_size": 4, "target_modules": ("0", "1"), "bias": "all"}),
    "modules": (embedding, IDS, {"block_size": 4, "target_modules": ("1",), "modules_to_save": ("2",)}),
    "conv2d": (conv2d, torch.randn(2, 4, 6, 6), {"block_size": 4, "target_modules": ("0", "1")}),
}


@pytest.mark.parametrize(("make", "inputs", "fields"), LORA.values(), ids=LORA.keys())
def test_every_kind_of_layer_as_a_lora(make, inputs, fields, tmp_path):
    model = wrap_model(make(), **fields)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "generators" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    report = save_as_lora(model, tmp_path, rank=64)
    assert all(layer.exact and layer.exact_rank <= 36 for layer in report.values())
    assert relative(answer(from_peft(make(), tmp_path), inputs), answer(model.eval(), inputs)) < 1e-5


def test_the_reported_error_is_the_error(tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(32, 24)), block_size=8, target_modules=("0",))
    randomize(model)
    plain = model[0].base_layer.weight.detach().clone()
    (layer,) = save_as_lora(model, tmp_path, rank=5).values()
    loaded = from_peft(nn.Sequential(nn.Linear(32, 24)), tmp_path).base_model.model[0]
    added = (loaded.lora_B["default"].weight @ loaded.lora_A["default"].weight).detach()
    merged = plain @ torch.block_diag(*(model[0].delta().detach() + torch.eye(8))).mT
    missed = torch.linalg.norm(merged - plain - added)
    assert layer.rank == 5
    assert layer.exact_rank == 24
    assert abs(layer.error - missed / torch.linalg.norm(merged - plain)) < 1e-5
    assert abs(layer.weight_error - missed / torch.linalg.norm(plain)) < 1e-5


@pytest.mark.parametrize("sizes", [{}, {"rank": 0}, {"tolerance": 1.0}, {"rank": 2, "tolerance": 0.1}], ids=str)
def test_ranks_that_are_not_allowed(sizes, tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(32, 24)), block_size=8)
    with pytest.raises(AdapterError, match=r"rank|tolerance"):
        save_as_lora(model, tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_grouped_convolutions_have_no_lora(tmp_path):
    model = wrap_model(nn.Sequential(nn.Conv2d(8, 8, 1, groups=2)), block_size=4, target_modules=("0",))
    with pytest.raises(AdapterError, match="0 has groups"):
        save_as_lora(model, tmp_path / "out", rank=4)
