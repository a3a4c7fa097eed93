"""Three named adapters of different settings: in one model, and each in a model of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import oftv2
from conftest import build
from oftv2.state import adapter_parameters, plain_name
from small_models import VECTORS, answer, linear

HEAD = {"modules_to_save": ("4",)}
FIRST = {"block_size": 8, "target_modules": ["0", "2"], "modules_to_save": ()}
SECOND = {"oft_block_size": 4, "target_modules": ["2", "4"], "parametrization": "cayley", "bias": "oft_only"}
THIRD = {"block_size": 2, "target_modules": ["0"], "neumann_terms": 2, **HEAD}
FIELDS = {"a": FIRST, "b": SECOND, "c": THIRD}


def randomize(model: nn.Module, name: str, seed: int = 1) -> nn.Module:
    """Random values for all that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(adapter_parameters(model, name)):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def three() -> nn.Module:
    """A model with three different adapters, the first of them active."""
    model = oftv2.wrap_model(build(linear), adapter_name="a", **FIRST)
    for seed, (name, fields) in enumerate(FIELDS.items()):
        if name != "a":
            assert oftv2.add_adapter(model, name, **fields) is model
        randomize(model, name, seed)
    return model


def alone(name: str) -> nn.Module:
    """The same adapter in a model of its own."""
    seed = list(FIELDS).index(name)
    return randomize(oftv2.wrap_model(build(linear), adapter_name=name, **FIELDS[name]), name, seed)


def output(model: nn.Module) -> Tensor:
    return answer(model.eval(), VECTORS)


def trainable(model: nn.Module) -> set[str]:
    """What trains, under the names of the plain model."""
    return {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
