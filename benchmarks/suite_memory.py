"""Memory of a training step of a whole model, each method in a process of its own: the suite ``memory``.

``peak_bytes`` is the peak of the allocator on a GPU and of the resident set on a CPU, beyond what the process held when
all packages were imported and had been used (``imports_bytes``). Bytes kept for the backward pass are counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from adapted import base_of, common, in_own_memory, tokens, trained
from suite_step import OWN, OWN_NF4, step

import models
from measure import Row, bar, in_fresh_process, memory, reset_peak, saved_bytes
from methods import METHODS, attach, available
from options import Options

STEPS = 2  # in the second the optimizer has its state


def measure(options: Options) -> Iterator[Row]:
    batch, length = (2, 16) if options.quick else (4, 2048) if options.device.type == "cuda" else (4, 256)
    names, missing = available(options.choose(["frozen", "oft", "lora"] if options.quick else [*OWN, *OWN_NF4]))
    for checkpointing in (False,) if options.quick else (False, True):
        case = f"{options.model}, {batch} x {length}{', checkpointing' * checkpointing}"
        shape = {"batch": batch, "length": length, "checkpointing": checkpointing}
        for name in bar([*missing, *names], case):
            group = f"{case}: {name}"
            if not options.wanted(group):
                continue
            row = {**common(options, group, **shape, tokens=batch * length), "method": name}
            if name in missing:
                yield {**row, "missing": missing[name]}
                continue
            figures = in_fresh_process("suite_memory:one", name=name, told=options.to_json(), **shape)
            yield {**row, "base": base_of(name, options), **figures}


def one(name: str, told: dict[str, Any], batch: int, length: int, checkpointing: bool) -> dict[str, int]:
    """The figures of one method, in this process."""
    options = Options.of(told)
    ids = tokens(options, batch, length)
    # A small model first: what the packages import and set up when they are used is not the method's.
    _train(name, models.TINY_NAME, options, ids[:1, :8], checkpointing)
    reset_peak(options.device)
    before = memory(options.device, peak=False)
    adapted = _train(name, options.model, options, ids, checkpointing)
    peak = memory(options.device, peak=True)
    with saved_bytes(adapted) as kept:
        loss = adapted(input_ids=ids, labels=ids).loss
    del loss
    return {
        "peak_bytes": peak - before,
        "imports_bytes": before,
        "saved_bytes": sum(kept.values()),
        "trainable": sum(parameter.numel() for parameter in trained(adapted)),
    }


def _train(name: str, model: str, options: Options, ids: torch.Tensor, checkpointing: bool) -> Any:
    base = in_own_memory(models.load(model, options.device, options.dtype, nf4=METHODS[name].nf4, seed=options.seed))
    adapted = attach(name, base, options.sizes).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    run = step(name, adapted, ids)
    for round_ in range(STEPS):
        run(round_)
    return adapted
