"""Rotation of each row of a batch, or of each segment of rows, by its own Δ, and the gradient of the several Δ.

    x̂ᵢ = xᵢ + xᵢ Δ[rowsᵢ], or xᵢ where rowsᵢ < 0          ∂L/∂Δₐ = Σ xᵢᵀ ĝᵢ over the rows i of a, block by block

Forward, a program owns a tile of columns of one row of the batch and a share of its tokens; programs of the same
columns are neighbours, so that rows which share a Δ find it in the cache. The gradient of x is the same kernel on Δᵀ.
For the gradient of Δ a program owns a tile of one Δ and goes through the rows that use it, in order: no atomics, equal
bits in every run, and nothing is kept for each row.

Segments (of a mixture of experts) are rows of different lengths, whose ends are read on the device: segment e has the
tokens from ``ends[e − 1]`` to ``ends[e]`` and the e-th Δ. Its programs share its tokens evenly, however many it has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rotate import share_of, tiling
from .tiles import load_blocks, load_rows, on_device, store_blocks, store_rows, tile_columns


@triton.jit
def _segment(ends, index, BLOCK_T: tl.constexpr):
    """Where a segment begins, how many tokens it has, and how many of them each of its programs takes."""
    begin = tl.load(ends + index - 1, mask=index > 0, other=0).to(tl.int64)
    T = (tl.load(ends + index) - begin).to(tl.int32)
    return begin, T, tl.cdiv(tl.cdiv(T, tl.num_programs(2)), BLOCK_T) * BLOCK_T


@triton.jit
def _forward(
    x, out, deltas, rows, strides, T, columns, num_blocks, x_row_stride, x_stride, share, SEGMENTS: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) // (TILE // WIDTH) * (TILE // B)
    part = tl.program_id(1) % (TILE // WIDTH) * WIDTH
    column, inside = tile_columns(first, 0, columns, B, TILE, TILE)  # [TILE]
    wanted, exists = tile_columns(first, part, columns, B, TILE, WIDTH)  # [WIDTH]
    if SEGMENTS:
        adapter = index
        start_of_row, T, share = _segment(rows, index, BLOCK_T)
        x += start_of_row * x_stride
        out += start_of_row * columns
    else:
        adapter = tl.load(rows + index).to(tl.int64)
        x += index * x_row_stride
        out += index * T * columns
    delta = tl.zeros((TILE, WIDTH), tl.float32)
    if adapter >= 0:
        block_strides = (strides[1], strides[2], strides[3])
        delta = load_blocks(deltas + adapter * strides[0], block_strides, first, num_blocks, part, B, TILE, WIDTH)
    delta = delta.to(x.dtype.element_ty)
    begin = tl.program_id(2) * share
    for start in range(begin, tl.minimum(begin + share, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        tile = load_rows(x, token, column, inside, T, x_stride, EVEN)  # [BLOCK_T, TILE]
        if WIDTH == TILE:
            kept = tile.to(tl.float32)
        else:
            kept = load_rows(x, token, wanted, exists, T, x_stride, EVEN).to(tl.float32)  # [BLOCK_T, WIDTH]
        rotated = kept + tl.dot(tile, delta, input_precision="tf32x3")
        rotated = tl.where(adapter < 0, kept, rotated)  # infinities times zero are no zeros
        store_rows(out, rotated, token, wanted, exists, T, columns, EVEN)


@triton.jit
def _added(
    total, grad, x, column, inside, wanted, exists, T, grad_stride, x_stride, share,
    BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``total + xᵀ ĝ`` of this program's share of ``T`` tokens."""
    begin = tl.program_id(2) * share
    for start in range(begin, tl.minimum(begin + share, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        tile = load_rows(x, token, column, inside, T, x_stride, EVEN)  # [BLOCK_T, TILE]
        upstream = load_rows(grad, token, wanted, exists, T, grad_stride, EVEN)  # [BLOCK_T, WIDTH]
        total += tl.dot(tl.trans(tile), upstream, input_precision="tf32x3")
    return total


@triton.jit
def _delta_grad(
    grad, x, partial, rows,
    num_rows, T, columns, num_blocks, grad_row_stride, grad_stride, x_row_stride, x_stride, share,
    SEGMENTS: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(0)
    first = tl.program_id(1) // (TILE // WIDTH) * (TILE // B)
    part = tl.program_id(1) % (TILE // WIDTH) * WIDTH
    column, inside = tile_columns(first, 0, columns, B, TILE, TILE)  # [TILE]
    wanted, exists = tile_columns(first, part, columns, B, TILE, WIDTH)  # [WIDTH]
    total = tl.zeros((TILE, WIDTH), tl.float32)
    if SEGMENTS:
        start, T, share = _segment(rows, adapter, BLOCK_T)
        grad += start * grad_stride
        x += start * x_stride
        total = _added(
            total, grad, x, column, inside, wanted, exists, T, grad_stride, x_stride, share, BLOCK_T, EVEN,
        )  # fmt: skip
    else:
        for index in range(num_rows):
            if tl.load(rows + index) == adapter:
                total = _added(
                    total, grad, x, column, inside, wanted, exists, T, grad_stride, x_stride, share, BLOCK_T, EVEN,
                )  # fmt: skip
            x += x_row_stride
            grad += grad_row_stride
    offset = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + adapter) * num_blocks * (B * B)
    store_blocks(partial + offset, total, first, num_blocks, part, B, TILE, WIDTH)


def _batch(x: Tensor) -> Tensor:
    """``(B, ..., d)`` as ``(B, T, d)`` with neighbouring columns, a view wherever that is possible."""
    flat = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
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
    return _rotated(_batch(x), deltas, rows, segments=False).view(x.shape)


def rotate_rows_delta_grad(grad: Tensor, x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    """Gradient of :func:`rotate_rows` with respect to ``deltas``: partial sums ``(shares, A, r, b, b)`` in float32."""
    return _summed(_batch(grad), _batch(x), deltas, rows, segments=False)


def rotate_segments(x: Tensor, deltas: Tensor, ends: Tensor) -> Tensor:
    """Segments of the rows of ``x`` ``(S, d)``, each rotated by its own Δ of ``(E, r, b, b)``.

    Args:
        x, deltas: as for :func:`rotate_rows`.
        ends: ``(E,)``, int32, rising to ``S``: where each segment ends.

    Returns:
        ``(S, d)``, contiguous.
    """
    return _rotated(_batch(x[None]), deltas, ends, segments=True).view(x.shape)


def rotate_segments_delta_grad(grad: Tensor, x: Tensor, deltas: Tensor, ends: Tensor) -> Tensor:
    """Gradient of :func:`rotate_segments` with respect to ``deltas``: partial sums, as of the rows."""
    return _summed(_batch(grad[None]), _batch(x[None]), deltas, ends, segments=True)


def _rotated(batch: Tensor, deltas: Tensor, index: Tensor, *, segments: bool) -> Tensor:
    """``(B, T, d)`` rotated; with ``segments``, a single row that ``index`` cuts up."""
    out = torch.empty(batch.shape, dtype=batch.dtype, device=batch.device)
    if batch.numel():
        (num_rows, tokens, columns), (num_blocks, block_size) = batch.shape, deltas.shape[1:3]
        if segments:
            num_rows, tokens = len(index), triton.cdiv(tokens, len(index))  # on average
        tiles, constants = tiling(batch.dtype, tokens, num_blocks, block_size, 0, group=1, backward=False)
        share = share_of(tokens, tiles * num_rows, constants, batch.device)
        with on_device(batch):
            _forward[(num_rows, tiles, triton.cdiv(tokens, share))](
                batch, out, deltas, index.contiguous(), deltas.stride(),
                tokens, columns, num_blocks, *batch.stride()[:2], share, segments, **constants,
            )  # fmt: skip
    return out


def _summed(upstream: Tensor, batch: Tensor, deltas: Tensor, index: Tensor, *, segments: bool) -> Tensor:
    """Partial sums of ∂Δ; arguments as for :func:`_rotated`."""
    if not batch.numel():
        return torch.zeros(1, *deltas.shape, dtype=torch.float32, device=batch.device)
    (num_rows, tokens, columns), (num_deltas, num_blocks, block_size) = batch.shape, deltas.shape[:3]
    if segments:
        tokens = triton.cdiv(tokens, num_deltas)
    tiles, constants = tiling(batch.dtype, tokens, num_blocks, block_size, 0, group=1, backward=True)
    share = share_of(tokens, tiles * num_deltas, constants, batch.device)
    grid = (num_deltas, tiles, triton.cdiv(tokens, share))
    partials = torch.empty(grid[2], *deltas.shape, dtype=torch.float32, device=batch.device)
    with on_device(batch):
        _delta_grad[grid](
            upstream, batch, partials, index.contiguous(), num_rows, tokens, columns, num_blocks,
            *upstream.stride()[:2], *batch.stride()[:2], share, segments, **constants,
        )  # fmt: skip
    return partials
