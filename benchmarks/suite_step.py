"""Training steps of a whole model: forward, backward and AdamW's update, methods in turn: the suite ``step``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from adapted import base_of, common, missing_rows, together, tokens, trained
from torch import Tensor

from measure import Row, Run, interleave, spread, timings
from methods import METHODS
from options import Options

OWN = ["frozen", "oft", "lora", "peft-oft", "peft-oft-accelerated", "dora", "full", "oftv1"]
OWN_NF4 = ["frozen-nf4", "qoft", "qlora", "peft-qoft"]


def batches(options: Options) -> list[tuple[int, int]]:
    """Sequences and tokens of each."""
    if options.quick:
        return [(2, 16)]
    return [(1, 2048), (4, 2048), (8, 2048)] if options.device.type == "cuda" else [(1, 64), (4, 64), (4, 256)]


def measure(options: Options) -> Iterator[Row]:
    for own in (OWN, OWN_NF4):
        names = options.choose(own)
        if not names:
            continue
        shapes = {_name(options, names[0], *shape): shape for shape in batches(options)}
        wanted = {group: shape for group, shape in shapes.items() if options.wanted(group)}
        if not wanted:
            continue
        models, missing = together(options, names)
        for group, shape in wanted.items():
            yield from _measure(group, shape, models, missing, options)


def _name(options: Options, method: str, batch: int, length: int) -> str:
    return f"{options.model}, {base_of(method, options)}, {batch} x {length}"


def _measure(
    group: str, shape: tuple[int, int], models: dict[str, Any], missing: dict[str, str], options: Options
) -> Iterator[Row]:
    batch, length = shape
    shared = common(options, group, batch=batch, length=length, tokens=batch * length)
    yield from missing_rows(shared, missing)
    ids = tokens(options, batch, length)
    runs = {name: step(name, model, ids) for name, model in models.items()}
    samples = interleave(runs, options.device, wall=True, warmup=1, title=group, **options.effort)
    for name, model in models.items():
        speed = spread("tokens_per_second", [ids.numel() / seconds for seconds in samples[name]], 4)
        row = {**shared, "method": name, "base": base_of(name, options), **speed}
        yield row | timings(samples, name, METHODS[name].ratios) | {"trainable": sum(p.numel() for p in trained(model))}


def step(name: str, model: Any, ids: Tensor) -> Run:
    """One step; what trains nothing stops after the backward pass.

    Raises:
        SystemExit: something that should train gets no gradient, or the loss is not finite.
    """
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None

    def run(round_: int) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if round_ == 0 and not (torch.isfinite(loss) and all(p.grad is not None for p in parameters)):
            raise SystemExit(f"{name}: loss {loss.item()}, or a parameter without a gradient; nothing was timed")
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return run
