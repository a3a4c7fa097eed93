"""Rotation of segments of rows, each by its own Δ, and the gradient of the several Δ: the tokens of experts.

    x̂ᵢ = xᵢ + xᵢ Δₑ          ∂L/∂Δₑ = Σ xᵢᵀ ĝᵢ over the rows i of segment e, block by block

A segment's ends are read on the device, and its programs share its rows evenly, however many there are. With an order,
rows are fetched from where the tokens lie, so that no sorted copy of them is written. No atomics: runs give equal bits.
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
    rows,
    store_blocks,
    store_rows,
    tile_of,
)


@triton.jit
def _share(ends, segment, BLOCK_T: tl.constexpr):
    """The rows of a segment that this program takes, from one to before another."""
    begin = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    end = tl.load(ends + segment)
    share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), BLOCK_T) * BLOCK_T
    begin += tl.program_id(2) * share
    return begin, tl.minimum(begin + share, end)


@triton.jit
def _tokens(order, row, end, num_tokens, times, ORDERED: tl.constexpr):
    """Where rows lie in ``x``, and from where on they do not exist: from ``end`` on they are put beyond ``x``."""
    if ORDERED:
        token = tl.load(order + row, mask=row < end, other=0).to(tl.int32) // times  # divides in 32 bit
        return tl.where(row < end, token, num_tokens), num_tokens
    else:
        return row, end


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    x, out, deltas, ends, order, strides, num_tokens, times, columns, num_blocks, x_stride, ORDERED: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    first, part, column, inside, wanted, exists = tile_of(tl.program_id(1), columns, B, TILE, WIDTH)
    block_strides = (strides[1], strides[2], strides[3])
    own = deltas + segment.to(tl.int64) * strides[0]
    delta = load_blocks(own, block_strides, first, num_blocks, part, B, TILE, WIDTH).to(x.dtype.element_ty)
    begin, end = _share(ends, segment, BLOCK_T)
    for start in range(begin, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        token, limit = _tokens(order, row, end, num_tokens, times, ORDERED)
        tile = load_rows(x, token, column, inside, limit, x_stride, EVEN)  # [BLOCK_T, TILE]
        kept = load_part(tile, x, token, wanted, exists, limit, x_stride, TILE, WIDTH, EVEN)  # [BLOCK_T, WIDTH]
        rotated = kept + tl.dot(tile, delta, input_precision="tf32x3")
        store_rows(out, rotated, row, wanted, exists, end, columns, EVEN)


@triton.jit(do_not_specialize=["num_tokens"])
def _delta_grad(
    grad, x, partial, ends, order, num_tokens, times, columns, num_blocks, grad_stride, x_stride, ORDERED: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    first, part, column, inside, wanted, exists = tile_of(tl.program_id(1), columns, B, TILE, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    begin, end = _share(ends, segment, BLOCK_T)
    for start in range(begin, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        token, limit = _tokens(order, row, end, num_tokens, times, ORDERED)
        tile = load_rows_transposed(x, token, column, inside, limit, x_stride, EVEN)  # [TILE, BLOCK_T]
        upstream = load_rows(grad, row, wanted, exists, end, grad_stride, EVEN)  # [BLOCK_T, WIDTH]
        total += tl.dot(tile, upstream, input_precision="tf32x3")
    offset = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + segment) * num_blocks * (B * B)
    store_blocks(partial + offset, total, first, num_blocks, part, B, TILE, WIDTH)


def _launch(
    x: Tensor, count: int, deltas: Tensor, *, backward: bool
) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """Grid and constants for ``count`` rows; segments are taken to be of one length, and any will do."""
    segments, num_blocks, block_size = deltas.shape[:3]
    average = cdiv(count, segments)
    tiles, constants = tiling(x.dtype, average, num_blocks, block_size, 0, group=1, backward=backward)
    return (
        segments,
        tiles,
        cdiv(average, share_of(average, tiles * segments, constants, multiprocessors(x.device))),
    ), constants


def rotate_segments(x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None, times: int = 1) -> Tensor:
    """Each segment of rows rotated by its own Δ.

    Args:
        x: ``(S, d)``, or with an order ``(S / times, d)``; bfloat16, float16 or float32.
        deltas: ``(E, r, b, b)`` in any layout (transposed, expanded); see :func:`oftv2.kernels.rotate.supports`.
        ends: ``(E,)``, int32, rising to ``S``: where each segment ends.
        order: ``(S,)``, int64: row ``i`` is the row ``order[i] // times`` of ``x``.

    Returns:
        ``(S, d)``, contiguous.
    """
    (flat, tokens, stride), count = rows(x), len(x) if order is None else len(order)
    out = torch.empty(count, x.shape[1], dtype=x.dtype, device=x.device)
    if out.numel():
        grid, constants = _launch(x, count, deltas, backward=False)
        if order is not None:
            constants["num_stages"] = 2  # with more, registers for addresses ahead spill on sm_100
        run(
            _forward, grid,
            flat, out, deltas, ends.contiguous(), ends if order is None else order.contiguous(), deltas.stride(),
            tokens, times, x.shape[1], deltas.shape[1], stride, order is not None, **constants,
        )  # fmt: skip
    return out


def rotate_segments_delta_grad(
    grad: Tensor, x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None, times: int = 1
) -> Tensor:
    """Gradient of :func:`rotate_segments` with respect to ``deltas``: partial sums ``(shares, E, r, b, b)``."""
    if not grad.numel():
        return torch.zeros(1, *deltas.shape, dtype=torch.float32, device=x.device)
    (upstream, _, grad_stride), (flat, tokens, stride) = rows(grad), rows(x)
    grid, constants = _launch(x, len(grad), deltas, backward=True)
    partials = torch.empty(grid[2], *deltas.shape, dtype=torch.float32, device=x.device)
    run(
        _delta_grad, grid,
        upstream, flat, partials, ends.contiguous(), ends if order is None else order.contiguous(), tokens,
        times, x.shape[1], deltas.shape[1], grad_stride, stride, order is not None, **constants,
    )  # fmt: skip
    return partials
