"""Time and memory over the size of the model: the suite ``sizes``.

On a GPU whole models with random weights in 16 bit and in NF4, as far as they fit; what does not is a row that says so.
On a CPU one decoder layer of each, in float32: a step's time, and bytes kept for the backward pass, exactly. Groups
that end in "memory" are taken in processes of their own. Every row has what :mod:`memory_model` predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adapted import common, missing_rows, tokens, trained
from suite_step import step

import memory_model
import models
from measure import Row, in_fresh_process, interleave, memory, reset_peak, timings
from memory_model import GIB, Step
from memory_table import SETTINGS
from memory_trace import kept_and_peak
from methods import METHODS, attach, available
from model_sizes import SIZES, Size
from options import Options

OWN = ["frozen", "oft", "lora", "peft-oft", "dora"]
OWN_V1 = ["oft", "oftv1"]
OWN_GPU = ["frozen", "oft", "lora", "lora-16bit", "peft-oft", "oftv1"]
OWN_NF4 = ["frozen-nf4", "qoft", "qlora", "peft-qoft"]
OWN_NF4_GPU = [*OWN_NF4, "qlora-16bit"]
LAYER = (1, 256)  # the batch of one decoder layer
# A step of OFTv1 that would take longer, in seconds, is not waited for; operations a second of two cores.
LONGEST, OPERATIONS = 200.0, 1.0e11


def measure(options: Options) -> Iterator[Row]:
    sizes = {models.TINY_NAME: models.TINY[models.TINY_NAME]} if options.quick else SIZES
    suite = whole if options.device.type == "cuda" else _one_layer
    for name, size in sizes.items():
        yield from suite(name, size, options)


# -------------------------------------------------------------------------------------------------------- one layer


def _one_layer(name: str, full: Size, options: Options) -> Iterator[Row]:
    size = full.one_layer()
    f32, nf4 = options.dtype_name, f"nf4-{options.dtype_name}"
    parts = [(OWN, f32, "", _timed), (OWN_V1, f32, ", beside OFTv1", _beside_v1), (OWN_NF4, nf4, "", _timed)]
    parts += [(OWN, f32, ", memory", _resident), (OWN_NF4, nf4, ", memory", _resident)]
    for own, base, what, measured in parts:
        names, missing = available(options.choose(own))
        group = f"{name}, one layer, {base}, {LAYER[0]} x {LAYER[1]}{what}"
        if names and options.wanted(group):
            shared = _shared(group, name, full, base, *LAYER, False, options)
            yield from measured(shared, names, missing, size, base, options)
            yield from missing_rows(shared, missing)


def _timed(
    shared: Row, names: list[str], missing: dict[str, str], size: Size, base: str, options: Options
) -> Iterator[Row]:
    ids = tokens(options, *LAYER)
    adapted = _adapted(names, size, base, options)
    runs = {name: step(name, model, ids) for name, model in adapted.items()}
    samples = interleave(runs, options.device, warmup=1, least=3, title=shared["group"], **options.effort)
    for name, model in adapted.items():
        row = {**shared, "method": name, **timings(samples, name, METHODS[name].ratios)}
        yield row | _kept(name, model, ids, size, base)


def _beside_v1(
    shared: Row, names: list[str], missing: dict[str, str], size: Size, base: str, options: Options
) -> Iterator[Row]:
    seconds = 6 * sum(n * d * d for d, n in size.projections.values()) / OPERATIONS  # the dense products of a step
    if seconds > LONGEST:
        missing["oftv1"] = f"not run: n d² products take about {seconds / 60:.0f} minutes a step"
        return
    ids = tokens(options, *LAYER)
    adapted = _adapted([name for name in names if name in OWN_V1], size, base, options)
    runs = {name: step(name, model, ids) for name, model in adapted.items()}
    slow = seconds > 2  # then once is enough, but not without any warm-up of what takes a second
    runs["oft"](0)
    samples = interleave(runs, options.device, warmup=0 if slow else 1, rounds=1 if slow else options.rounds)
    for name, model in adapted.items():
        row = {**shared, "method": name, **timings(samples, name, {"over_oftv1": "oftv1"})}
        yield row | (_kept(name, model, ids, size, base) if not slow or name != "oftv1" else {})


def _adapted(names: list[str], size: Size, base: str, options: Options) -> dict[str, Any]:
    """A model for each method, on weights that they share."""
    model = _load(size, options, nf4=base.startswith("nf4"))
    return {name: attach(name, models.twin(model), options.sizes).train() for name in names}


def _kept(name: str, model: Any, ids: torch.Tensor, size: Size, base: str) -> Row:
    """Bytes kept for the backward pass, counted and predicted."""
    kept, peak = kept_and_peak(model, ids)
    predicted = memory_model.kept(_step(name, size, base, *LAYER, False, "cpu"))
    trainable = sum(parameter.numel() for parameter in trained(model))
    return {"kept_bytes": kept, "predicted_kept_bytes": predicted, "traced_peak_bytes": peak, "trainable": trainable}


def _resident(
    shared: Row, names: list[str], missing: dict[str, str], size: Size, base: str, options: Options
) -> Iterator[Row]:
    for name in names[:2] if options.quick else names:
        predicted = memory_model.peak(_step(name, size, base, *LAYER, False, "cpu"))
        if predicted > 0.6 * _free():
            missing[name] = f"not run: {predicted / GIB:.1f} GiB predicted, {_free() / GIB:.1f} free"
            continue
        peak = in_fresh_process("suite_sizes:resident", name=name, size=shared["size"], told=options.to_json())
        yield {**shared, "method": name, **_gib(predicted_gib=predicted, measured_gib=peak)}


def resident(name: str, size: str, told: dict[str, Any]) -> int:
    """The resident set's peak over two steps of one decoder layer, beyond what the process held before; in this one."""
    options = Options.of(told)
    small, shape = models.TINY[models.TINY_NAME], (SIZES | models.TINY)[size].one_layer()
    for warm_up, taken in ((True, small), (False, shape)):
        ids = tokens(options, 1, 8) if warm_up else tokens(options, *LAYER)
        if not warm_up:
            reset_peak(options.device)
            before = memory(options.device, peak=False)
        model = attach(name, _load(taken, options, nf4=METHODS[name].nf4), options.sizes).train()
        run = step(name, model, ids)
        for round_ in range(2):
            run(round_)
    return memory(options.device, peak=True) - before


def _free() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


# ----------------------------------------------------------------------------------------------------- whole models


def whole(name: str, size: Size, options: Options) -> Iterator[Row]:
    for own, base in ((OWN_GPU, options.dtype_name), (OWN_NF4_GPU, "nf4")):
        names, missing = available(options.choose(own))
        groups = {
            f"{name}, {base}, {batch} x {length}{', checkpointing' * checkpointing}": (batch, length, checkpointing)
            for batch, length in ([(2, 16)] if options.quick else SETTINGS)
            for checkpointing in (False, True)
        }
        groups = {group: how for group, how in groups.items() if names and options.wanted(group)}
        model = None
        if groups:
            try:
                model = _load(size, options, nf4=base == "nf4")
            except torch.OutOfMemoryError:
                missing |= dict.fromkeys(names, "out of memory: the weights alone")
        for group, how in groups.items():
            shared = _shared(group, name, size, base, *how, options)
            yield from missing_rows(shared, missing)
            if model is not None:
                yield from _adapters(group, shared, model, names, size, base, how, options)
        del model


def _adapters(
    group: str,
    shared: Row,
    base_model: Any,
    names: list[str],
    size: Size,
    base: str,
    how: tuple[int, int, bool],
    options: Options,
) -> Iterator[Row]:
    """Each method on the same weights: memory with no other adapter there, then time, in turn."""
    batch, length, checkpointing = how
    ids = tokens(options, batch, length)
    rows: dict[str, Row] = {}
    runs = {}
    for name in names:
        rows[name] = {**shared, "method": name}
        predicted = memory_model.peak(_step(name, size, base, *how, options.device.type))
        rows[name] |= _gib(predicted_gib=predicted)
        model = None
        try:
            model = attach(name, models.twin(base_model), options.sizes).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            rows[name] |= _gib(measured_gib=_peak(step(name, model, ids), options.device))
        except torch.OutOfMemoryError:
            rows[name]["missing"] = "out of memory"
            continue
        finally:
            del model
            _collect(options.device)
    for name in names:
        if "missing" not in rows[name]:
            model = attach(name, models.twin(base_model), options.sizes).train()
            runs[name] = step(name, model, ids)
    try:
        samples = interleave(runs, options.device, wall=True, warmup=1, least=3, title=group, **options.effort)
        for name in runs:
            ratios = METHODS[name].ratios | ({"over_oftv1": "oftv1"} if name == "oft" else {})
            rows[name] |= timings(samples, name, ratios)
    except torch.OutOfMemoryError:
        for name in runs:
            rows[name]["missing"] = "out of memory with the other adapters beside it: not timed"
    runs.clear()
    _collect(options.device)
    yield from with_goals(rows)


def _peak(run: Any, device: torch.device) -> int:
    """The allocator's peak in a step, once the optimizer has its states; of the process on a CPU."""
    run(0)
    reset_peak(device)
    run(1)
    return memory(device, peak=True)


def _collect(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What is asked for, of the time and the memory of `oft` and `qoft`: at most so much of another method's.
GOALS = {
    "oft": {"lora": (1.0, 1.0), "lora-16bit": (1.0, 1.0), "oftv1": (0.1, 1 / 3)},
    "qoft": {"qlora": (1.0, 1.0), "qlora-16bit": (1.0, 1.0)},
}


def with_goals(rows: dict[str, Row]) -> list[Row]:
    """The rows of a group, and in that of this library the goals that it meets and misses."""
    for own, others in GOALS.items():
        if own not in rows:
            continue
        told = []
        for other, limits in others.items():
            for column, limit in zip(("ms", "measured_gib"), limits, strict=True):
                mine, theirs = rows[own].get(column), rows.get(other, {}).get(column)
                if mine and theirs:
                    mark = "met" if mine <= limit * theirs else "MISSED"
                    told.append(f"{column} <= {limit:.2g} {other}: {mine / theirs:.2f} {mark}")
        rows[own]["goals"] = "; ".join(told)
    return list(rows.values())


# ------------------------------------------------------------------------------------------------------------ shared


def _gib(**amounts: float) -> Row:
    return {name: float(f"{amount / GIB:.4g}") for name, amount in amounts.items()}


def _load(size: Size, options: Options, *, nf4: bool) -> Any:
    torch.manual_seed(options.seed)
    return models.random_model(size, options.device, options.dtype, nf4=nf4)


def _step(name: str, size: Size, base: str, batch: int, length: int, checkpointing: bool, device: str) -> Step:
    on_nf4 = {label: method for method, label in memory_model.METHODS.items()}
    return Step(size, on_nf4.get(name, name), base, batch, length, checkpointing, device)


def _shared(
    group: str, name: str, size: Size, base: str, batch: int, length: int, checkpointing: bool, options: Options
) -> Row:
    how = {"batch": batch, "length": length, "tokens": batch * length, "checkpointing": checkpointing}
    row = common(options, group, size=name, parameters=size.parameters, base_dtype=base, **how)
    return {key: value for key, value in row.items() if key != "model"}
