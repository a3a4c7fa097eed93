"""Merging a whole model's adapters: time, and peak memory beyond the unmerged model: the suite ``merge``.

A 4-bit base merges to plain layers of 16 or 32 bit with ``qoft``, and is quantized again by PEFT, so those rows do not
do the same; ``logit_error`` is what merging changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from adapted import base_of, by_base, in_own_memory, together, tokens

import models
from measure import Row, bar, in_fresh_process, interleave, memory, reset_peak, timings
from merging import MERGE, check_merged
from methods import METHODS, attach, perturb
from options import Options

OWN = ["oft", "peft-oft", "lora", "dora"]
OWN_NF4 = ["qoft", "peft-qoft", "qlora"]


def measure(options: Options) -> Iterator[Row]:
    return by_base(options, _measure, OWN, OWN_NF4)


def _measure(shared: Row, names: list[str], options: Options) -> Iterator[Row]:
    peaks = {
        name: in_fresh_process("suite_merge:peak", name=name, told=options.to_json())
        for name in bar(() if options.quick else names, f"{shared['group']}: peak memory")
    }
    found, _ = together(options, names)
    ids = tokens(options, 2, 16)
    errors, waiting = {}, {}
    for name in names:
        perturb(name, found[name])
        limit = 0.5 if METHODS[name].nf4 else None  # quantizing again costs what it costs, and is reported
        errors[name] = check_merged(name, found[name], MERGE[name](copy.deepcopy(found[name])), ids, limit)
        waiting[name] = found[name]
    runs = {name: Merging(name, model) for name, model in waiting.items()}
    effort = {**options.effort, "rounds": min(options.rounds, 7)}
    samples = interleave(runs, options.device, wall=True, warmup=1, title=shared["group"], **effort)
    samples = {name: runs[name].seconds[-len(taken) :] for name, taken in samples.items()}
    for name in names:
        row = {**shared, "method": name, "base": base_of(name, options)}
        row |= timings(samples, name, METHODS[name].ratios) | {"logit_error": float(f"{errors[name]:.1e}")}
        yield row | peaks.get(name, {})


class Merging:
    """Merges a copy of a model at each call; ``seconds`` are of the merging alone."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        self.seconds: list[float] = []

    def __call__(self, round_: int) -> None:
        model = copy.deepcopy(self.model)
        one = interleave({"": lambda _: MERGE[self.name](model)}, model.device, rounds=1, warmup=0, wall=True)
        self.seconds += one[""]


def peak(name: str, told: dict[str, Any]) -> dict[str, int]:
    """Bytes that merging takes beyond the unmerged model, at the most and when it is done, in this process."""
    options = Options.of(told)
    for source in (models.TINY_NAME, options.model):  # a small one first, for what packages set up when they are used
        base = in_own_memory(
            models.load(source, options.device, options.dtype, nf4=METHODS[name].nf4, seed=options.seed)
        )
        adapted = perturb(name, attach(name, base, options.sizes))
        del base
        adapted(tokens(options, 1, 8))
        reset_peak(options.device)
        before = memory(options.device, peak=False)
        merged = MERGE[name](adapted)
        del adapted
        figures = {
            "peak_bytes": memory(options.device, peak=True) - before,
            "after_bytes": memory(options.device, peak=False) - before,
        }
        del merged
    return figures
