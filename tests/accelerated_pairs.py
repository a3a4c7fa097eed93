"""PEFT's OFT and the same accelerated, side by side: models, training steps and how they are compared."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn

from conftest import assert_close, build
from oftv2 import accelerate_peft
from peers import fill, output, peft_model

D, N, B = 48, 20, 16
LINEAR = {"oft_block_size": B, "target_modules": ["0"]}


def pair(base: nn.Module, std: float = 0.05, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's OFT on a copy of ``base``, and the same accelerated."""
    theirs = peft_model(base, **{**LINEAR, **fields})
    fill(theirs, std=std)
    return theirs, accelerate_peft(copy.deepcopy(theirs))


def pair_of_two_adapters() -> tuple[nn.Module, nn.Module, Tensor]:
    """Two layers with the adapter ``"default"`` on the first and ``"second"`` on both, and an input."""
    theirs = peft_model(build(lambda: nn.Sequential(nn.Linear(D, D), nn.Linear(D, N)), torch.float64), **LINEAR)
    ours = accelerate_peft(copy.deepcopy(theirs))
    for model in (theirs, ours):  # after acceleration: on the same layer, and on another
        model.add_adapter("second", peft.OFTConfig(oft_block_size=8, target_modules=["0", "1"], block_share=True))
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if ".oft_R." in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs, ours, torch.randn(5, D, dtype=torch.float64)


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(D, N)), dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of a model, and every gradient."""
    own = x.clone().requires_grad_() if x.is_floating_point() else x
    y = output(model(own))
    model.zero_grad()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    (y * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found
    return {**found, "y": y.detach(), **({"x": own.grad} if x.is_floating_point() else {})}


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    mine, expected = step(ours, x), step(theirs, x)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name].dtype == value.dtype, name
        assert mine[name].shape == value.shape, name
        assert_close(name, mine[name], value, tolerance)
