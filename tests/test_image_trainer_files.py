"""Single files of programs that train image models: read as what they compute, or refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from conftest import build
from oftv2 import AdapterError, load_adapter
from peers import relative
from small_models import IMAGES, VECTORS


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
    "not-packed": (SD_SCRIPTS, {"a.oft_R.weight": torch.ones(3), "a.oft_R.scaled_oft": torch.tensor(1)}, "no packed"),
    "no-layer": (SD_SCRIPTS, {"lora_unet_down.oft_R.weight": torch.zeros(4, 28)}, "has a ModuleDict there"),
    "elsewhere": (SD_SCRIPTS, {"lora_te_text.oft_R.weight": torch.zeros(2, 28)}, "1 of 3 layers"),
}


@pytest.mark.parametrize(("metadata", "extra", "message"), UNCERTAIN.values(), ids=UNCERTAIN.keys())
def test_a_file_that_is_not_certainly_plain_rotations_of_this_model(metadata, extra, message, tmp_path):
    single_file(tmp_path / "style.safetensors", metadata or None, **extra)
    with pytest.raises(AdapterError, match=message):
        load_adapter(build(unet), tmp_path / "style.safetensors")
