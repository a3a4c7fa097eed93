"""The operators from generators to ``Δ = R − I``: the Cayley transform and its Neumann series, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operator import constant, ops
from ._ops import add_identity

ops.define("cayley_neumann", "(Tensor generators, int block_size, int terms) -> Tensor")
ops.define("cayley_neumann_backward", "(Tensor grad, Tensor generators, int block_size, int terms) -> Tensor")
ops.define("cayley", "(Tensor generators, int block_size) -> Tensor")
ops.define("cayley_backward", "(Tensor grad, Tensor delta) -> Tensor")


@constant
def _triangles(block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in a flattened block of the strict upper triangle, row by row, and of their mirror images."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=device)
    return rows * block_size + columns, columns * block_size + rows


@constant
def _skew_entries(block_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each entry of a flattened block, where its packed generator is, and its sign (0 on the diagonal)."""
    positions = torch.zeros(block_size**2, dtype=torch.long, device=device)
    signs = torch.zeros(block_size**2, dtype=dtype, device=device)
    for entries, sign in zip(_triangles(block_size, device), (1, -1), strict=True):
        positions[entries] = torch.arange(len(entries), device=device)
        signs[entries] = sign
    return positions, signs


def _take(rows: Tensor, positions: Tensor) -> Tensor:
    """``rows[:, positions]``, row by row: ``index_select`` goes column by column, through all of a CPU's caches."""
    return rows.gather(1, positions.expand(rows.shape[0], -1))


def _skew(generators: Tensor, block_size: int) -> Tensor:
    positions, signs = _skew_entries(block_size, generators.dtype, generators.device)
    return _take(generators, positions).mul_(signs).view(-1, block_size, block_size)


def _pack_skew_grad(grad: Tensor) -> Tensor:
    """``∂L/∂Q`` of unconstrained entries to the gradient of the packed generators: ``G − Gᵀ`` at the upper triangle."""
    upper, lower = _triangles(grad.shape[-1], grad.device)
    flat = grad.reshape(grad.shape[0], -1)
    return _take(flat, upper).sub_(_take(flat, lower))


def _horner(generators: Tensor, block_size: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Q``, ``P = Q²``, and where Horner's scheme for ``Δ = 2(Q + … + Qᵏ) + Qᵏ⁺¹`` starts.

    ``V ← 2H + V·P`` with ``H = Q + P``, ⌈k/2⌉ − 1 times, ends at Δ; the start is ``2H + P·Q`` for even k and ``2H − P``
    for odd k. With P that makes k/2 + 1 products. Each adds to an H of its own: adding it up again beats copying it.
    """
    Q = _skew(generators, block_size)
    P = torch.bmm(Q, Q)
    H = Q + P
    return Q, P, H.baddbmm_(P, Q, beta=2) if terms % 2 == 0 else H.add_(Q)


@ops.cayley_neumann.default
def _cayley_neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    Q, P, V = _horner(generators, block_size, terms)
    for _ in range((terms - 1) // 2):
        V = (Q + P).baddbmm_(V, P, beta=2)
    return V


@ops.cayley_neumann_backward.default
def _cayley_neumann_backward(grad: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    """``∂L/∂packed`` in a recursion of k steps, where reverse mode takes two products for each of Δ's, and some of Δ's
    once more.

    ``∂L/∂Q = Σⱼ cⱼ Σᵢ NⁱGNʲ⁻¹⁻ⁱ`` with N = Qᵀ = −Q, j = 1 … k + 1, cⱼ = 2 but c₍ₖ₊₁₎ = 1. Only its skew part counts, to
    which the j-th term contributes through half of G alone, ``Hⱼ = (G + (−1)ʲGᵀ)/2``. Of that, the transpose of
    ``NⁱHⱼNˡ`` is ``±NˡHⱼNⁱ``, so products from the left make all of the sum:

        Z ← c₍ₖ₊₁₎H₍ₖ₊₁₎;  for j = k … 1:  Z ← NZ + (−1)ʲ(NZ)ᵀ/j + cⱼHⱼ

    NZ moves the coefficients of ``NⁱHNˡ`` by one place, and 1/j of them in reverse evens them out: to 1 each at j = 1,
    where Z is skew. (NZ)ᵀ is made as ZᵀQ: on a CPU, transposing takes longer than such a product.
    """
    Q = _skew(generators, block_size)
    even = torch.lerp(grad, grad.mT, 0.5)
    H = even, grad - even
    Z = H[(terms + 1) % 2]
    for j in range(terms, 0, -1):
        NZ = torch.baddbmm(H[j % 2], Q, Z, beta=2, alpha=-1)
        Z = NZ.baddbmm_(Z.mT, Q, alpha=(-1) ** j / j)
    upper, _ = _triangles(block_size, Z.device)
    return _take(Z.reshape(len(Z), -1), upper).mul_(2)


@ops.cayley.default
def _cayley(generators: Tensor, block_size: int) -> Tensor:
    Q = _skew(generators, block_size)  # Δ = (I + Q)(I − Q)⁻¹ − I = 2 Q (I − Q)⁻¹
    # I − Q is never singular; solve would look whether it is, and wait for the device.
    return torch.linalg.solve_ex(add_identity(-Q), 2 * Q, left=False).result


@ops.cayley_backward.default
def _cayley_backward(grad: Tensor, delta: Tensor) -> Tensor:
    inverse = add_identity(delta / 2)  # (I − Q)⁻¹ = I + Δ/2, and dΔ = 2 (I − Q)⁻¹ dQ (I − Q)⁻¹
    return _pack_skew_grad(2 * inverse.mT @ grad @ inverse.mT)


def _fake_delta(generators: Tensor, block_size: int, *_: Any) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size)


ops.cayley_neumann.fake(_fake_delta)
ops.cayley.fake(_fake_delta)
ops.cayley_neumann_backward.fake(
    lambda grad, generators, block_size, terms: torch.empty_like(generators, memory_format=torch.contiguous_format)
)
ops.cayley_backward.fake(
    lambda grad, delta: delta.new_empty(delta.shape[0], delta.shape[1] * (delta.shape[1] - 1) // 2)
)


def _save_neumann(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    generators, ctx.block_size, ctx.terms = inputs
    ctx.save_for_backward(generators)


def _neumann_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (generators,) = ctx.saved_tensors
    return ops.cayley_neumann_backward(grad, generators, ctx.block_size, ctx.terms), None, None


def _save_cayley(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _cayley_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return ops.cayley_backward(grad, *ctx.saved_tensors), None


ops.cayley_neumann.differentiable(_save_neumann, _neumann_grad)
ops.cayley.differentiable(_save_cayley, _cayley_grad)
