"""The launches that ``kernel_resources.py`` compiles: each kernel in each way it is used by default.

A case calls a public launcher of ``oftv2.kernels`` on tensors of a given device, which need no memory behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

FEATURES = 4096
TOKENS = 8192
TERMS = 4
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """A launch; with ``tensor_cores``, every kernel it starts has to have tensor-core instructions."""

    name: str
    launch: Callable[[torch.device], object]
    tensor_cores: bool = True


def generators(b: int, device: torch.device) -> Tensor:
    """Packed generators of a layer."""
    return torch.empty(FEATURES // b, b * (b - 1) // 2, device=device)


def delta(b: int, device: torch.device) -> Tensor:
    """Δ of a layer, as the Cayley transform leaves it."""
    return torch.empty(FEATURES // b, b, b, device=device)


def cayley_forward(b: int, device: torch.device) -> object:
    from oftv2.kernels.cayley import cayley_neumann

    return cayley_neumann(generators(b, device), b, TERMS)


def cayley_backward(b: int, device: torch.device) -> object:
    from oftv2.kernels.cayley import cayley_neumann_backward

    return cayley_neumann_backward(delta(b, device), generators(b, device), b, TERMS)


def rotate_forward(dtype: torch.dtype, b: int, group: int, terms: int, tokens: int, device: torch.device) -> object:
    from oftv2.kernels.rotate import rotate

    x = torch.empty(tokens, FEATURES // b * b, dtype=dtype, device=device)
    return rotate(x, [(generators if terms else delta)(b, device)] * group, b, terms)


def rotate_backward(dtype: torch.dtype, b: int, group: int, terms: int, tokens: int, device: torch.device) -> object:
    from oftv2.kernels.rotate import rotate_backward

    x = torch.empty(tokens, FEATURES // b * b, dtype=dtype, device=device)
    return rotate_backward([x] * group, x, [(generators if terms else delta)(b, device)] * group, b, terms)


def cayley_cases() -> Iterator[Case]:
    for b in (16, 32, 64):
        yield Case(f"cayley forward b={b}", partial(cayley_forward, b))
        yield Case(f"cayley backward b={b}", partial(cayley_backward, b))


def rotate_cases() -> Iterator[Case]:
    bf16, fp16, fp32 = SHORT
    for dtype, b, group, terms, tokens in [
        *((bf16, b, 1, 0, TOKENS) for b in (16, 24, 32, 64, 128, 256)),
        *((bf16, b, group, 0, TOKENS) for b, group in ((32, 2), (32, 3), (64, 3))),
        *((bf16, b, 1, TERMS, TOKENS) for b in (32, 64)),
        *((fp32, b, 1, 0, TOKENS) for b in (32, 64, 128)),
        (fp16, 32, 1, 0, TOKENS),
        (bf16, 32, 1, 0, 1),
    ]:
        how = f"{SHORT[dtype]} b={b}"
        how += f" group={group}" * (group > 1) + f" terms={terms}" * (terms > 0) + f" T={tokens}" * (tokens < TOKENS)
        yield Case(f"rotate forward {how}", partial(rotate_forward, dtype, b, group, terms, tokens))
        if tokens == TOKENS:
            yield Case(f"rotate backward {how}", partial(rotate_backward, dtype, b, group, terms, tokens))


CASES = [*cayley_cases(), *rotate_cases()]
