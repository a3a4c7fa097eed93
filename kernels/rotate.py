"""Rotation of activations, block by block, and its gradients: one pass over memory each, for one to three rotations.

    x̂_g = x + xΔ_g                    ∂x = Σ_g (ĝ_g + ĝ_gΔ_gᵀ)          ∂L/∂Δ_g = xᵀ ĝ_g, block by block

A program owns a tile of columns and a share of the tokens, so Δ is loaded (or made from the generators) once a program.
Each share leaves a partial sum of ∂Δ, and those are added up afterwards in a fixed order: no atomics, equal bits in
every run. Blocks too wide for one program's registers are cut into parts of ``WIDTH`` columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .tiles import (
    Launch,
    cdiv,
    contiguous_like,
    load_blocks,
    load_part,
    load_rows,
    load_rows_transposed,
    load_skew,
    multiprocessors,
    neumann_delta,
    next_power_of_2,
    rows,
    store_blocks,
    store_rows,
    tile_of,
    tile_size,
)

MAX_GROUP = 3


@triton.jit
def _delta(source, strides, first, num_blocks, part, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
           TERMS: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """Columns of Δ or Δᵀ: read where ``TERMS`` is 0, else made from packed generators. ``[TILE, WIDTH]`` float32"""
    if TERMS == 0:
        if TRANSPOSED:
            strides = (strides[0], strides[2], strides[1])
        return load_blocks(source, strides, first, num_blocks, part, B, TILE, WIDTH)
    else:
        delta = neumann_delta(load_skew(source, first, num_blocks, B, TILE), TERMS)
        return tl.trans(delta) if TRANSPOSED else delta


@triton.jit(do_not_specialize=["T"])
def _forward(
    x, out0, out1, out2, source0, source1, source2, strides,
    T, columns, num_blocks, x_stride, share,
    GROUP: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
    TERMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    first, part, column, inside, wanted, exists = tile_of(tl.program_id(0), columns, B, TILE, WIDTH)
    dtype = x.dtype.element_ty
    delta0 = _delta(source0, strides, first, num_blocks, part, B, TILE, WIDTH, TERMS, False).to(dtype)
    if GROUP > 1:
        delta1 = _delta(source1, strides, first, num_blocks, part, B, TILE, WIDTH, TERMS, False).to(dtype)
    if GROUP > 2:
        delta2 = _delta(source2, strides, first, num_blocks, part, B, TILE, WIDTH, TERMS, False).to(dtype)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, T), BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        tile = load_rows(x, row, column, inside, T, x_stride, EVEN)  # [BLOCK_T, TILE]
        kept = load_part(tile, x, row, wanted, exists, T, x_stride, TILE, WIDTH, EVEN)  # [BLOCK_T, WIDTH]
        rotated = kept + tl.dot(tile, delta0, input_precision="tf32x3")
        store_rows(out0, rotated, row, wanted, exists, T, columns, EVEN)
        if GROUP > 1:
            rotated = kept + tl.dot(tile, delta1, input_precision="tf32x3")
            store_rows(out1, rotated, row, wanted, exists, T, columns, EVEN)
        if GROUP > 2:
            rotated = kept + tl.dot(tile, delta2, input_precision="tf32x3")
            store_rows(out2, rotated, row, wanted, exists, T, columns, EVEN)


@triton.jit
def _backward_part(
    grad, stride, x_tile, delta, row, column, inside, wanted, exists, T,
    WIDTH: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, WITH_X: tl.constexpr,
):  # fmt: skip
    """What one rotation adds to ∂x ``[BLOCK_T, WIDTH]`` and to its ∂Δ ``[TILE, WIDTH]`` for some tokens."""
    part = load_rows(grad, row, wanted, exists, T, stride, EVEN)  # [BLOCK_T, WIDTH]
    grad_x = part.to(tl.float32)
    if WITH_X:
        whole = part if WIDTH == TILE else load_rows(grad, row, column, inside, T, stride, EVEN)  # [BLOCK_T, TILE]
        grad_x += tl.dot(whole, delta, input_precision="tf32x3")
    # Hopper multiplies tiles of 64 and more asynchronously where the sum stays in the product, and Triton loads later
    # tokens into the place of `part`, which is used twice, before the product is sure to have read it. With this limit,
    # which means nothing in 16 bit, the sum is added by itself, after a wait.
    apart: tl.constexpr = 1 if TILE >= 64 else None
    added = tl.dot(x_tile, part, input_precision="tf32x3", max_num_imprecise_acc=apart)
    return grad_x, added


@triton.jit(do_not_specialize=["T"])
def _backward(
    grad0, grad1, grad2, x, grad_x, partial0, partial1, partial2, source0, source1, source2, strides,
    T, columns, num_blocks, grad_stride0, grad_stride1, grad_stride2, x_stride, share,
    GROUP: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
    TERMS: tl.constexpr, EVEN: tl.constexpr, WITH_X: tl.constexpr,
):  # fmt: skip
    first, part, column, inside, wanted, exists = tile_of(tl.program_id(0), columns, B, TILE, WIDTH)
    dtype = grad0.dtype.element_ty
    delta0 = tl.zeros((TILE, WIDTH), dtype)  # Δᵀ
    delta1, delta2 = delta0, delta0
    if WITH_X:
        delta0 = _delta(source0, strides, first, num_blocks, part, B, TILE, WIDTH, TERMS, True).to(dtype)
        if GROUP > 1:
            delta1 = _delta(source1, strides, first, num_blocks, part, B, TILE, WIDTH, TERMS, True).to(dtype)
        if GROUP > 2:
            delta2 = _delta(source2, strides, first, num_blocks, part, B, TILE, WIDTH, TERMS, True).to(dtype)
    sum0 = tl.zeros((TILE, WIDTH), tl.float32)
    sum1, sum2 = sum0, sum0
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, T), BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        x_tile = load_rows_transposed(x, row, column, inside, T, x_stride, EVEN)  # [TILE, BLOCK_T]
        total, added = _backward_part(
            grad0, grad_stride0, x_tile, delta0, row, column, inside, wanted, exists, T,
            WIDTH, TILE, EVEN, WITH_X,
        )  # fmt: skip
        sum0 += added
        if GROUP > 1:
            grad_part, added = _backward_part(
                grad1, grad_stride1, x_tile, delta1, row, column, inside, wanted, exists, T,
                WIDTH, TILE, EVEN, WITH_X,
            )  # fmt: skip
            total += grad_part
            sum1 += added
        if GROUP > 2:
            grad_part, added = _backward_part(
                grad2, grad_stride2, x_tile, delta2, row, column, inside, wanted, exists, T,
                WIDTH, TILE, EVEN, WITH_X,
            )  # fmt: skip
            total += grad_part
            sum2 += added
        if WITH_X:
            store_rows(grad_x, total, row, wanted, exists, T, columns, EVEN)
    offset = tl.program_id(1).to(tl.int64) * num_blocks * (B * B)
    store_blocks(partial0 + offset, sum0, first, num_blocks, part, B, TILE, WIDTH)
    if GROUP > 1:
        store_blocks(partial1 + offset, sum1, first, num_blocks, part, B, TILE, WIDTH)
    if GROUP > 2:
        store_blocks(partial2 + offset, sum2, first, num_blocks, part, B, TILE, WIDTH)


# (WIDTH, BLOCK_T, warps, stages) by tile. Chosen from the compiler's reports: no registers spilled, at most 96 KiB of
# shared memory (benchmarks/kernel_resources.py); not timed on a device yet.
_FORWARD_16_BIT = {
    16: (16, 256, 4, 3),
    32: (32, 128, 4, 3),
    64: (64, 64, 4, 3),
    128: (128, 64, 8, 2),
    256: (64, 32, 8, 2),
}
_BACKWARD_16_BIT = {
    16: (16, 128, 4, 3),
    32: (32, 64, 4, 3),
    64: (64, 32, 4, 3),
    128: (64, 32, 8, 2),
    256: (64, 16, 8, 2),
}
_FORWARD_32_BIT = {16: (16, 128, 4, 2), 32: (32, 64, 4, 2), 64: (64, 32, 4, 2)}
_BACKWARD_32_BIT = {16: (16, 32, 4, 3), 32: (32, 32, 4, 2), 64: (32, 32, 4, 2)}
_PROGRAMS_PER_MULTIPROCESSOR = {16: 8, 32: 4, 64: 4, 128: 2, 256: 2}


def supports(dtype: torch.dtype, block_size: int, *, group: int = 1, terms: int = 0) -> bool:
    """Whether the kernels take this; registers run out for wide blocks in float32, several, or made on the way."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or group > MAX_GROUP:
        return False
    wide = dtype == torch.float32
    return tile_size(block_size) <= (32 if terms else 64 if wide or group > 1 else 256) and not (wide and group > 1)


def tiling(
    dtype: torch.dtype, tokens: int, num_blocks: int, block_size: int, terms: int, *, group: int, backward: bool
) -> tuple[int, dict[str, int | bool]]:
    """How many column tiles cover the blocks, and the constants and options of a kernel over ``tokens`` of them."""
    if not supports(dtype, block_size, group=group, terms=terms):
        raise ValueError(f"no kernel rotates {dtype} in blocks of {block_size}, group={group}, terms={terms}")
    tile = tile_size(block_size)
    if dtype.itemsize == 4:
        table = _BACKWARD_32_BIT if backward else _FORWARD_32_BIT
    else:
        table = _BACKWARD_16_BIT if backward else _FORWARD_16_BIT
    width, block_t, warps, stages = table[tile]
    if group > 1 and backward:
        width = min(width, 32)  # several sums of ∂Δ stay in registers
    block_t = min(block_t, max(16, next_power_of_2(tokens)))
    even = tile % block_size == 0 and num_blocks % (tile // block_size) == 0
    constants = {"B": block_size, "TILE": tile, "WIDTH": width, "BLOCK_T": block_t, "EVEN": even}
    options = {"num_warps": warps, "num_stages": stages}
    return cdiv(num_blocks, tile // block_size) * (tile // width), {**constants, **options}


def share_of(tokens: int, tiles: int, constants: dict[str, int | bool], processors: int) -> int:
    """How many tokens a program takes, where ``tiles`` programs take the same tokens: enough to keep so many
    multiprocessors busy."""
    shares = cdiv(processors * _PROGRAMS_PER_MULTIPROCESSOR[constants["TILE"]], tiles)
    return cdiv(cdiv(tokens, shares), constants["BLOCK_T"]) * constants["BLOCK_T"]


def plan(x: Tensor, tokens: int, num_blocks: int, block_size: int, terms: int, *, group: int, backward: bool) -> Launch:
    """The launch for ``tokens`` rows of ``x``: column tiles, and shares of the tokens."""
    return _plan(x.dtype, tokens, num_blocks, block_size, terms, group, backward, multiprocessors(x.device))


@functools.lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype, tokens: int, num_blocks: int, block_size: int, terms: int, group: int, backward: bool,
    processors: int,
) -> Launch:  # fmt: skip
    tiles, constants = tiling(dtype, tokens, num_blocks, block_size, terms, group=group, backward=backward)
    share = share_of(tokens, tiles, constants, processors)
    return Launch((tiles, cdiv(tokens, share)), share, {"GROUP": group, "TERMS": terms, **constants})


def _three(values: Sequence[Any]) -> Sequence[Any]:
    """Fills the kernels' three places up; those beyond the group are not looked at."""
    return [*values, *[None] * (MAX_GROUP - len(values))]


def _sources(sources: Sequence[Tensor], terms: int) -> tuple[list[Tensor], tuple[int, ...], int]:
    """The sources in one layout, the strides of Δ, and the number of blocks."""
    if terms or any(source.stride() != sources[0].stride() for source in sources):
        sources = [source.contiguous() for source in sources]
    strides = (0, 0, 0) if terms else sources[0].stride()
    return list(sources), strides, sources[0].shape[0]


def rotate(x: Tensor, sources: Sequence[Tensor], block_size: int, terms: int = 0) -> list[Tensor]:
    """``x`` rotated in one to three ways.

    Args:
        x: ``(..., d)``, bfloat16, float16 or float32.
        sources: Δ of ``(r, b, b)`` in any layout (transposed, expanded), or with ``terms`` packed generators.
        block_size: ``b``; see :func:`supports`.
        terms: Neumann terms ``k`` for packed generators ``(r, b(b−1)/2)``; 0 where the sources are Δ.

    Returns:
        One ``(..., d)`` for each source, contiguous.
    """
    outs = [contiguous_like(x) for _ in sources]
    if x.numel():
        flat, tokens, stride = rows(x)
        given, strides, num_blocks = _sources(sources, terms)
        launch = plan(x, tokens, num_blocks, block_size, terms, group=len(given), backward=False)
        run(
            _forward, launch.grid,
            flat, *_three(outs), *_three(given), strides,
            tokens, x.shape[-1], num_blocks, stride, launch.share, **launch.constants,
        )  # fmt: skip
    return outs


def rotate_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    sources: Sequence[Tensor],
    block_size: int,
    terms: int = 0,
    *,
    with_x: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of :func:`rotate`: ``∂x``, and partial sums of each ∂Δ, ``(shares, r, b, b)`` float32."""
    given, strides, num_blocks = _sources(sources, terms)
    grad_x = contiguous_like(x) if with_x else None
    shape = (num_blocks, block_size, block_size)
    if not x.numel():
        return grad_x, [torch.zeros(1, *shape, dtype=torch.float32, device=x.device) for _ in grads]
    flats, _, grad_strides = zip(*map(rows, grads), strict=True)
    flat, tokens, stride = rows(x)
    launch = plan(x, tokens, num_blocks, block_size, terms, group=len(grads), backward=True)
    partials = [torch.empty(launch.grid[1], *shape, dtype=torch.float32, device=x.device) for _ in grads]
    run(
        _backward, launch.grid,
        *_three(flats), flat, flat if grad_x is None else grad_x, *_three(partials), *_three(given),
        strides, tokens, x.shape[-1], num_blocks, *_three(grad_strides), stride,
        launch.share, WITH_X=with_x, **launch.constants,
    )  # fmt: skip
    return grad_x, partials
