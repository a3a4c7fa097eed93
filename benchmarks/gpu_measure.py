"""Measuring for ``gpu_check.py``: what to run where, interleaved timings, and rows of a table with goals."""

from __future__ import annotations

import importlib
import statistics
from dataclasses import dataclass

import torch
from provenance import environment
from torch import Tensor

from measure import Run, interleave, relative_error
from model_sizes import SIZES, TINY, USUAL, Size


@dataclass(frozen=True)
class Settings:
    """Where and how much to measure."""

    device: torch.device
    quick: bool = False

    @property
    def real(self) -> bool:
        return self.device.type == "cuda"

    @property
    def models(self) -> dict[str, Size]:
        return {name: SIZES[name] for name in USUAL[: 1 if self.quick else 2]} if self.real else {"tiny": TINY}

    @property
    def tokens(self) -> int:
        return 8192 if self.real else 48

    @property
    def rounds(self) -> int:
        return (15 if self.quick else 41) if self.real else 3

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def run_suite(suite: str, device: str, quick: bool) -> list[dict[str, object]]:
    """The rows of a suite, ``module:function``."""
    module, _, function = suite.partition(":")
    rows: list[dict[str, object]] = getattr(importlib.import_module(module), function)(
        Settings(torch.device(device), quick=quick)
    )
    return rows


def row(what: str, goal: str, figure: float | str, met: bool | None = None) -> dict[str, object]:
    """A row of the table; numbers get three digits."""
    return {"what": what, "goal": goal, "figure": f"{figure:.3f}" if isinstance(figure, float) else figure, "met": met}


def at_most(what: str, goal: float, figure: float) -> dict[str, object]:
    return row(what, f"<= {goal:g}", figure, figure <= goal)


def at_least(what: str, goal: float, figure: float) -> dict[str, object]:
    return row(what, f">= {goal:g}", figure, figure >= goal)


def medians(settings: Settings, runs: dict[str, Run], *, few: bool = False) -> dict[str, float]:
    """Median seconds of each, interleaved; ``few`` rounds are enough for what takes a good part of a second."""
    rounds = 5 if few and settings.real else settings.rounds
    samples = interleave(runs, settings.device, rounds=rounds, warmup=3)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def random(settings: Settings, *shape: int) -> Tensor:
    return torch.randn(*shape, device=settings.device, dtype=settings.dtype)


def close(name: str, actual: Tensor, expected: Tensor) -> None:
    """Ends the suite where a result is wrong: nothing wrong is timed."""
    error = relative_error(actual, expected)
    if not error < 1e-2:
        raise SystemExit(f"{name}: wrong result, relative error {error:.1e}; nothing was timed")


def about(settings: Settings) -> dict[str, object]:
    """Where and with what the figures were taken."""
    effort = {"tokens": settings.tokens, "rounds": settings.rounds, "quick": settings.quick}
    return environment(settings.device) | effort
