"""What the kernels share: Δ of neighbouring blocks as one tile, and what a launch needs to know.

A tile is a square of ``TILE`` = a power of two, at least 16 (tensor cores take no less), that holds ``TILE // B``
neighbouring ``B × B`` blocks on its diagonal and zeros elsewhere, so that any block size is a tile-sized product.

    Δ = 2(Q + … + Qᵏ) + Qᵏ⁺¹          R = I + Δ = (I + Q)(I + Q + … + Qᵏ)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Assumed where there is no CUDA device to ask (the interpreter, compiling ahead): an H100's or H200's.
_DEFAULT_MULTIPROCESSORS = 132
_DEFAULT_SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Launch:
    """How a rotation is cut into programs: tiles of columns by shares of rows, how many rows a share has, and the
    kernel's constants and options."""

    grid: tuple[int, int]
    share: int
    constants: dict[str, int | bool]


# Triton's own of these two, made for kernels too, take 2 µs a call: of 37 µs of Python at a rotation's launch, 15.
def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@triton.jit
def nothing(n):
    """To see whether kernels start."""


def tile_size(block_size: int) -> int:
    """The smallest tile for blocks of ``block_size``."""
    return max(16, next_power_of_2(block_size))


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """How many bytes of shared memory a program may take on a CUDA device."""
    if device.type != "cuda":
        return _DEFAULT_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``(..., d)`` as contiguous rows: a tensor that begins with the first one (``x`` itself, or a view wherever that
    is possible), how many there are, and the distance from one to the next. Of ``d ≥ 1``.
    """
    d = x.shape[-1]
    if x.is_contiguous():  # a kernel needs no view of it, which takes 4 µs to make
        return x, x.numel() // d, d
    flat = x.reshape(-1, d)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, flat.shape[0], flat.stride(0)


def contiguous_like(x: Tensor) -> Tensor:
    """A new tensor of the shape of ``x``; ``x.new_empty(x.shape)`` takes three times as long, and that is 3 µs."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def tile_positions(first_block, num_blocks, first_column, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Block, row and column within the block of the elements of ``WIDTH`` columns of a tile, and whether they exist."""
    i = tl.arange(0, TILE)[:, None]
    j = first_column + tl.arange(0, WIDTH)[None, :]
    block = first_block + i // B + 0 * j
    inside = (i // B == j // B) & (i < TILE // B * B) & (block < num_blocks)
    return block, i % B + 0 * j, j % B + 0 * i, inside


@triton.jit
def tile_columns(first, part, columns, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """``WIDTH`` columns of a tile of blocks: where they are in ``x``, and whether they exist."""
    local = part + tl.arange(0, WIDTH)
    column = first * B + local
    return column, (local < TILE // B * B) & (column < columns)


@triton.jit
def tile_of(program, columns, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """What is a program's: its tile's first block, where its part of the tile begins, the columns of the tile and of
    the part, and whether they exist: ``[TILE]`` twice, ``[WIDTH]`` twice."""
    first = program // (TILE // WIDTH) * (TILE // B)
    part = program % (TILE // WIDTH) * WIDTH
    column, inside = tile_columns(first, 0, columns, B, TILE, TILE)
    wanted, exists = tile_columns(first, part, columns, B, TILE, WIDTH)
    return first, part, column, inside, wanted, exists


@triton.jit
def load_rows(x, row, column, inside, T, stride, EVEN: tl.constexpr):
    """Rows of a matrix at some columns; zero outside. Where all columns exist, loads stay 16 bytes wide."""
    mask = (row < T)[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_part(tile, x, row, wanted, exists, T, stride, TILE: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The part of a loaded tile that is a program's own, in float32; all of it, or loaded once more."""
    if WIDTH == TILE:
        return tile.to(tl.float32)
    else:
        return load_rows(x, row, wanted, exists, T, stride, EVEN).to(tl.float32)


@triton.jit
def load_rows_transposed(x, row, column, inside, T, stride, EVEN: tl.constexpr):
    """:func:`load_rows` as columns, for products that sum over rows: a tile that is transposed only after it was loaded
    goes to shared memory by way of registers, and its loads are waited for in the iteration that issues them."""
    mask = (row < T)[None, :]
    if not EVEN:
        mask = mask & inside[:, None]
    return tl.load(x + row.to(tl.int64)[None, :] * stride + column[:, None], mask=mask, other=0.0)


@triton.jit
def store_rows(out, value, row, column, inside, T, stride, EVEN: tl.constexpr):
    """Writes to where :func:`load_rows` reads."""
    mask = (row < T)[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * stride + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_blocks(
    blocks, strides, first_block, num_blocks, first_column, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """``WIDTH`` columns of a tile of blocks ``(r, B, B)`` with any three strides, float32: ``[TILE, WIDTH]``."""
    block, row, column, inside = tile_positions(first_block, num_blocks, first_column, B, TILE, WIDTH)
    offset = block * strides[0] + row * strides[1] + column * strides[2]
    return tl.load(blocks + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_blocks(
    blocks, tile, first_block, num_blocks, first_column, B: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Writes a tile ``[TILE, WIDTH]`` to contiguous ``(r, B, B)``; what lies between the blocks is dropped."""
    block, row, column, inside = tile_positions(first_block, num_blocks, first_column, B, TILE, WIDTH)
    tl.store(blocks + (block * (B * B) + row * B + column), tile, mask=inside)


@triton.jit
def load_skew(packed, first_block, num_blocks, B: tl.constexpr, TILE: tl.constexpr):
    """``Q`` from the strict upper triangles ``(r, B(B−1)/2)``, row by row: ``[TILE, TILE]`` float32."""
    block, row, column, inside = tile_positions(first_block, num_blocks, 0, B, TILE, TILE)
    low, high = tl.minimum(row, column), tl.maximum(row, column)
    index = block * (B * (B - 1) // 2) + low * (2 * B - low - 1) // 2 + (high - low - 1)
    value = tl.load(packed + index, mask=inside & (row != column), other=0.0)
    return tl.where(row < column, value, -value)


@triton.jit
def exact_dot(a, b):
    """``a · b`` of float32 tiles to float32 precision, on the tensor cores."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def neumann_delta(Q, TERMS: tl.constexpr):
    """Δ of the truncated series, by Horner's scheme ``V ← 2(Q + Q²) + V·Q²``: ``[TILE, TILE]`` float32."""
    P = exact_dot(Q, Q)
    S = 2.0 * (Q + P)
    if TERMS % 2 == 0:
        V = S + exact_dot(P, Q)
    else:
        V = 2.0 * Q + P
    for _ in tl.static_range((TERMS - 1) // 2):
        V = S + exact_dot(V, P)
    return V
