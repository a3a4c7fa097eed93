"""Adapters on two-dimensional convolutions, of any kernel, stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import functional as F
from .base import OFTLayer
from .checkpointing import OutputHook
from .layers import unhooked
from .merging import cloned, rotated
from .partitioned import full_shape


class OFTConv2d(OFTLayer):
    r"""A frozen convolution whose input patches are rotated.

    A convolution is a linear layer on patches of ``C/groups · kh · kw`` values, in the order of ``torch.nn.Unfold``;
    each patch is rotated before it meets the kernels. Patches overlap, so the rotated input cannot be written back as
    an image: the same function is computed by rotating the kernels, ``W′ = W · blockdiag(R)ᵀ``, which also costs less.
    With groups, every group has blocks of its own.

    Args:
        base_layer (nn.Conv2d): weight ``(n, C/groups, kh, kw)``.
        config, adapter_name, name, block_size: see :class:`oftv2.OFTLinear`; the block size must divide
            ``C/groups · kh · kw``.

    Shape:
        input ``(N, C, H, W)`` or ``(C, H, W)``, output as the base layer's.
    """

    @staticmethod
    def rotated_features(base_layer: Any) -> tuple[int, int]:
        return base_layer.groups * full_shape(base_layer.weight)[1:].numel(), base_layer.groups

    def forward(self, x: Tensor) -> Tensor:
        if self.rotating:
            return self._convolve(x, self.delta())
        rows = self.current_rows
        return self.base_layer(x) if rows is None else rows.each(self, x, self._convolve)

    def _convolve(self, x: Tensor, delta: Tensor | None) -> Tensor:
        base = self.base_layer
        if delta is None:
            return base(x)
        if _is_computed(base):
            for hook in base._forward_pre_hooks.values():
                hook(base, (x,))
        weight, groups = base.weight, base.groups
        kernels = _as_kernels(F.rotate(_as_rows(weight, groups), delta.mT), groups, weight.shape)
        return convolved(base, x, kernels)

    @staticmethod
    def rotated_weight(base_layer: Any, weight: Tensor, delta: Tensor) -> Tensor:
        groups = base_layer.groups
        return _as_kernels(rotated(_as_rows(weight, groups), delta.mT), groups, weight.shape)


def convolved(base: Any, x: Tensor, kernels: Tensor) -> Tensor:
    """What a convolution makes of ``x`` with other kernels, of ``(n, C/groups, kh, kw)``."""
    plain = type(base) is nn.Conv2d and unhooked(base, but=OutputHook)  # which is for frozen kernels
    if plain or is_parametrized(base) or _is_computed(base):
        convolution: Tensor = base._conv_forward(x, kernels, base.bias)
        return convolution
    stand_in = cloned(base)  # with hooks or a forward of its own, as timm's convolutions have
    stand_in._parameters.pop("weight")
    vars(stand_in)["weight"] = kernels
    return stand_in(x)


def _is_computed(base: nn.Module) -> bool:
    """Whether hooks compute the weight before each pass: those of weight_norm, spectral_norm and pruning."""
    return isinstance(vars(base).get("weight"), Tensor)


def _as_rows(weight: Tensor, groups: int) -> Tensor:
    """``(n, C/groups, kh, kw)`` as ``(n/groups, C · kh · kw)``: one row holds a patch of every group."""
    return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 1).flatten(1)


def _as_kernels(rows: Tensor, groups: int, shape: torch.Size) -> Tensor:
    return rows.view(shape[0] // groups, groups, -1).transpose(0, 1).reshape(shape)
