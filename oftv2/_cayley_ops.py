"""The operators from generators to ``Δ = R − I``: the Cayley transform and its Neumann series, in plain torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._ops import add_identity, default

torch.library.define("oftv2::cayley_neumann", "(Tensor generators, int block_size, int terms) -> Tensor")
torch.library.define(
    "oftv2::cayley_neumann_backward", "(Tensor grad, Tensor generators, int block_size, int terms) -> Tensor"
)
torch.library.define("oftv2::cayley", "(Tensor generators, int block_size) -> Tensor")
torch.library.define("oftv2::cayley_backward", "(Tensor grad, Tensor delta) -> Tensor")


@functools.lru_cache(maxsize=64)
def _triangles(block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in a flattened block of the strict upper triangle, row by row, and of their mirror images."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=device)
    return rows * block_size + columns, columns * block_size + rows


@functools.lru_cache(maxsize=64)
def _skew_entries(block_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each entry of a flattened block, where its packed generator is, and its sign (0 on the diagonal)."""
    positions = torch.zeros(block_size**2, dtype=torch.long, device=device)
    signs = torch.zeros(block_size**2, dtype=dtype, device=device)
    for entries, sign in zip(_triangles(block_size, device), (1, -1), strict=True):
        positions[entries] = torch.arange(len(entries), device=device)
        signs[entries] = sign
    return positions, signs


def _skew(generators: Tensor, block_size: int) -> Tensor:
    positions, signs = _skew_entries(block_size, generators.dtype, generators.device)
    return generators.index_select(1, positions).mul_(signs).view(-1, block_size, block_size)


def _pack_skew_grad(grad: Tensor) -> Tensor:
    """``∂L/∂Q`` of unconstrained entries to the gradient of the packed generators: ``G − Gᵀ`` at the upper triangle."""
    upper, lower = _triangles(grad.shape[-1], grad.device)
    flat = grad.reshape(grad.shape[0], -1)
    return flat.index_select(1, upper) - flat.index_select(1, lower)


def _horner(generators: Tensor, block_size: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Q``, ``P = Q²``, and where Horner's scheme for ``Δ = 2(Q + … + Qᵏ) + Qᵏ⁺¹`` starts.

    ``V ← 2H + V·P`` with ``H = Q + P``, ⌈k/2⌉ − 1 times, ends at Δ; the start is ``2H + P·Q`` for even k and ``2H − P``
    for odd k. With P that makes k/2 + 1 products. Each adds to an H of its own: adding it up again beats copying it.
    """
    Q = _skew(generators, block_size)
    P = torch.bmm(Q, Q)
    H = Q + P
    return Q, P, H.baddbmm_(P, Q, beta=2) if terms % 2 == 0 else H.add_(Q)


@default("cayley_neumann")
def _cayley_neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    Q, P, V = _horner(generators, block_size, terms)
    for _ in range((terms - 1) // 2):
        V = (Q + P).baddbmm_(V, P, beta=2)
    return V


@default("cayley_neumann_backward")
def _cayley_neumann_backward(grad: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    Q, P, V = _horner(generators, block_size, terms)  # Qᵀ = −Q, Pᵀ = P
    values = [V]  # of V, from the start to the last one before Δ
    grads = [grad]  # of V, from Δ back to the start
    for step in range((terms - 1) // 2):
        if step:
            values.append((Q + P).baddbmm_(values[-1], P, beta=2))
        grads.append(torch.bmm(grads[-1], P))
    grad_H = functools.reduce(torch.add, grads)  # half of it
    if terms % 2 == 0:
        grad_Q = torch.baddbmm(grad_H, P, grads[-1], beta=2)
        grad_P = torch.baddbmm(grad_H, grads[-1], Q, beta=2, alpha=-1)
    else:
        grad_Q = 2 * grad_H
        grad_P = grad_Q - grads[-1]
    for value, grad_V in zip(values, grads[-2::-1], strict=False):  # V ← 2H + V·P
        grad_P.baddbmm_(value.mT, grad_V)
    # ∂P/∂Q adds −(∂P·Q + Q·∂P), of which only the skew part counts: that of −(∂P + ∂Pᵀ)·Q, one product.
    return _pack_skew_grad(grad_Q.baddbmm_(grad_P + grad_P.mT, Q, alpha=-1))


@default("cayley")
def _cayley(generators: Tensor, block_size: int) -> Tensor:
    Q = _skew(generators, block_size)  # Δ = (I + Q)(I − Q)⁻¹ − I = 2 Q (I − Q)⁻¹
    # I − Q is never singular; solve would look whether it is, and wait for the device.
    return torch.linalg.solve_ex(add_identity(-Q), 2 * Q, left=False).result


@default("cayley_backward")
def _cayley_backward(grad: Tensor, delta: Tensor) -> Tensor:
    inverse = add_identity(delta / 2)  # (I − Q)⁻¹ = I + Δ/2, and dΔ = 2 (I − Q)⁻¹ dQ (I − Q)⁻¹
    return _pack_skew_grad(2 * inverse.mT @ grad @ inverse.mT)


def _fake_delta(generators: Tensor, block_size: int, *_: Any) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size)


torch.library.register_fake("oftv2::cayley_neumann")(_fake_delta)
torch.library.register_fake("oftv2::cayley")(_fake_delta)
torch.library.register_fake("oftv2::cayley_neumann_backward")(
    lambda grad, generators, block_size, terms: torch.empty_like(generators, memory_format=torch.contiguous_format)
)
torch.library.register_fake("oftv2::cayley_backward")(
    lambda grad, delta: delta.new_empty(delta.shape[0], delta.shape[1] * (delta.shape[1] - 1) // 2)
)


def _save_neumann(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    generators, ctx.block_size, ctx.terms = inputs
    ctx.save_for_backward(generators)


def _neumann_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (generators,) = ctx.saved_tensors
    return torch.ops.oftv2.cayley_neumann_backward(grad, generators, ctx.block_size, ctx.terms), None, None


def _save_cayley(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _cayley_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.oftv2.cayley_backward(grad, *ctx.saved_tensors), None


torch.library.register_autograd("oftv2::cayley_neumann", _neumann_grad, setup_context=_save_neumann)
torch.library.register_autograd("oftv2::cayley", _cayley_grad, setup_context=_save_cayley)
