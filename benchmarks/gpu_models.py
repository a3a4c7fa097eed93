"""Whole models beside their peers, randomly initialised (speed does not depend on the weights): ``gpu_check.py``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpu_measure import Settings, at_most, medians, row
from torch import Tensor, nn

import models
from measure import require
from methods import METHODS, Sizes, attach, available

SEQUENCES = (4, 2048)


def steps(settings: Settings) -> list[dict[str, object]]:
    """A training step in 16 bit over the frozen model's, LoRA's and PEFT's OFT, and peak memory."""
    goals = {"frozen": 1.05, "lora": 0.95, "peft-oft": 0.6}
    return [found for name in settings.models for found in _steps(settings, name, "oft", goals)]


def steps_nf4(settings: Settings) -> list[dict[str, object]]:
    """The same on an NF4 base."""
    require("bitsandbytes")
    goals = {"frozen-nf4": None, "qlora": 0.9}
    return [found for name in settings.models for found in _steps(settings, name, "qoft", goals)]


def _steps(settings: Settings, name: str, own: str, goals: dict[str, float | None]) -> list[dict[str, object]]:
    nf4 = METHODS[own].nf4
    base = models.load(name, settings.device, settings.dtype, nf4=nf4)
    found = {method: attach(method, models.twin(base), Sizes()).train() for method in available([own, *goals])[0]}
    frozen, lora = list(goals)[:2]
    batch, length = SEQUENCES if settings.real else (2, 16)
    ids = torch.randint(base.config.vocab_size, (batch, length), device=settings.device)
    rows = []
    for checkpointing in (False, True):
        for model in found.values():
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        runs = {method: step(model, ids) for method, model in found.items()}
        peaks = {method: _peak_gib(settings, run) for method, run in runs.items()}
        fitting = {method: run for method, run in runs.items() if peaks[method] < math.inf}
        retries = _retries(settings)
        times = medians(settings, fitting, few=True)
        how = f"{name}, {'NF4' if nf4 else 'bf16'}, {batch} x {length}{', checkpointing' * checkpointing}"
        taken = f"{1e3 * times[frozen]:.0f} ms" if frozen in times else "out of memory"
        rows.append(row(f"step of {how}: {frozen}", "", taken))
        for method, goal in goals.items():
            what = f"step of {how}: {own} over {method}"
            if goal is not None and method in times and own in times:
                rows.append(at_most(what, goal, times[own] / times[method]))
            elif goal is not None:
                rows.append(row(what, f"<= {goal:g}", "out of memory" if method in found else "missing: peft"))
        if settings.real and {own, lora} <= set(times):
            what = f"peak memory of {how}: {own} {peaks[own]:.1f} GiB over {lora}'s {peaks[lora]:.1f}"
            rows.append(at_most(what, 1.0, peaks[own] / peaks[lora]))
        if again := _retries(settings) - retries:
            rows.append(row(f"step of {how}: times the allocator ran full, which the steps include", "", str(again)))
    return rows


def step(model: nn.Module, ids: Tensor) -> Callable[[int], None]:
    """Forward and backward to the embeddings."""

    def run(round_: int) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def _peak_gib(settings: Settings, run: Callable[[int], None]) -> float:
    """Of one step; infinite where it does not fit."""
    if not settings.real:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run(0)
    except torch.OutOfMemoryError:
        return math.inf
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def _retries(settings: Settings) -> int:
    """How often memory ran out so far and was had by freeing what the allocator held back."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if settings.real else 0
