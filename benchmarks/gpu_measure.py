"""Measuring for ``gpu_check.py``: what to run where, interleaved timings, and rows of a table with goals."""

from __future__ import annotations

import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# hidden size, size of k and v, size of the feed-forward layer
MODELS = {"Llama-3-8B": (4096, 1024, 14336), "Qwen2.5-7B": (3584, 512, 18944)}
TINY = {"tiny": (64, 32, 128)}


class MissingError(Exception):
    """A package that a suite compares with is not there."""


@dataclass(frozen=True)
class Settings:
    """Where and how much to measure."""

    device: torch.device
    quick: bool = False

    @property
    def real(self) -> bool:
        return self.device.type == "cuda"

    @property
    def models(self) -> dict[str, tuple[int, int, int]]:
        return dict(list(MODELS.items())[: 1 if self.quick else 2]) if self.real else TINY

    @property
    def tokens(self) -> int:
        return 8192 if self.real else 48

    @property
    def rounds(self) -> int:
        return (15 if self.quick else 41) if self.real else 3

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def row(what: str, goal: str, figure: float | str, met: bool | None = None) -> dict[str, object]:
    """A row of the table; numbers get three digits."""
    return {"what": what, "goal": goal, "figure": f"{figure:.3f}" if isinstance(figure, float) else figure, "met": met}


def at_most(what: str, goal: float, figure: float) -> dict[str, object]:
    return row(what, f"<= {goal:g}", figure, figure <= goal)


def at_least(what: str, goal: float, figure: float) -> dict[str, object]:
    return row(what, f">= {goal:g}", figure, figure >= goal)


def medians(settings: Settings, runs: dict[str, Callable[[int], object]], *, few: bool = False) -> dict[str, float]:
    """Median seconds of each, interleaved; a run is given the number of its round, to choose its inputs by.

    ``few`` rounds are enough for what takes a good part of a second.

    On a GPU by events, behind a pause in the queue that hides how long Python takes to launch.
    """
    samples: dict[str, list[Any]] = {name: [] for name in runs}
    for round_ in range((5 if few and settings.real else settings.rounds) + 3):
        for name, run in runs.items() if round_ % 2 else reversed(runs.items()):
            if settings.real:
                torch.cuda._sleep(4_000_000)
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                run(round_)
                events[1].record()
                samples[name].append(events)
            else:
                start = time.perf_counter()
                run(round_)
                samples[name].append(time.perf_counter() - start)
        if settings.real:
            torch.cuda.synchronize()
    found = {}
    for name, taken in samples.items():
        seconds = [1e-3 * a.elapsed_time(b) for a, b in taken] if settings.real else taken
        found[name] = statistics.median(seconds[3:])  # the first three warm up
    return found


def random(settings: Settings, *shape: int) -> Tensor:
    return torch.randn(*shape, device=settings.device, dtype=settings.dtype)


def close(name: str, actual: Tensor, expected: Tensor, relative: float = 1e-2) -> None:
    """Stops everything where a result is wrong: nothing wrong is timed."""
    error = torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)
    if not error < relative:
        raise SystemExit(f"{name}: wrong result, relative error {error:.1e}; nothing was timed")


def about(settings: Settings) -> dict[str, object]:
    """Where and with what the figures were taken."""
    packages = {}
    for name in ("torch", "triton", "peft", "bitsandbytes"):
        found = importlib.util.find_spec(name)
        packages[name] = __import__(name).__version__ if found else "missing"
    driver = "none"
    if settings.real:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if settings.real else "cpu",
        "driver": driver,
        "python": platform.python_version(),
        "versions": packages,
        "commit": commit.stdout.strip() or "unknown",
        "tokens": settings.tokens,
        "rounds": settings.rounds,
        "quick": settings.quick,
    }
