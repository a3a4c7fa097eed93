"""bitsandbytes' 4-bit weights (NF4, FP4), dequantized, and rotated on the way: one pass over memory.

    W = code[nibble] · absmax[block]     W′ = W + WΔᵀ     nested: absmax = code₂[q] · absmax₂[block₂] + offset

Each byte holds two neighbours in row-major order, the first one in its high half; a block of ``blocksize`` neighbours
shares its ``absmax``. W is rounded to the result's type before it is rotated, as bitsandbytes rounds it.

A program owns neighbouring tiles of columns, each with its own Δ, and walks down a share of the rows. The tiles are one
batched product, a warp each: nothing is multiplied by the zeros between them, and rows are read in whole sectors.
Compiled for sm_90 at b = 32 in bfloat16, an element costs a thread 12 instructions (plain dequantization: 8.5), where
reading half a byte and writing two gives an H200 time for about 16. What binds, by the machine code, is shared memory:
tables, W and W′ on their way into the product and out of it take 1.3 times as long as the bytes from and to memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .tiles import Launch, cdiv, multiprocessors, tile_size

# How ``absmax`` is quantized itself ("double quantization"): the 256 levels of ``code₂``, ``absmax₂`` and ``offset``
# (all float32), and how many neighbouring q share an ``absmax₂``, a power of two.
Nested = tuple[Tensor, Tensor, Tensor, int]
# Rows that share one Δ: Δ of b = 32 is then a tenth of what a program reads and writes.
_SHARE = 512


@triton.jit
def lookup(table, index):
    """``table[index]`` by way of shared memory; for 16 values that is 16 banks, where no thread waits for another."""
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)


@triton.jit
def open_weight(weight, BLOCKSIZE2: tl.constexpr):
    """Pointers to packed, absmax, code, code₂, absmax₂, offset; code, code₂ and offset are loaded, once a program."""
    code = tl.load(weight[2] + tl.arange(0, 16))
    if BLOCKSIZE2 == 0:
        return weight[0], weight[1], code, code, weight[1], 0.0
    else:
        levels = tl.load(weight[3] + tl.arange(0, 256))
        return weight[0], weight[1], code, levels, weight[4], tl.load(weight[5])


@triton.jit
def scaling(weight, index, inside, BLOCKSIZE2: tl.constexpr, ALIGNED: tl.constexpr):
    """``absmax`` of some blocks, in float32."""
    if BLOCKSIZE2 == 0:
        return tl.load(weight[1] + index, mask=inside, other=0).to(tl.float32)
    else:  # looked up, and not loaded: a load of bytes on the way to a dot gives Triton wrong ideas of its layout
        if ALIGNED:  # a word of four, of which one is wanted: bytes would not be loaded ahead of their iteration
            word = tl.load(weight[1] + (index >> 2), mask=inside, other=0)
            level = lookup(weight[3], (word >> 8 * (index.to(tl.int32) & 3)) & 255)
        else:
            level = lookup(weight[3], tl.load(weight[1] + index, mask=inside, other=0).to(tl.int32))
        return level * tl.load(weight[4] + index // BLOCKSIZE2, mask=inside, other=0.0) + weight[5]


@triton.jit
def unpack(word):
    """The eight nibbles of each little-endian word in order, within a thread's registers: ``[M, N]`` to ``[M, 8N]``."""
    even = tl.join(tl.join(word >> 4, word >> 20), tl.join(word >> 12, word >> 28))
    odd = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))
    return tl.reshape(tl.join(even, odd), (word.shape[0], 8 * word.shape[1])) & 15


@triton.jit
def load_weight(
    weight, row, first, column, inside, n, d, pitch, dtype: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of W, rounded to ``dtype``: ``[ROWS, COLUMNS]``.

    Args:
        weight: from :func:`open_weight`; packed is int32 where ALIGNED, else uint8.
        row: the tile's rows.
        first: its first column, where ALIGNED: the columns then follow each other.
        column, inside: else its columns, and whether they exist.
        pitch: 32-bit words of a row, where ALIGNED.
        ALIGNED: blocks of absmax start with the rows, so that wide loads and one absmax a row and block do.
        EVEN: all columns exist.
    """
    exists = (row < n)[:, None]
    row = row.to(tl.int64)[:, None]
    if ALIGNED:
        BLOCKS: tl.constexpr = COLUMNS // BLOCKSIZE if COLUMNS > BLOCKSIZE else 1
        words = first // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        blocks = first // BLOCKSIZE + tl.arange(0, BLOCKS)[None, :]
        word_exists, block_exists = exists, exists
        if not EVEN:
            word_exists, block_exists = exists & (words < pitch), exists & (blocks < d // BLOCKSIZE)
        nibble = unpack(tl.load(weight[0] + (row * pitch + words), mask=word_exists, other=0))
        scale = scaling(weight, row * (d // BLOCKSIZE) + blocks, block_exists, BLOCKSIZE2, ALIGNED)  # [ROWS, BLOCKS]
        if BLOCKS == 1:
            return (lookup(weight[2], nibble) * scale).to(dtype)
        else:
            value = tl.reshape(lookup(weight[2], nibble), (ROWS, BLOCKS, BLOCKSIZE))
            return tl.reshape((value * scale[:, :, None]).to(dtype), (ROWS, COLUMNS))
    else:
        index = row * d + column[None, :]
        exists = exists & inside[None, :]
        byte = tl.load(weight[0] + (index >> 1), mask=exists, other=0).to(tl.int32)
        nibble = (byte >> (4 - 4 * (index & 1)).to(tl.int32)) & 15
        return (lookup(weight[2], nibble) * scaling(weight, index // BLOCKSIZE, exists, BLOCKSIZE2, ALIGNED)).to(dtype)


@triton.jit
def _columns(first, part, d, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """``WIDTH`` columns of each of ``PARTS`` tiles, and whether they exist: ``[PARTS * WIDTH]``."""
    local = tl.arange(0, PARTS * WIDTH)
    within = part + local % WIDTH
    column = first + local // WIDTH * (TILE // B * B) + within
    return column, (within < TILE // B * B) & (column < d)


@triton.jit
def _dequantize(
    weight, out, n, d, pitch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * COLUMNS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    weight = open_weight(weight, BLOCKSIZE2)
    dtype: tl.constexpr = out.dtype.element_ty
    W = load_weight(weight, row, first, column, column < d, n, d, pitch, dtype, ROWS, COLUMNS, BLOCKSIZE, BLOCKSIZE2,
                    ALIGNED, EVEN)  # fmt: skip
    mask = (row < n)[:, None]
    if not EVEN:
        mask = mask & (column < d)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * d + column[None, :], W, mask=mask)


@triton.jit
def _dequantize_rotate(
    weight, delta, strides, out, n, d, num_blocks, share,
    B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    first_block = tl.program_id(0) // (TILE // WIDTH) * (PARTS * (TILE // B))
    part = tl.program_id(0) % (TILE // WIDTH) * WIDTH
    first = first_block * B
    column, inside = _columns(first, 0, d, B, TILE, TILE, PARTS)
    wanted, exists = _columns(first, part, d, B, TILE, WIDTH, PARTS)
    if ALIGNED:  # the same columns, in a form that the compiler sees to be contiguous
        wanted = first + part + tl.arange(0, PARTS * WIDTH)

    weight = open_weight(weight, BLOCKSIZE2)
    i = tl.arange(0, TILE)[None, :, None]
    j = part + tl.arange(0, WIDTH)[None, None, :]
    block = first_block + tl.arange(0, PARTS)[:, None, None] * (TILE // B) + i // B
    mask = (i // B == j // B) & (i < TILE // B * B) & (block < num_blocks)
    offset = block * strides[0] + j % B * strides[1] + i % B * strides[2]
    turn = tl.load(delta + offset, mask=mask, other=0.0).to(dtype)  # Δᵀ [PARTS, TILE, WIDTH]
    identity = tl.where(i == j + 0 * block, 1.0, 0.0).to(dtype)
    if PARTS == 1:
        turn = tl.reshape(turn, (TILE, WIDTH))

    # Not an argument, so that the compiler loads 8 bytes a thread: with 16, W goes to the product by 2 bytes at a time.
    pitch = d // 8
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, n), ROWS):
        row = start + tl.arange(0, ROWS)
        W = load_weight(weight, row, first, column, inside, n, d, pitch, dtype, ROWS, PARTS * TILE, BLOCKSIZE,
                        BLOCKSIZE2, ALIGNED, EVEN)  # fmt: skip
        if PARTS > 1:
            W = tl.permute(tl.reshape(W, (ROWS, PARTS, TILE)), (1, 0, 2))  # [PARTS, ROWS, TILE]
        if PARTS > 1 and dtype != tl.float32:
            # W·I is exact, and brings W to where the product leaves its sums without a detour through shared memory.
            kept = tl.dot(W, identity)
        elif WIDTH == TILE:
            kept = W.to(tl.float32)
        else:
            kept = load_weight(weight, row, first + part, wanted, exists, n, d, pitch, dtype, ROWS, WIDTH, BLOCKSIZE,
                               BLOCKSIZE2, ALIGNED, EVEN).to(tl.float32)  # fmt: skip
        rotated = (kept + tl.dot(W, turn, input_precision="tf32x3")).to(dtype)
        if PARTS > 1:
            rotated = tl.reshape(tl.permute(rotated, (1, 0, 2)), (ROWS, PARTS * WIDTH))
        stored = (row < n)[:, None]
        if not EVEN:
            stored = stored & exists[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * d + wanted[None, :], rotated, mask=stored)


class Storage(NamedTuple):
    """A 4-bit weight as the kernels take it."""

    tensors: tuple[Tensor, ...]
    pitch: int
    constants: dict[str, int | bool]


def storage(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    d: int,
    blocksize: int,
    nested: Nested | None,
    whole: bool = True,
) -> Storage:
    """Chooses 32-bit words with one ``absmax`` a row and block, or single nibbles: odd layouts, tiles not ``whole``."""
    flat, scales = packed.reshape(-1).view(torch.uint8), absmax.reshape(-1)
    aligned = whole and d % blocksize == 0 and _in_words(flat) and (nested is None or _in_words(scales))
    levels, absmax2, offset, blocksize2 = nested or (absmax, absmax, absmax, 0)  # not looked at where there is none
    if aligned:
        flat, scales = flat.view(torch.int32), scales.view(torch.int32) if nested else scales
    tensors = (flat, scales, code, levels, absmax2, offset)
    return Storage(tensors, d // 8, {"BLOCKSIZE": blocksize, "BLOCKSIZE2": blocksize2, "ALIGNED": aligned})


def _in_words(octets: Tensor) -> bool:
    """Whether bytes can be read as 32-bit words."""
    return octets.storage_offset() % 4 == 0 and octets.numel() % 4 == 0


def supports(dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernel rotates weights of this type in such blocks; registers run out for wide blocks in float32."""
    return tile_size(block_size) <= {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}.get(dtype, 0)


def plan(n: int, d: int, block_size: int, dtype: torch.dtype, aligned: bool, device: torch.device) -> Launch:
    """The launch for a weight of ``(n, d)``: groups of tiles, and shares of the rows."""
    if not supports(dtype, block_size):
        raise ValueError(f"no kernel rotates a 4-bit weight as {dtype} in blocks of {block_size}")
    tile = max(32, tile_size(block_size))
    wide = dtype == torch.float32
    parts = 4 if tile == 32 else 1  # as many as warps: Triton 3.6 has the warps of a smaller batch do the same work
    width = min(tile, 64 if wide else 128)
    rows = 16 if wide or not aligned else {32: 32, 64: 64, 128: 64, 256: 32}[tile]
    step = parts * (tile // block_size) * block_size
    groups = cdiv(d, step) * (tile // width)
    shares = max(cdiv(n, _SHARE), 4 * multiprocessors(device) // groups)
    share = cdiv(cdiv(n, shares), rows) * rows
    even = d % step == 0 and tile % block_size == 0
    constants = {"B": block_size, "TILE": tile, "WIDTH": width, "PARTS": parts, "ROWS": rows, "EVEN": even}
    options = {"num_warps": 4, "num_stages": 3 if aligned else 1}
    return Launch((groups, cdiv(n, share)), share, {**constants, **options})


def dequantize_rotate(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    delta: Tensor | None,
    dtype: torch.dtype,
    *,
    nested: Nested | None = None,
) -> Tensor:
    """``W′ = W + WΔᵀ`` from bitsandbytes' 4-bit storage, or W itself without Δ.

    Args:
        packed: ``n·d / 2`` bytes, of any dtype and shape, contiguous.
        absmax: ``⌈n·d / blocksize⌉`` scales; uint8 if nested.
        code: the 16 values of the format, float32 (``quant_state.code``).
        shape: ``(n, d)``.
        blocksize: a power of two, at least 32.
        delta: Δ of ``(r, b, b)``, float32, in any layout: its transpose gives ``W + WΔ``. See :func:`supports`.
        dtype: of the result: bfloat16, float16 or float32.
        nested: where absmax is quantized itself.
    """
    n, d = shape
    out = torch.empty(n, d, dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    # Without fusion: a fused multiply-add would round absmax = code · absmax₂ + offset once, bitsandbytes rounds twice.
    if delta is None:
        source = storage(packed, absmax, code, d, blocksize, nested)
        grid = (cdiv(d, 256), cdiv(n, 32))
        run(
            _dequantize, grid,
            source.tensors, out, n, d, source.pitch, ROWS=32, COLUMNS=256, EVEN=d % 256 == 0, **source.constants,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        r, b, _ = delta.shape
        source = storage(packed, absmax, code, d, blocksize, nested, whole=tile_size(b) % b == 0)
        launch = plan(n, d, b, dtype, bool(source.constants["ALIGNED"]), packed.device)
        run(
            _dequantize_rotate, launch.grid,
            source.tensors, delta, delta.stride(), out, n, d, r, launch.share,
            **source.constants, **launch.constants, enable_fp_fusion=False,
        )  # fmt: skip
    return out
