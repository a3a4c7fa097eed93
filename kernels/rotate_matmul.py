"""A linear layer on rotated inputs in one pass: x̂ is made tile by tile on its way into the product, never written.

    y = (x + xΔ) Wᵀ + bias

A program owns a tile of outputs and a share of the columns; each step rotates ``WIDTH`` columns of x and multiplies
them. Where the tiles of outputs are too few for the device, the columns are cut into shares, whose partial sums are
added up afterwards in a fixed order: no atomics, equal bits in every run. x̂ is rounded once, as :mod:`.rotate` does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .tiles import (
    cdiv,
    load_blocks,
    load_rows,
    multiprocessors,
    next_power_of_2,
    rows,
    shared_memory,
    tile_of,
    tile_size,
)


@triton.jit(do_not_specialize=["T", "steps", "share"])
def _matmul(
    x, delta, weight, bias, out, T, columns, outputs, num_blocks, x_stride, weight_stride, steps, share,
    STRIDES: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, WITH_BIAS: tl.constexpr,
):  # fmt: skip
    # STRIDES of Δ are constants so that its loads are 16 bytes wide also where b is no multiple of 16.
    # Programs that run together share tiles of W and x: GROUP tiles of tokens by one tile of outputs, then the next.
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(outputs, BLOCK_N)
    group, inside_group = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
    group_size = tl.minimum(tiles_t - group * GROUP, GROUP)
    token = (group * GROUP + inside_group % group_size) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = inside_group // group_size * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = x.dtype.element_ty
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * share
    for step in range(begin, tl.minimum(begin + share, steps)):
        first, part, column, inside, wanted, exists = tile_of(step, columns, B, TILE, WIDTH)
        x_tile = load_rows(x, token, column, inside, T, x_stride, EVEN)  # [BLOCK_T, TILE]
        d_tile = load_blocks(delta, STRIDES, first, num_blocks, part, B, TILE, WIDTH).to(dtype)  # [TILE, WIDTH]
        w_tile = load_rows(weight, output, wanted, exists, outputs, weight_stride, EVEN)  # [BLOCK_N, WIDTH]
        kept = x_tile if WIDTH == TILE else load_rows(x, token, wanted, exists, T, x_stride, EVEN)  # [BLOCK_T, WIDTH]
        rotated = kept.to(tl.float32) + tl.dot(x_tile, d_tile, input_precision="tf32x3")
        total = tl.dot(rotated.to(dtype), tl.trans(w_tile), total, input_precision="tf32x3")
    if WITH_BIAS:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    out += tl.program_id(1).to(tl.int64) * T * outputs
    target = out + token.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < T)[:, None] & (output < outputs)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _sum(
    partials, bias, out, size, outputs, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr, WITH_BIAS: tl.constexpr
):
    """The partial sums ``(splits, size)`` added up, and the bias; ``SPLITS`` is the next power of two."""
    split = tl.arange(0, SPLITS)[:, None]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(partials + split * size + index[None, :], mask=(split < splits) & (index < size)[None, :], other=0.0)
    total = tl.sum(part, 0)
    if WITH_BIAS:
        total += tl.load(bias + index % outputs, mask=index < size, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < size)


# (BLOCK_T, BLOCK_N, warps, stages) by (bytes an element, TILE). Chosen from the compiler's reports for compute
# capability 8.0, 9.0 and 10.0, with no register spilled in a loop; not timed on a device yet.
#
# Up to 16 tokens, W is read once: n·d·2 bytes in 16 bit. Beside its BLOCK_N·d·2 of them, a program reads b·d·2 bytes of
# Δ and T·d·2 of x from the L2 cache: for b = 32 and one token a quarter as much as of W, for b = 128 half as much. With
# BLOCK_N = 32 the tiles alone would fill the device (n = 4096) and save the second launch, but double what L2 delivers.
# The stages keep 96 KiB of W on the way to each multiprocessor; 4.8 TB/s · 0.8 µs / 132 takes 29.
_FEW_TOKENS = {
    (2, 64): (16, 128, 4, 4),
    (2, 128): (16, 256, 8, 4),
    (2, 256): (16, 256, 8, 3),
    (4, 64): (16, 128, 8, 3),
    (4, 128): (16, 128, 8, 3),
}
_SOME_TOKENS = {
    (2, 64): (64, 128, 8, 3),
    (2, 128): (32, 128, 8, 3),
    (2, 256): (16, 128, 8, 3),
    (4, 64): (32, 128, 8, 3),
    (4, 128): (16, 128, 8, 3),
}
# Each tile of outputs rotates its x anew, WIDTH/BLOCK_N or TILE/BLOCK_N of the product's own operations, so wide tiles.
_MANY_TOKENS = {(2, 64): (128, 256, 8, 3), (2, 128): (64, 256, 8, 3)}
_MAX_SPLITS = 32
_GROUP = 8


def supports(dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernel takes this; it reads block sizes that are no multiple of 8 in narrow, slower loads."""
    known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and (dtype.itemsize, _tile(block_size)) in _FEW_TOKENS


def _tile(block_size: int) -> int:
    return max(64, tile_size(block_size))


@dataclass(frozen=True)
class Launch:
    """How the product is cut into programs: ``(tiles of tokens and outputs, shares of the columns)``."""

    grid: tuple[int, int]
    steps: int
    share: int
    constants: dict[str, int | bool]


def plan(x: Tensor, tokens: int, delta: Tensor, outputs: int) -> Launch:
    """The launch for ``tokens`` rows of ``x``, Δ of ``(r, b, b)`` and ``outputs`` rows of W."""
    sizes = (tokens, delta.shape[0], delta.shape[1], outputs)
    return _plan(x.dtype, delta.element_size(), *sizes, multiprocessors(x.device), shared_memory(x.device))


@functools.lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype, delta_size: int, tokens: int, num_blocks: int, block_size: int, outputs: int, programs: int,
    memory: int,
) -> Launch:  # fmt: skip
    if not supports(dtype, block_size):
        raise ValueError(f"no kernel rotates and multiplies {dtype} in blocks of {block_size}")
    size, tile = dtype.itemsize, _tile(block_size)
    width = 128 // size

    def tiles(block_t: int, block_n: int, *_: int) -> int:
        return cdiv(tokens, block_t) * cdiv(outputs, block_n)

    def stages(block_t: int, block_n: int, *_: int) -> int:
        """How many stages the shared memory takes."""
        x_columns = tile + (width if width < tile else 0)
        return memory // (size * (block_t * x_columns + block_n * width) + delta_size * tile * width)

    chosen = (_FEW_TOKENS if tokens <= 16 else _SOME_TOKENS)[size, tile]
    many = _MANY_TOKENS.get((size, tile))
    if many and tiles(*many) >= programs and stages(*many) >= many[-1]:
        chosen = many
    block_t, block_n, warps, most = chosen
    steps = cdiv(num_blocks, tile // block_size) * (tile // width)
    splits = min(programs * 8 // warps // tiles(*chosen), steps // 4, _MAX_SPLITS)
    share = cdiv(steps, max(1, splits))
    even = tile % block_size == 0 and num_blocks % (tile // block_size) == 0
    constants = {"B": block_size, "TILE": tile, "WIDTH": width, "BLOCK_T": block_t, "BLOCK_N": block_n, "EVEN": even}
    options = {"GROUP": _GROUP, "num_warps": warps, "num_stages": max(2, min(most, stages(*chosen)))}
    return Launch((tiles(*chosen), cdiv(steps, share)), steps, share, {**constants, **options})


def rotate_matmul(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on rotated ``x``.

    Args:
        x: ``(..., d)``, bfloat16, float16 or float32.
        delta: Δ of ``(r, b, b)`` in any layout, in float32 or the dtype of ``x``; see :func:`supports` for ``b``.
        weight: ``(n, d)`` in the dtype of ``x``.
        bias: ``(n,)`` or none.

    Returns:
        y of ``(..., n)``, contiguous.
    """
    outputs = weight.shape[0]
    out = x.new_empty(*x.shape[:-1], outputs)
    if not out.numel():
        return out
    (flat, tokens, stride), (weight, _, weight_stride) = rows(x), rows(weight)
    bias = None if bias is None else bias.contiguous()
    launch = plan(x, tokens, delta, outputs)
    splits, size = launch.grid[1], out.numel()
    whole = splits == 1
    sums = out if whole else torch.empty(splits, size, dtype=torch.float32, device=x.device)
    run(
        _matmul, launch.grid,
        flat, delta, weight, bias if whole else None, sums, tokens, x.shape[-1], outputs,
        delta.shape[0], stride, weight_stride, launch.steps, launch.share,
        STRIDES=delta.stride(), WITH_BIAS=whole and bias is not None, **launch.constants,
    )  # fmt: skip
    if not whole:
        run(
            _sum, (cdiv(size, 256),),
            sums, bias, out, size, outputs, splits,
            SPLITS=next_power_of_2(splits), BLOCK=256, WITH_BIAS=bias is not None,
        )  # fmt: skip
    return out
