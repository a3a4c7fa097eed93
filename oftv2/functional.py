"""Generators to rotations, and rotations on activations: the differentiable functions that the layers are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _fused_ops, _ops, _weight_form  # noqa: F401  (they register the operators)
from .kernels.register import register

_CUDA_KERNELS = register()

# Tokens per output feature from which rotating the weight is cheaper than rotating the activations (CPU, 2 threads,
# float32, b = 32; benchmarks/layer.py).
_WEIGHT_FORM_TOKENS_PER_OUTPUT = 1.0


def effective_generators(
    generators: Tensor, block_size: int, *, scale: bool = False, constraint: float | None = None
) -> Tensor:
    """The packed generators that enter the Cayley transform: in float32 or wider, scaled, and projected.

    Args:
        generators (torch.Tensor): packed strict upper triangles of shape ``(r, b(b−1)/2)``.
        block_size (int): ``b``.
        scale (bool): divide by ``2√(b−1)``.
        constraint (float | None): scale each block into ``‖Q_j‖_F ≤ constraint / √r``; ``None`` leaves it as it is.

    Returns:
        torch.Tensor: same shape; differentiable, the argument is never written to.
    """
    packed = generators if generators.element_size() >= 4 else generators.float()
    if scale:
        packed = packed / (2 * math.sqrt(block_size - 1))
    if constraint is not None:
        limit = constraint / math.sqrt(2 * packed.shape[0])  # ‖Q‖_F = √2 · ‖packed‖
        norm = torch.linalg.vector_norm(packed, dim=1, keepdim=True)
        packed = packed * (limit / norm.clamp_min(limit))
    return packed


def cayley_neumann(generators: Tensor, block_size: int, terms: int = 4) -> Tensor:
    r"""``Δ = R − I`` of the Cayley transform with a truncated Neumann series, ``R = (I + Q)(I + Q + … + Qᵏ)``.

    Args:
        generators (torch.Tensor): packed strict upper triangles, ``(r, b(b−1)/2)``, float32 or float64.
        block_size (int): ``b``.
        terms (int): ``k``; an even one is far more orthogonal than the odd one after it. Default 4.

    Returns:
        torch.Tensor: ``Δ`` of shape ``(r, b, b)`` in the generators' dtype.

    Source: OFTv2, arXiv 2506.19847, equation of the Cayley–Neumann parametrization.
    """
    _check_packed(generators, block_size)
    return torch.ops.oftv2.cayley_neumann(generators, block_size, terms)


def cayley_neumann_many(generators: Sequence[Tensor], block_size: int, terms: int = 4) -> list[Tensor]:
    """:func:`cayley_neumann` of several layers' generators of one block size, in one pass (on a GPU, one launch)."""
    together = cayley_neumann(torch.cat(list(generators)), block_size, terms)
    return list(together.split([packed.shape[0] for packed in generators]))


def cayley(generators: Tensor, block_size: int) -> Tensor:
    """``Δ = R − I`` of the exact Cayley transform ``R = (I + Q)(I − Q)⁻¹``; arguments as :func:`cayley_neumann`."""
    _check_packed(generators, block_size)
    return torch.ops.oftv2.cayley(generators, block_size)


def rotate(x: Tensor, delta: Tensor) -> Tensor:
    """``x · blockdiag(R₁ … R_r)`` with ``R = I + Δ``, in the dtype of ``x``, rounded once.

    Args:
        x (torch.Tensor): ``(..., d)``, any floating dtype, any strides; nothing but it is kept for the backward pass.
        delta (torch.Tensor): ``(r, b, b)`` with ``r · b = d``; its gradient comes in its own dtype, so hand it over in
            float32 even where ``x`` is 16 bit.

    Returns:
        torch.Tensor: ``(..., d)``.
    """
    return torch.ops.oftv2.rotate(x, delta)


def rotate_group(x: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """One input rotated in several ways, as for projections that share it (q, k and v; gate and up).

    On a GPU, ``x`` is read once for up to three rotations, and their gradients are added up before ``∂x`` is written.

    Args:
        x (torch.Tensor): ``(..., d)``; kept once for the backward pass.
        deltas (Sequence[torch.Tensor]): ``Δ`` of each rotation, ``(r, b, b)``.

    Returns:
        list[torch.Tensor]: one ``(..., d)`` for each ``Δ``.
    """
    return torch.ops.oftv2.rotate_group(x, list(deltas))


def oft_linear(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: str | None = None
) -> Tensor:
    """``y = (x R) Wᵀ + bias`` of a frozen weight, in the cheaper of two forms.

    Args:
        x (torch.Tensor): ``(..., d)``.
        delta (torch.Tensor): ``Δ = R − I`` of ``(r, b, b)``.
        weight (torch.Tensor): ``(n, d)``.
        bias (torch.Tensor | None): ``(n,)``.
        form (str | None): ``"input"`` rotates ``x``, ``"weight"`` rotates ``W``; ``None``: :func:`choose_form` decides.

    Returns:
        torch.Tensor: ``(..., n)``.

    Raises:
        ValueError: another ``form``.
    """
    form = form or choose_form(x, weight, bias)
    if form == "weight":
        return torch.ops.oftv2.weight_form(x, delta, weight, bias)
    if form != "input":
        raise ValueError(f'form={form!r} is not allowed: use "input", "weight" or None')
    return torch.nn.functional.linear(rotate(x, delta), weight, bias)


def choose_form(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Which form of an adapted linear layer costs less: ``"input"`` or ``"weight"``.

    Both forms share the products with the weight and the reduction over tokens; what differs is a rotation of ``T × d``
    activations against one of ``n × d`` weights, each twice.
    """
    frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
    plain = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype and x.element_size() >= 4
    if not (frozen and plain) or torch.is_autocast_enabled("cpu"):
        return "input"
    tokens = x.numel() // max(1, x.shape[-1])
    return "weight" if tokens >= _WEIGHT_FORM_TOKENS_PER_OUTPUT * weight.shape[0] else "input"


def _check_packed(generators: Tensor, block_size: int) -> None:
    expected = block_size * (block_size - 1) // 2
    if generators.dim() != 2 or generators.shape[1] != expected:
        raise ValueError(
            f"generators for block_size={block_size} have the shape (r, {expected}), not {tuple(generators.shape)}"
        )
    if generators.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"generators must be float32 or float64, not {generators.dtype}: 16 bit loses small rotations")
