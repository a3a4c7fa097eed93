"""Rotation of each row of a batch by its own Δ, and the gradient of the several Δ.

    x̂ᵢ = xᵢ + xᵢ Δ[rowsᵢ], or xᵢ where rowsᵢ < 0          ∂L/∂Δₐ = Σ xᵢᵀ ĝᵢ over the rows i of a, block by block

Forward, a program owns a tile of columns of one row of the batch and a share of its tokens; programs of the same
columns are neighbours, so that rows which share a Δ find it in the cache. The gradient of x is the same kernel on Δᵀ.
For the gradient of Δ a program owns a tile of one Δ and goes through the rows that use it, in order: no atomics, equal
bits in every run, and nothing is kept for each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .rotate import share_of, tiling
from .tiles import (
    cdiv,
    load_blocks,
    load_part,
    load_rows,
    load_rows_transposed,
    multiprocessors,
    store_blocks,
    store_rows,
    tile_of,
)


@triton.jit(do_not_specialize=["T"])
def _forward(
    x, out, deltas, rows, strides, T, columns, num_blocks, x_row_stride, x_stride, share,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    first, part, column, inside, wanted, exists = tile_of(tl.program_id(1), columns, B, TILE, WIDTH)
    x += index * x_row_stride
    out += index * T * columns
    adapter = tl.load(rows + index).to(tl.int64)
    delta = tl.zeros((TILE, WIDTH), tl.float32)
    if adapter >= 0:
        block_strides = (strides[1], strides[2], strides[3])
        delta = load_blocks(deltas + adapter * strides[0], block_strides, first, num_blocks, part, B, TILE, WIDTH)
    delta = delta.to(x.dtype.element_ty)
    begin = tl.program_id(2) * share
    for start in range(begin, tl.minimum(begin + share, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        tile = load_rows(x, token, column, inside, T, x_stride, EVEN)  # [BLOCK_T, TILE]
        kept = load_part(tile, x, token, wanted, exists, T, x_stride, TILE, WIDTH, EVEN)  # [BLOCK_T, WIDTH]
        rotated = kept + tl.dot(tile, delta, input_precision="tf32x3")
        rotated = tl.where(adapter < 0, kept, rotated)  # infinities times zero are no zeros
        store_rows(out, rotated, token, wanted, exists, T, columns, EVEN)


@triton.jit(do_not_specialize=["num_rows", "T"])
def _delta_grad(
    grad, x, partial, rows,
    num_rows, T, columns, num_blocks, grad_row_stride, grad_stride, x_row_stride, x_stride, share,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(0)
    first, part, column, inside, wanted, exists = tile_of(tl.program_id(1), columns, B, TILE, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, T)
    for index in range(num_rows):
        if tl.load(rows + index) == adapter:
            for start in range(begin, end, BLOCK_T):
                token = start + tl.arange(0, BLOCK_T)
                tile = load_rows_transposed(x, token, column, inside, T, x_stride, EVEN)  # [TILE, BLOCK_T]
                upstream = load_rows(grad, token, wanted, exists, T, grad_stride, EVEN)  # [BLOCK_T, WIDTH]
                total += tl.dot(tile, upstream, input_precision="tf32x3")
        x += x_row_stride
        grad += grad_row_stride
    offset = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + adapter) * num_blocks * (B * B)
    store_blocks(partial + offset, total, first, num_blocks, part, B, TILE, WIDTH)


def _batch(x: Tensor) -> Tensor:
    """``(B, ..., d)`` as ``(B, T, d)`` with neighbouring columns, a view wherever that is possible."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return flat if flat.stride(2) == 1 else flat.contiguous()


def rotate_rows(x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    """Each row of ``x`` rotated by its own Δ.

    Args:
        x: ``(B, ..., d)``, bfloat16, float16 or float32.
        deltas: ``(A, r, b, b)`` in any layout (transposed, expanded); see :func:`oftv2.kernels.rotate.supports`.
        rows: ``(B,)``, int32 or int64, each below ``A``; negative ones leave their row as it is.

    Returns:
        ``(B, ..., d)``, contiguous.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        batch, (num_blocks, block_size) = _batch(x), deltas.shape[1:3]
        num_rows, tokens, columns = batch.shape
        tiles, constants = tiling(x.dtype, tokens, num_blocks, block_size, 0, group=1, backward=False)
        share = share_of(tokens, tiles * num_rows, constants, multiprocessors(x.device))
        run(
            _forward, (num_rows, tiles, cdiv(tokens, share)),
            batch, out, deltas, rows.contiguous(), deltas.stride(),
            tokens, columns, num_blocks, *batch.stride()[:2], share, **constants,
        )  # fmt: skip
    return out


def rotate_rows_delta_grad(grad: Tensor, x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    """Gradient of :func:`rotate_rows` with respect to ``deltas``: partial sums ``(shares, A, r, b, b)`` in float32."""
    if not x.numel():
        return torch.zeros(1, *deltas.shape, dtype=torch.float32, device=x.device)
    upstream, batch, (num_deltas, num_blocks, block_size) = _batch(grad), _batch(x), deltas.shape[:3]
    num_rows, tokens, columns = batch.shape
    tiles, constants = tiling(x.dtype, tokens, num_blocks, block_size, 0, group=1, backward=True)
    share = share_of(tokens, tiles * num_deltas, constants, multiprocessors(x.device))
    grid = (num_deltas, tiles, cdiv(tokens, share))
    partials = torch.empty(grid[2], *deltas.shape, dtype=torch.float32, device=x.device)
    run(
        _delta_grad, grid,
        upstream, batch, partials, rows.contiguous(), num_rows, tokens, columns, num_blocks,
        *upstream.stride()[:2], *batch.stride()[:2], share, **constants,
    )  # fmt: skip
    return partials
