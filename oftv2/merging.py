"""Merged weights: rotated in float32 block by block, and put into a copy of their layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def with_weight(module: Any, weight: Tensor) -> nn.Module:
    """A copy of ``module`` (class, attributes, hooks) with another weight; a tied weight is left to its peers."""
    clone = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(clone, registry, dict(getattr(module, registry)))
    clone.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return clone


def rotated(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight`` of ``(n, d)`` rotated by ``I + Δ`` in float32 or wider, back in its own dtype; in chunks of rows.

    ``W + W Δ``, not ``W (I + Δ)``: rounding the diagonal of ``I + Δ`` would bias every merge in the same direction.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    delta = delta.to(weight.device, wide)
    rows = max(1, (1 << 22) // max(1, weight.shape[1]))
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            blocks = weight[part].to(wide).unflatten(1, delta.shape[:2]).transpose(0, 1)
            out[part] = torch.baddbmm(blocks, blocks, delta).transpose(0, 1).flatten(1).to(weight.dtype)
    return out
