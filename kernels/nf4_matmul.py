"""The product with a 4-bit weight for a few tokens (decoding): W is dequantized in registers and never written.

    y = x̂ Wᵀ + bias          x̂ = x + xΔ, rounded once

Each weight is read once, by the program that owns its row. The program's warps share the columns out among themselves,
each with a sum of its own, and those sums are added in order at the end: no atomics, equal bits in every run.

x̂ comes from a launch of its own. A program of 16 rows reads 8·d bytes of W; to rotate x by itself it would read 4·b·d
bytes of Δ, 16 times as much at b = 32, and the 32·b rows that would hide Δ behind W leave too few programs for a GPU.
Rotated once, Δ is 8·b / n of W's bytes (6 % at b = 32, n = 4096), and x̂ costs each program 2·T·d from the L2 cache.

Memory does not bind it: by the machine code for sm_90, a look-up for each weight takes shared memory 1.3 times as long
as W's bytes take an H200, and with W and 16 tokens on their way into the tensor cores 4 times as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nf4 import load_weight, open_weight, storage
from .rotate import rotate
from .tiles import cdiv, on_device, rows


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
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = (x + xΔ) Wᵀ + bias``, meant for up to 16 tokens: each 16 more read all of W again.

    Args:
        x: ``(..., d)``, bfloat16, float16 or float32, which W is rounded to.
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
    flat = rows(x)
    T = flat.shape[0]
    source = storage(packed, absmax, code, d, blocksize, nested)
    # 16 rows keep many programs in flight; from 8 tokens on x̂ is read more than W, and twice the rows halve that.
    block_rows = 16 if T < 8 else 32
    warps, columns = (8, 512) if source.constants["ALIGNED"] and x.element_size() == 2 else (4, 128)
    grid = (cdiv(n, block_rows), cdiv(T, 16))
    with on_device(x):
        _matmul[grid](
            flat, source.tensors, y if bias is None else bias, y, T, n, d, source.pitch, flat.stride(0),
            BLOCK_T=16, ROWS=block_rows, COLUMNS=columns, WARPS=warps, HAS_BIAS=bias is not None,
            EVEN=d % columns == 0, **source.constants, num_warps=warps,
            num_stages=3 if source.constants["ALIGNED"] else 1, enable_fp_fusion=False,
        )  # fmt: skip
    return y
