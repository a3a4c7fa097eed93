"""The product with a 4-bit weight for a few tokens (decoding): W is dequantized in registers and never written.

    y = x̂ Wᵀ + bias          x̂ = x + xΔ, rounded once

Each weight is read once, by the program that owns its row. The program's warps share the columns out among themselves,
each with a sum of its own, and those sums are added in order at the end: no atomics, equal bits in every run.

x̂ comes from a launch of its own. A program of 16 rows reads 8·d bytes of W; to rotate x by itself it would read 4·b·d
bytes of Δ, 16 times as much at b = 32, and the 32·b rows that would hide Δ behind W leave too few programs for a GPU.
Rotated once, Δ is 8·b / n of W's bytes (6 % at b = 32, n = 4096), and x̂ costs each program 2·T·d from the L2 cache.

One token in 16 bits needs no tensor cores: W is multiplied where it is dequantized, by fused multiply-adds in float32,
and each 32 products are scaled once. Nothing but the look-up goes through shared memory, and W is not rounded to the
dtype of x, which other products and :func:`oftv2.kernels.nf4.dequantize_rotate` do before they multiply.

Memory binds neither. Counted in the machine code for sm_90, in nested storage and in units of the time that W's bytes
take an H200: the tensor cores' kernel takes shared memory 4.6 (W and 16 tokens on their way into the product; 1.3 are
look-ups) and the schedulers 2.6; the one of one token takes each 1.7. Two tokens in its way would take 2.1, four 3.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .nf4 import Nested, load_weight, lookup, open_weight, scaling, storage, unpack
from .rotate import rotate
from .tiles import cdiv, rows

# Chosen by counting, for sm_80 and sm_90 with Triton 3.6, and not timed on a device: with 8 rows a value of x is read
# and converted for as many weights, in 80 registers; 16 rows take all 255. 2048 divides most usual widths.
_ONE_TOKEN = {"ROWS": 8, "COLUMNS": 2048, "num_warps": 2, "num_stages": 1}


@triton.jit
def _matmul_one_token(
    x, weight, bias, y, n, d, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # A unit is 32 weights, 16 bytes. In tensors of two axes, neighbouring lanes get neighbouring units and a thread the
    # same unit of each row, so that W, its scale and x are loaded where they are multiplied. Of three axes,
    # Triton 3.6 and 3.9 spread different ones over the lanes, and W would go through shared memory.
    UNITS: tl.constexpr = COLUMNS // 32
    each = tl.arange(0, ROWS * UNITS)
    # Rows past the last one repeat it, and are not stored.
    line = tl.minimum(tl.program_id(0) * ROWS + each // UNITS, n - 1).to(tl.int64)
    quarter = tl.arange(0, 4 * UNITS)
    local = (quarter % UNITS * 32 + quarter // UNITS * 8)[:, None] + tl.arange(0, 8)[None, :]
    weight = open_weight(weight, BLOCKSIZE2)
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + each % UNITS * 32
        inside = tl.full(column.shape, True, tl.int1) if EVEN else column < d
        words = (line * pitch + column // 8)[:, None] + tl.arange(0, 4)[None, :]
        packed = tl.load(weight[0] + words, mask=inside[:, None], other=0)
        scale = scaling(weight, line * (d // BLOCKSIZE) + column // BLOCKSIZE, inside, BLOCKSIZE2, ALIGNED)
        W = tl.reshape(lookup(weight[2], unpack(packed)), (ROWS, UNITS, 32))
        known = None if EVEN else first + local < d
        part = tl.load(x + first + local, mask=known, other=None if EVEN else 0.0).to(tl.float32)
        part = tl.reshape(tl.permute(tl.reshape(part, (4, UNITS, 8)), (1, 0, 2)), (1, UNITS, 32))
        total += tl.sum(W * part, 2) * tl.reshape(scale, (ROWS, UNITS))
    result = tl.sum(total, 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < n)


@triton.jit(do_not_specialize=["T"])
def _matmul(
    x, weight, bias, y, T, n, d, pitch, x_stride,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    local = tl.arange(0, WARPS)[:, None] * (COLUMNS // WARPS) + tl.arange(0, COLUMNS // WARPS)[None, :]
    tokens = x + token.to(tl.int64)[None, :, None] * x_stride
    mask = (token < T)[None, :, None]
    dtype: tl.constexpr = x.dtype.element_ty
    weight = open_weight(weight, BLOCKSIZE2)
    total = tl.zeros((WARPS, BLOCK_T, ROWS), tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        W = load_weight(weight, row, first, column, column < d, n, d, pitch, dtype, ROWS, COLUMNS, BLOCKSIZE,
                        BLOCKSIZE2, ALIGNED, EVEN)  # fmt: skip
        W = tl.permute(tl.reshape(W, (ROWS, WARPS, COLUMNS // WARPS)), (1, 2, 0))  # [WARPS, COLUMNS / WARPS, ROWS]
        inside = mask if EVEN else mask & (first + local < d)[:, None, :]
        part = tl.load(
            tokens + (first + local)[:, None, :], mask=inside, other=0.0
        )  # [WARPS, BLOCK_T, COLUMNS / WARPS]
        total = tl.dot(part, W, total, input_precision="tf32x3")
    result = tl.sum(total, 0)  # [BLOCK_T, ROWS]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
    stored = (token < T)[:, None] & (row < n)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * n + row[None, :], result.to(dtype), mask=stored)


def rotate_matmul_4bit(
    x: Tensor,
    delta: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    *,
    nested: Nested | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = (x + xΔ) Wᵀ + bias``, meant for up to 16 tokens: each 16 more read all of W again.

    Args:
        x: ``(..., d)``, bfloat16, float16 or float32, which W is rounded to (but for one token in 16 bits).
        delta: Δ of ``(r, b, b)``, float32, in any layout that :func:`oftv2.kernels.rotate.rotate` takes; None where x
            is not to be rotated.
        packed, absmax, code, shape, blocksize, nested: W, see :func:`oftv2.kernels.nf4.dequantize_rotate`.
        bias: ``(n,)``.

    Returns:
        ``(..., n)`` in the dtype of ``x``.
    """
    n, d = shape
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if delta is not None:
        (x,) = rotate(x, [delta], delta.shape[-1])
    flat, T, stride = rows(x)
    source = storage(packed, absmax, code, d, blocksize, nested)
    biases = y if bias is None else bias
    # Fused multiply-adds round its scales once, where bitsandbytes rounds twice: the last bit of a float32.
    if T == 1 and source.constants["ALIGNED"] and x.element_size() == 2:
        run(
            _matmul_one_token, (cdiv(n, _ONE_TOKEN["ROWS"]),),
            flat, source.tensors, biases, y, n, d, source.pitch, HAS_BIAS=bias is not None,
            EVEN=d % _ONE_TOKEN["COLUMNS"] == 0, **source.constants, **_ONE_TOKEN,
        )  # fmt: skip
        return y
    # 16 rows keep many programs in flight; from 8 tokens on x̂ is read more than W, and twice the rows halve that.
    block_rows = 16 if T < 8 else 32
    warps, columns = (8, 512) if source.constants["ALIGNED"] and x.element_size() == 2 else (4, 128)
    grid = (cdiv(n, block_rows), cdiv(T, 16))
    run(
        _matmul, grid,
        flat, source.tensors, biases, y, T, n, d, source.pitch, stride,
        BLOCK_T=16, ROWS=block_rows, COLUMNS=columns, WARPS=warps, HAS_BIAS=bias is not None,
        EVEN=d % columns == 0, **source.constants, num_warps=warps,
        num_stages=3 if source.constants["ALIGNED"] else 1, enable_fp_fusion=False,
    )  # fmt: skip
    return y
