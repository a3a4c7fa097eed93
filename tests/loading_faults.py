"""A saved adapter to damage, models to load it into, and how a refusal is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from conftest import perturb, snapshot
from oftv2 import AdapterError, load_adapter, save_adapter, wrap_model

FILE = "adapter_model.safetensors"
FIELDS = {"block_size": 8, "modules_to_save": ("4",)}
KEY = "base_model.model.{}.oft_R.weight"


def build(seed=11, sizes=(32, 24, 16)):
    torch.manual_seed(seed)
    a, b, c = sizes
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, 4)).eval()


def saved_adapter(folder: Path) -> Path:
    return save_adapter(perturb(wrap_model(build(), **FIELDS)), folder)


def read(folder):
    with safetensors.safe_open(folder / FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata()


def plain(**fields):
    return lambda: build(**fields)


def wrapped(**fields):
    return lambda: wrap_model(build(), **{**FIELDS, **fields})


def beside():
    return wrap_model(build(), adapter_name="other", block_size=4, modules_to_save=("0",))


def refused(make, folder, *messages, **options):
    """Loading raises one AdapterError with all of ``messages`` and leaves the model exactly as it was."""
    model = make()
    options |= {"adapter_name": "new"} if make is beside else {}
    before = snapshot(model)
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder, **options)
    for message in messages:
        assert message in str(caught.value)
    assert snapshot(model) == before
    return str(caught.value)
