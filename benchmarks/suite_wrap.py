"""Putting adapters on a whole model: the time it takes, with ``wrap_model`` and with PEFT: the suite ``wrap``."""

from __future__ import annotations

from collections.abc import Iterator

from adapted import base_of, by_base, trained

import models
from measure import Row, interleave, timings
from methods import METHODS, attach
from options import Options

OWN = ["oft", "peft-oft", "lora", "dora", "oftv1"]
OWN_NF4 = ["qoft", "peft-qoft", "qlora"]


def measure(options: Options) -> Iterator[Row]:
    return by_base(options, _measure, OWN, OWN_NF4)


def _measure(shared: Row, names: list[str], options: Options) -> Iterator[Row]:
    base = models.load(options.model, options.device, options.dtype, nf4=METHODS[names[0]].nf4, seed=options.seed)
    plain = {name: [models.twin(base) for _ in range(options.rounds + 1)] for name in names}
    sizes = {name: sum(p.numel() for p in trained(attach(name, models.twin(base), options.sizes))) for name in names}
    runs = {name: lambda _, name=name: attach(name, plain[name].pop(), options.sizes) for name in names}
    samples = interleave(runs, options.device, wall=True, warmup=1, title=shared["group"], **options.effort)
    for name in names:
        row = {**shared, "method": name, "base": base_of(name, options)}
        yield row | timings(samples, name, METHODS[name].ratios) | {"trainable": sizes[name]}
