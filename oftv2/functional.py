"""Generators to rotations, and rotations on activations: the differentiable functions that the layers are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cayley_ops, _fused_ops, _ops, _quant_ops, _row_ops, _weight_form  # noqa: F401  (for operators)
from ._eager import Transform
from ._operator import ops, unobserved
from .cost_model import FUSED, INPUT, WEIGHT
from .kernels.register import register
from .kernels.usable import rotates, usable
from .reference import skew

_CUDA_KERNELS = register()


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
    return ops.cayley_neumann(generators, block_size, terms)


def cayley_neumann_many(generators: Sequence[Tensor], block_size: int, terms: int = 4) -> list[Tensor]:
    """:func:`cayley_neumann` of several layers' generators of one block size, in one pass (on a GPU, one launch)."""
    together = cayley_neumann(torch.cat(list(generators)), block_size, terms)
    return list(together.split([packed.shape[0] for packed in generators]))


def cayley(generators: Tensor, block_size: int) -> Tensor:
    """``Δ = R − I`` of the exact Cayley transform ``R = (I + Q)(I − Q)⁻¹``; arguments as :func:`cayley_neumann`."""
    _check_packed(generators, block_size)
    return ops.cayley(generators, block_size)


def neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    """``Δ = R − I`` of the bare Neumann series, ``R = I + 2Q + … + 2Qᵏ``, as PEFT before 0.18 cut it; in plain torch.

    It is ``2‖Q‖^(k+1)`` from orthogonal: for adapters that were trained with it, not for new ones.
    """
    _check_packed(generators, block_size)
    with torch.autocast(generators.device.type, enabled=False):
        Q = skew(generators, block_size)
        series = Q
        for _ in range(terms - 1):
            series = Q + Q @ series
        return 2 * series


def compose(deltas: Sequence[Tensor]) -> Tensor:
    """Rotations one after the other as one: ``I + Δ = (I + Δ₁)(I + Δ₂) …``, in the order in which they act on ``x``.

    Args:
        deltas (Sequence[torch.Tensor]): at least one ``Δᵢ`` of ``(d / bᵢ, bᵢ, bᵢ)``; block sizes may differ.

    Returns:
        torch.Tensor: ``Δ`` of ``(d / b, b, b)``, ``b`` being the least common multiple of the ``bᵢ``. It is summed as
        ``Δ₁ + Δ₂ + Δ₁Δ₂``, so that small rotations keep their relative precision.
    """
    if len(deltas) == 1:
        return deltas[0]
    block_size = math.lcm(*(delta.shape[-1] for delta in deltas))
    with torch.autocast(deltas[0].device.type, enabled=False):
        product, *others = (in_blocks_of(delta, block_size) for delta in deltas)
        for delta in others:
            product = torch.baddbmm(product + delta, product, delta)
    return product


def in_blocks_of(delta: Tensor, block_size: int) -> Tensor:
    """The same block-diagonal matrix ``(r, b, b)`` in larger blocks, of a multiple of ``b``."""
    count = block_size // delta.shape[-1]
    if count == 1:
        return delta
    blocks = delta.reshape(-1, count, *delta.shape[1:]).permute(0, 2, 3, 1)
    return torch.diag_embed(blocks, dim1=1, dim2=3).reshape(-1, block_size, block_size)


def rotate(x: Tensor, delta: Tensor) -> Tensor:
    """``x · blockdiag(R₁ … R_r)`` with ``R = I + Δ``, in the dtype of ``x``, rounded once.

    Args:
        x (torch.Tensor): ``(..., d)``, any floating dtype, any strides; nothing but it is kept for the backward pass.
        delta (torch.Tensor): ``(r, b, b)`` with ``r · b = d``; its gradient comes in its own dtype, so hand it over in
            float32 even where ``x`` is 16 bit.

    Returns:
        torch.Tensor: ``(..., d)``.
    """
    few = (
        not torch.compiler.is_compiling()  # a compiled graph would be for so many tokens alone
        and x.is_cpu
        and x.dtype == delta.dtype
        and x.shape[:-1].numel() < _ops.FEW_TOKENS
        and not (torch.is_autocast_enabled("cpu") or runs_kernels(x.device))
    )
    if few and (not torch.is_grad_enabled() or can_be_direct(x, delta)):
        _ops.check_rotation(x, delta)
        return _ops.rotate_few(x, delta)  # as the operator would; it and a Python node take longer than few tokens
    return ops.rotate(x, delta)


def rotate_group(x: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """One input rotated in several ways, as for projections that share it (q, k and v; gate and up).

    On a GPU, ``x`` is read once for up to three rotations, and their gradients are added up before ``∂x`` is written.

    Args:
        x (torch.Tensor): ``(..., d)``; kept once for the backward pass.
        deltas (Sequence[torch.Tensor]): ``Δ`` of each rotation, ``(r, b, b)``.

    Returns:
        list[torch.Tensor]: one ``(..., d)`` for each ``Δ``.
    """
    return ops.rotate_group(x, list(deltas))


def rotate_rows(x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    """Each row of a batch rotated by its own ``Δ``, or by none: rows of different adapters in one call.

    Args:
        x (torch.Tensor): ``(B, ..., d)``; it, ``deltas`` and ``rows`` are kept for the backward pass.
        deltas (torch.Tensor): the ``Δ`` of each adapter, ``(A, r, b, b)`` with ``r · b = d``; see :func:`rotate`.
        rows (torch.Tensor): ``(B,)``, int32 or int64, on the device of ``x``: for each row which of the ``A`` it takes,
            all below ``A`` (a GPU does not check that); −1 leaves the row as it is, bit for bit.

    Returns:
        torch.Tensor: ``(B, ..., d)``. The gradient of ``deltas`` is summed over the rows in a fixed order.
    """
    return ops.rotate_rows(x, deltas, rows)


def neumann_rotate(x: Tensor, generators: Tensor, block_size: int, terms: int = 4) -> Tensor:
    """``rotate(x, cayley_neumann(generators, …))`` in one step: on a GPU, one launch forward and two backward.

    Args:
        x (torch.Tensor): ``(..., d)``; it and the generators are all that is kept for the backward pass (on a CPU, also
            ``Δ``).
        generators (torch.Tensor): packed strict upper triangles, ``(r, b(b−1)/2)``, float32 or float64.
        block_size (int): ``b``.
        terms (int): ``k``. Default 4.

    Returns:
        torch.Tensor: ``(..., d)``.
    """
    _check_packed(generators, block_size)
    if can_be_direct(x, generators):
        return rotate(x, *Transform.apply(block_size, terms, generators))
    return ops.neumann_rotate(x, generators, block_size, terms)


def neumann_weight_form(
    x: Tensor, generators: Tensor, weight: Tensor, bias: Tensor | None, block_size: int, terms: int = 4
) -> Tensor:
    """:func:`oft_linear` in the weight form, ``Δ`` being made on the way; arguments as there and in
    :func:`neumann_rotate`.
    """
    if can_be_direct(x, generators, weight):
        return ops.weight_form(x, *Transform.apply(block_size, terms, generators), weight, bias)
    return ops.neumann_weight_form(x, generators, weight, bias, block_size, terms)


def can_be_direct(*tensors: Tensor) -> bool:
    """Whether going from one operator to the next is what takes the time, and nothing looks at them."""
    return tensors[0].is_cpu and not runs_kernels(tensors[0].device) and unobserved(*tensors)


def runs_kernels(device: torch.device) -> bool:
    """Whether a device runs the Triton kernels; not while a graph is compiled: operators ask for themselves in it."""
    return device.type in ops.rotate.kernels and not torch.compiler.is_compiling() and usable(device)


def makes_rotation_on_the_way(x: Tensor, block_size: int) -> bool:
    """Whether :func:`neumann_rotate` beats its two steps: where a kernel makes the rotation while it rotates, or where
    going from one operator to the next is what takes the time.
    """
    if torch.compiler.is_compiling():  # the operator itself asks what the device can do, when the graph runs
        return x.device.type == "cuda"
    if runs_kernels(x.device):
        return rotates(x, block_size, terms=1)
    return can_be_direct(x)


def oft_linear(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: str) -> Tensor:
    """``y = (x R) Wᵀ + bias`` of a frozen weight, in one of its forms.

    Args:
        x (torch.Tensor): ``(..., d)``.
        delta (torch.Tensor): ``Δ = R − I`` of ``(r, b, b)``.
        weight (torch.Tensor): ``(n, d)``.
        bias (torch.Tensor | None): ``(n,)``.
        form (str): ``"input"`` rotates ``x``; ``"weight"`` rotates ``W``, for this call alone; ``"fused"`` rotates
            ``x`` on its way into the product, without gradients.

    Returns:
        torch.Tensor: ``(..., n)``.

    Raises:
        ValueError: another ``form``.
    """
    if form == WEIGHT:
        return ops.weight_form(x, delta, weight, bias)
    if form == FUSED:
        return ops.rotate_matmul(x, delta, weight, bias)
    if form != INPUT:
        raise ValueError(f'form={form!r} is not allowed: use "input", "weight" or "fused"')
    return torch.nn.functional.linear(rotate(x, delta), weight, bias)


def forms(dtype: torch.dtype, weight: Tensor, bias: Tensor | None, *, gradient: bool) -> tuple[str, ...]:
    """The forms that a product of activations of ``dtype`` with ``weight`` can take where the weight is.

    The weight form wants a frozen weight in the activations' dtype; on a CPU not in 16 bit, in which products are slow.
    The fused form is a kernel without a backward pass.
    """
    if torch.compiler.is_compiling():  # the choice would be frozen into the graph, whatever the tokens of later calls
        return (INPUT,)
    trains = gradient and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not (weight.is_cuda or (weight.is_cpu and dtype.itemsize >= 4)):
        return (INPUT,)
    if trains or dtype != weight.dtype or torch.is_autocast_enabled("cuda" if weight.is_cuda else "cpu"):
        return (INPUT,)
    if not gradient and runs_kernels(weight.device):
        return (INPUT, WEIGHT, FUSED)
    return (INPUT, WEIGHT)


def _check_packed(generators: Tensor, block_size: int) -> None:
    expected = block_size * (block_size - 1) // 2
    if generators.dim() != 2 or generators.shape[1] != expected:
        raise ValueError(
            f"generators for block_size={block_size} have the shape (r, {expected}), not {tuple(generators.shape)}"
        )
    if generators.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"generators must be float32 or float64, not {generators.dtype}: 16 bit loses small rotations")
