"""The launches that ``kernel_resources.py`` compiles: whatever the kernels say they support, in the ways they are used.

A case calls a public launcher of ``oftv2.kernels`` on tensors of a given device, which need no memory behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from oftv2.kernels import cayley, nf4, nf4_matmul, rotate, rotate_matmul, rotate_rows, rotate_segments

FEATURES = 4096
TOKENS = 8192
ROWS = 64  # of a batch whose rows have adapters of their own
TIMES = 8  # experts of a token
BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
TERMS = 4
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


@dataclass(frozen=True)
class Case:
    """A launch, and those of its kernels that multiply no matrices: all others are to use the tensor cores."""

    name: str
    launch: Callable[[torch.device], object]
    plain: tuple[str, ...] = ()


def generators(b: int, device: torch.device) -> Tensor:
    """Packed generators of a layer."""
    return torch.empty(FEATURES // b, b * (b - 1) // 2, device=device)


def delta(b: int, device: torch.device) -> Tensor:
    """Δ of a layer, as the Cayley transform leaves it."""
    return torch.empty(FEATURES // b, b, b, device=device)


def activations(dtype: torch.dtype, b: int, tokens: int, device: torch.device) -> Tensor:
    """Inputs of a layer."""
    return torch.empty(tokens, FEATURES // b * b, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------------- cayley


def cayley_forward(b: int, device: torch.device) -> object:
    return cayley.cayley_neumann(generators(b, device), b, TERMS)


def cayley_backward(b: int, device: torch.device) -> object:
    return cayley.cayley_neumann_backward(delta(b, device), generators(b, device), b, TERMS)


def cayley_inverse(b: int, device: torch.device) -> object:
    return cayley.times_inverse_transposed(delta(b, device), delta(b, device))


def cayley_cases() -> Iterator[Case]:
    for b in filter(partial(cayley.supports, FP32), BLOCK_SIZES):
        yield Case(f"cayley forward b={b}", partial(cayley_forward, b))
        yield Case(f"cayley backward b={b}", partial(cayley_backward, b))
        yield Case(f"cayley inverse b={b}", partial(cayley_inverse, b))


# ------------------------------------------------------------------------------------------------------------- rotate


def rotate_forward(dtype: torch.dtype, b: int, group: int, terms: int, device: torch.device) -> object:
    sources = [generators(b, device) if terms else delta(b, device)] * group
    return rotate.rotate(activations(dtype, b, TOKENS, device), sources, b, terms)


def rotate_backward(dtype: torch.dtype, b: int, group: int, terms: int, device: torch.device) -> object:
    sources = [generators(b, device) if terms else delta(b, device)] * group
    x = activations(dtype, b, TOKENS, device)
    return rotate.rotate_backward([x] * group, x, sources, b, terms)


def rotate_one_token(device: torch.device) -> object:
    return rotate.rotate(activations(BF16, 32, 1, device), [delta(32, device)], 32)


def rotate_inverse(device: torch.device) -> object:
    return rotate.rotate(activations(BF16, 32, TOKENS, device), [delta(32, device).mT], 32)


def rotate_delta_grad(device: torch.device) -> object:
    x = activations(BF16, 32, TOKENS, device)
    return rotate.rotate_backward([x], x, [delta(32, device)], 32, with_x=False)


def rotate_cases() -> Iterator[Case]:
    for dtype, b, group, terms in [
        *((BF16, b, group, 0) for group in (1, rotate.MAX_GROUP) for b in BLOCK_SIZES),
        *((FP32, b, 1, 0) for b in BLOCK_SIZES),
        *((BF16, b, 1, TERMS) for b in BLOCK_SIZES),
        *((FP32, b, 1, TERMS) for b in BLOCK_SIZES),
        (FP16, 32, 1, 0),
        (BF16, 32, 2, 0),
        (BF16, 24, 1, 0),  # neither a power of two nor a divisor of the width
    ]:
        if rotate.supports(dtype, b, group=group, terms=terms):
            how = f"{SHORT[dtype]} b={b}" + f" group={group}" * (group > 1) + f" terms={terms}" * (terms > 0)
            yield Case(f"rotate forward {how}", partial(rotate_forward, dtype, b, group, terms))
            yield Case(f"rotate backward {how}", partial(rotate_backward, dtype, b, group, terms))
    yield Case("rotate forward bf16 b=32 one token", rotate_one_token)
    yield Case("rotate forward bf16 b=32 transposed Δ", rotate_inverse)
    yield Case("rotate backward bf16 b=32 without ∂x", rotate_delta_grad)


# -------------------------------------------------------------------------------------------------------- rotate_rows


def rows_forward(dtype: torch.dtype, b: int, tokens: int, device: torch.device) -> object:
    return rotate_rows.rotate_rows(*rows_of_adapters(dtype, b, tokens, device))


def rows_delta_grad(dtype: torch.dtype, b: int, device: torch.device) -> object:
    x, *rest = rows_of_adapters(dtype, b, TOKENS // ROWS, device)
    return rotate_rows.rotate_rows_delta_grad(x, x, *rest)


def rows_of_adapters(dtype: torch.dtype, b: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch, Δ of some adapters, and which of them each row takes."""
    x = activations(dtype, b, ROWS * tokens, device).unflatten(0, (ROWS, tokens))
    return x, delta(b, device).expand(8, -1, -1, -1), torch.empty(ROWS, dtype=torch.int64, device=device)


def rows_cases() -> Iterator[Case]:
    for dtype, b in [
        *((BF16, b) for b in BLOCK_SIZES),
        *((FP32, b) for b in BLOCK_SIZES),
        (FP16, 32),
        (BF16, 24),
    ]:
        if rotate.supports(dtype, b):
            how = f"{SHORT[dtype]} b={b}"
            yield Case(f"rotate rows forward {how}", partial(rows_forward, dtype, b, TOKENS // ROWS))
            yield Case(f"rotate rows gradient of Δ {how}", partial(rows_delta_grad, dtype, b))
    yield Case("rotate rows forward bf16 b=32 one token each", partial(rows_forward, BF16, 32, 1))


def segments_forward(dtype: torch.dtype, b: int, device: torch.device) -> object:
    return rotate_segments.rotate_segments(*segments_of_experts(dtype, b, device))


def segments_delta_grad(dtype: torch.dtype, b: int, device: torch.device) -> object:
    x, *rest = segments_of_experts(dtype, b, device)
    grad = activations(dtype, b, TIMES * TOKENS, device)
    return rotate_segments.rotate_segments_delta_grad(grad, x, *rest)


def segments_of_experts(dtype: torch.dtype, b: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Tokens that go to several experts each, Δ of each expert, where its tokens end, and which they are."""
    ends = torch.empty(ROWS, dtype=torch.int32, device=device)
    order = torch.empty(TIMES * TOKENS, dtype=torch.int64, device=device)
    return activations(dtype, b, TOKENS, device), delta(b, device).expand(ROWS, -1, -1, -1), ends, order, TIMES


def segments_sorted(dtype: torch.dtype, b: int, device: torch.device) -> object:
    x, deltas, ends, *_ = segments_of_experts(dtype, b, device)
    return rotate_segments.rotate_segments(x, deltas, ends)


def segments_cases() -> Iterator[Case]:
    for dtype, b in [*((BF16, b) for b in BLOCK_SIZES), *((FP32, b) for b in BLOCK_SIZES), (FP16, 32)]:
        if rotate.supports(dtype, b):
            how = f"{SHORT[dtype]} b={b}"
            yield Case(f"rotate segments forward {how}", partial(segments_forward, dtype, b))
            yield Case(f"rotate segments forward {how} sorted", partial(segments_sorted, dtype, b))
            yield Case(f"rotate segments gradient of Δ {how}", partial(segments_delta_grad, dtype, b))


# ------------------------------------------------------------------------------------------------------ rotate_matmul


def matmul(dtype: torch.dtype, b: int, tokens: int, bias: bool, device: torch.device) -> object:
    weight = torch.empty(FEATURES, FEATURES // b * b, dtype=dtype, device=device)
    biases = torch.empty(FEATURES, dtype=dtype, device=device) if bias else None
    return rotate_matmul.rotate_matmul(
        activations(dtype, b, tokens, device), delta(b, device).to(dtype), weight, biases
    )


def matmul_cases() -> Iterator[Case]:
    for dtype, b, tokens, bias in [
        *((BF16, b, tokens, False) for b in (32, 64, 128, 256) for tokens in (1, TOKENS)),
        *((FP32, b, tokens, False) for b in (32, 128) for tokens in (1, TOKENS)),
        (BF16, 32, 64, False),
        (FP16, 32, 1, True),
        (BF16, 24, 1, False),
    ]:
        if rotate_matmul.supports(dtype, b):
            name = f"rotate_matmul {SHORT[dtype]} b={b} T={tokens}" + " bias" * bias
            yield Case(name, partial(matmul, dtype, b, tokens, bias), plain=("_sum",))


# -------------------------------------------------------------------------------------------------------- 4-bit weights


class Quantized(NamedTuple):
    """A weight as bitsandbytes stores it, in blocks of 64."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int


def quantized(d: int, double: bool, device: torch.device) -> tuple[Quantized, nf4.Nested | None]:
    """A weight of ``(FEATURES, d)``, and with double quantization what its scales come from."""
    scales = FEATURES * d // 64
    nested = None
    if double:
        level, offset = torch.empty(256, device=device), torch.empty((), device=device)
        nested = level, torch.empty(scales // 256, device=device), offset, 256
    packed = torch.empty(FEATURES * d // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(scales, dtype=torch.uint8 if double else torch.float32, device=device)
    return Quantized(packed, absmax, torch.empty(16, device=device), (FEATURES, d), 64), nested


def dequantize(dtype: torch.dtype, b: int, double: bool, device: torch.device) -> object:
    """``b`` is 0 where the weight is not rotated."""
    weight, nested = quantized(FEATURES // b * b if b else FEATURES, double, device)
    return nf4.dequantize_rotate(*weight, delta(b, device) if b else None, dtype, nested=nested)


def matmul_4bit(dtype: torch.dtype, b: int, tokens: int, double: bool, device: torch.device) -> object:
    x = activations(dtype, b, tokens, device)
    weight, nested = quantized(x.shape[1], double, device)
    return nf4_matmul.rotate_matmul_4bit(x, delta(b, device).to(dtype), *weight, nested=nested)


def nf4_cases() -> Iterator[Case]:
    for dtype, b, double in [
        *((BF16, b, True) for b in BLOCK_SIZES if nf4.supports(BF16, b)),
        *((FP32, b, True) for b in (32, 64)),
        (BF16, 32, False),
        (BF16, 24, True),
    ]:
        name = f"nf4 dequantize and rotate {SHORT[dtype]} b={b}" + " nested" * double
        yield Case(name, partial(dequantize, dtype, b, double))
    yield Case("nf4 dequantize bf16 nested", partial(dequantize, BF16, 0, True), plain=("_dequantize",))
    for dtype, b, tokens, double in [
        (BF16, 32, 1, True),
        (BF16, 32, 16, True),
        (BF16, 32, 1, False),
        (BF16, 24, 1, True),
        (FP32, 32, 1, True),
    ]:
        name = f"nf4 product {SHORT[dtype]} b={b} T={tokens}" + " nested" * double
        yield Case(name, partial(matmul_4bit, dtype, b, tokens, double), plain=("_matmul_one_token",))


CASES = [*cayley_cases(), *rotate_cases(), *rows_cases(), *segments_cases(), *matmul_cases(), *nf4_cases()]
