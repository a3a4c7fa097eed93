"""Cayley–Neumann transform of packed generators, all blocks in one launch, and its gradient.

    Δ = 2(Q + … + Qᵏ) + Qᵏ⁺¹,   Q skew-symmetric from its strict upper triangle

Several layers of one block size share a launch by handing over their generators as one ``(r₁ + r₂ + …, b(b−1)/2)``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .tiles import (
    cdiv,
    exact_dot,
    load_blocks,
    load_skew,
    neumann_delta,
    store_blocks,
    tile_positions,
    tile_size,
)

# A program keeps about four tiles in registers, and their products' operands in float32: at 64 they spill (on sm_80,
# 0.7 KB forward and 0.8 KB backward), so wider blocks are left to batched products.
MAX_BLOCK_SIZE = 32


@triton.jit
def _forward(packed, delta, num_blocks, B: tl.constexpr, TILE: tl.constexpr, TERMS: tl.constexpr):
    first = tl.program_id(0) * (TILE // B)
    Q = load_skew(packed, first, num_blocks, B, TILE)  # [TILE, TILE]
    store_blocks(delta, neumann_delta(Q, TERMS), first, num_blocks, 0, B, TILE, TILE)


@triton.jit(do_not_specialize=["num_grads"])
def _backward(
    grads, packed, grad_packed, num_grads, num_blocks, B: tl.constexpr, TILE: tl.constexpr, TERMS: tl.constexpr
):
    """∂L/∂packed; ``grads`` are ``num_grads`` partial sums of ∂L/∂Δ, which are added up in order to G.

    One product a term, with N = Qᵀ = −Q and halves ``Hⱼ = (G + (−1)ʲGᵀ)/2``, as derived in oftv2/_cayley_ops.py:
    ``Z ← H₍ₖ₊₁₎;  for j = k … 1:  Z ← NZ + (−1)ʲ(NZ)ᵀ/j + 2Hⱼ``.
    """
    first = tl.program_id(0) * (TILE // B)
    G = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(num_grads):
        G += load_blocks(grads, (B * B, B, 1), first, num_blocks, 0, B, TILE, TILE)
        grads += num_blocks * (B * B)
    N = -load_skew(packed, first, num_blocks, B, TILE)
    Z = 0.5 * (G - tl.trans(G)) if TERMS % 2 == 0 else 0.5 * (G + tl.trans(G))
    for step in tl.static_range(TERMS - 1):
        NZ = exact_dot(N, Z)
        turned = tl.trans(G + NZ * (1.0 / (TERMS - step)))
        Z = G + NZ + turned if (TERMS - step) % 2 == 0 else G + NZ - turned
    Y = G + exact_dot(N, Z)
    block, row, column, inside = tile_positions(first, num_blocks, 0, B, TILE, TILE)
    index = block * (B * (B - 1) // 2) + row * (2 * B - row - 1) // 2 + (column - row - 1)
    tl.store(grad_packed + index, 2.0 * (Y - tl.trans(Y)), mask=inside & (row < column))


@triton.jit
def _product(products, delta, strides, out, num_blocks, B: tl.constexpr, TILE: tl.constexpr):
    """``G R⁻ᵀ``, with R⁻¹ by Newton's iteration ``X ← X(2I − RX)``, which squares the error ``I − RX`` of each block.

    It starts at Rᵀ, which is all but the inverse; at ``Rᵀ / (‖R‖₁‖R‖∞)``, which always converges, where R is far from
    orthogonal. NaN ends it.
    """
    first = tl.program_id(0) * (TILE // B)
    diagonal = tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :]
    identity = tl.where(diagonal, 1.0, 0.0)
    R = load_blocks(delta, strides, first, num_blocks, 0, B, TILE, TILE) + identity
    X = tl.trans(R)
    residual = identity - exact_dot(R, X)
    error = B * tl.max(tl.max(tl.abs(residual), axis=1), axis=0)  # bounds the norm of any block's residual
    if error > 0.5:
        X = X / (tl.max(tl.sum(tl.abs(R), axis=0), axis=0) * tl.max(tl.sum(tl.abs(R), axis=1), axis=0))
        residual = identity - exact_dot(R, X)
    step = 0
    while (error > 1e-4) & (step < 40):
        X += exact_dot(X, residual)
        residual = identity - exact_dot(R, X)
        error = B * tl.max(tl.max(tl.abs(residual), axis=1), axis=0)
        step += 1
    X += exact_dot(X, residual)
    G = load_blocks(products, (B * B, B, 1), first, num_blocks, 0, B, TILE, TILE)
    store_blocks(out, exact_dot(G, tl.trans(X)), first, num_blocks, 0, B, TILE, TILE)


@functools.lru_cache(maxsize=256)
def _launch(block_size: int, num_blocks: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the constants of both kernels."""
    tile = tile_size(block_size)
    return (cdiv(num_blocks, tile // block_size),), {"B": block_size, "TILE": tile, "num_warps": 4}


def supports(dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernels take this."""
    return dtype == torch.float32 and block_size <= MAX_BLOCK_SIZE


def cayley_neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    """Δ of ``(r, b, b)`` from float32 generators ``(r, b(b−1)/2)``."""
    num_blocks = generators.shape[0]
    delta = generators.new_empty(num_blocks, block_size, block_size)
    if num_blocks:
        grid, constants = _launch(block_size, num_blocks)
        run(_forward, grid, generators.contiguous(), delta, num_blocks, TERMS=terms, **constants)
    return delta


def cayley_neumann_backward(grads: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    """∂L/∂generators of ``(r, b(b−1)/2)`` from ∂L/∂Δ: ``(r, b, b)``, or partial sums of it, ``(splits, r, b, b)``."""
    num_blocks = generators.shape[0]
    grad = torch.empty_like(generators, memory_format=torch.contiguous_format)
    if num_blocks:
        grid, constants = _launch(block_size, num_blocks)
        splits = grads.shape[0] if grads.dim() == 4 else 1
        upstream, packed = grads.contiguous(), generators.contiguous()
        run(_backward, grid, upstream, packed, grad, splits, num_blocks, TERMS=terms, **constants)
    return grad


def times_inverse_transposed(products: Tensor, delta: Tensor) -> Tensor:
    """``G (I + Δ)⁻ᵀ`` of ``(r, b, b)``, float32, for Δ in any layout; no host synchronization."""
    num_blocks, block_size, _ = delta.shape
    out = products.new_empty(products.shape)
    if num_blocks:
        grid, constants = _launch(block_size, num_blocks)
        run(_product, grid, products.contiguous(), delta, delta.stride(), out, num_blocks, **constants)
    return out
