"""Kernels beside a copy of the same bytes, and whether two runs agree: suites of ``gpu_check.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_measure import Settings, at_least, at_most, close, medians, random, row
from torch import Tensor

from measure import MissingError, Run
from oftv2 import functional as F
from oftv2 import reference

# Sets of inputs that are taken in turn, so that none is found in the cache.
_SETS = 4


def kernels(settings: Settings) -> list[dict[str, object]]:
    """``rotate`` forward and backward against a copy of the same bytes."""
    rows = []
    for model, size in settings.models.items():
        rows += _rotation(settings, model, size.hidden) + _rotation(settings, model, size.ffn)
    return rows


def rotation_runs(device: torch.device, dtype: torch.dtype, tokens: int, d: int, block_size: int) -> dict[str, Run]:
    """The rotation's operators and a copy of as many bytes, checked; each call takes another input."""
    xs, grads = ([torch.randn(tokens, d, device=device, dtype=dtype) for _ in range(_SETS)] for _ in range(2))
    generators = torch.randn(d // block_size, block_size * (block_size - 1) // 2, device=device) * 0.01
    delta = F.cayley_neumann(generators, block_size)
    R = delta.double() + torch.eye(block_size, device=device)
    close("rotate", F.rotate(xs[0][:64], delta), reference.rotate(xs[0][:64].double(), R))
    out = torch.empty_like(xs[0])
    ops = torch.ops.oftv2
    return {
        "copy": lambda i: out.copy_(xs[i % _SETS]),
        "rotate": lambda i: ops.rotate(xs[i % _SETS], delta),
        "rotate from generators": lambda i: ops.neumann_rotate(xs[i % _SETS], generators, block_size, 4),
        "rotate backward": lambda i: ops.rotate_backward(grads[i % _SETS], xs[i % _SETS], delta),
    }


def _rotation(settings: Settings, model: str, d: int) -> list[dict[str, object]]:
    T = settings.tokens
    times = medians(settings, rotation_runs(settings.device, settings.dtype, T, d, 32))
    where = f"{model}, {T} x {d}"
    return [
        row(f"copy, {where}", "", f"{4 * T * d / times['copy'] / 1e12:.2f} TB/s"),
        at_least(f"rotate forward, of a copy's speed, {where}", 0.90, times["copy"] / times["rotate"]),
        row(f"the same from generators, {where}", "", times["copy"] / times["rotate from generators"]),
        # reads two and writes one, where a copy reads one and writes one
        at_least(
            f"rotate backward, of the bound of its bytes, {where}", 0.85, 1.5 * times["copy"] / times["rotate backward"]
        ),
    ]


# The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def nf4_kernels(settings: Settings) -> list[dict[str, object]]:
    """Dequantizing and rotating a 4-bit weight, over dequantizing it."""
    if not settings.real:
        raise MissingError("its kernels run on a CUDA device")
    return [
        found
        for model, size in settings.models.items()
        for n, k in ((size.hidden, size.hidden), (size.ffn, size.hidden), (size.hidden, size.ffn))
        for found in _dequantization(settings, model, n, k)
    ]


def _dequantization(settings: Settings, model: str, n: int, d: int) -> list[dict[str, object]]:
    from oftv2.kernels import nf4

    device, b = settings.device, 32
    code = torch.tensor(_NF4, device=device)
    packed = [torch.randint(256, (n * d // 2,), device=device).byte() for _ in range(_SETS)]
    absmax = torch.rand(n * d // 64, device=device)
    delta = F.cayley_neumann(torch.randn(d // b, b * (b - 1) // 2, device=device) * 0.01, b)

    def run(i: int, delta: Tensor | None) -> Tensor:
        return nf4.dequantize_rotate(packed[i % _SETS], absmax, code, (n, d), 64, delta, settings.dtype)

    R = delta.double() + torch.eye(b, device=device)
    close("nf4_dequantize_rotate", run(0, delta)[:256], reference.rotate(run(0, None)[:256].double(), R.mT))
    times = medians(settings, {"plain": lambda i: run(i, None), "rotated": lambda i: run(i, delta)})
    moved = n * d * (0.5 + 4 / 64 + 2)
    return [
        at_most(f"nf4_dequantize_rotate, {model}, {n} x {d}: over plain", 1.10, times["rotated"] / times["plain"]),
        row(f"the plain one, {n} x {d}", "", f"{moved / times['plain'] / 1e12:.2f} TB/s"),
    ]


def determinism(settings: Settings) -> list[dict[str, object]]:
    """Two runs of every gradient give equal bits."""
    x, grad = random(settings, settings.tokens, 256), random(settings, settings.tokens, 256)
    generators = torch.randn(8, 496, device=settings.device) * 0.01
    delta = F.cayley_neumann(generators, 32)
    weight = random(settings, 128, 256)
    runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "rotate": lambda: torch.ops.oftv2.rotate_backward(grad, x, delta),
        "neumann_rotate": lambda: torch.ops.oftv2.neumann_rotate_backward(grad, x, generators, 32, 4),
        "weight form": lambda: torch.ops.oftv2.weight_form_backward(grad[:, :128].contiguous(), x, delta, weight),
    }
    same = {name: all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True)) for name, run in runs.items()}
    return [
        row(f"{name}: two runs, equal bits", "yes", "yes" if equal else "FAIL", equal) for name, equal in same.items()
    ]
