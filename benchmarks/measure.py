"""Measuring, for every benchmark here: interleaved timings, bytes kept for the backward pass, peak memory of a fresh
process, errors. Needs torch alone.

    python benchmarks/measure.py MODULE:FUNCTION '{"argument": 1}'   # what `in_fresh_process` runs
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
# glibc returns freed activations to the system at once, and page faults then drown what is measured.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 33)}
Run = Callable[[int], object]
Row = dict[str, Any]


class MissingError(Exception):
    """A package that is compared with, or a model, is not there; the message says which and how to get it."""


def require(*packages: str) -> None:
    """Raises MissingError for the first package that cannot be imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"{package} is not installed")


def keep_freed_memory() -> None:
    """Starts this program again with an allocator that keeps freed memory, unless it has it already."""
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})


def bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    """The items behind a progress bar, on a terminal and where tqdm is there."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=title, leave=False, disable=None)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖``, in float32 or the wider dtype of the two."""
    wide = torch.promote_types(torch.promote_types(actual.dtype, expected.dtype), torch.float32)
    exact = expected.to(wide)
    return (torch.linalg.norm(actual.to(wide) - exact) / torch.linalg.norm(exact)).item()


# ------------------------------------------------------------------------------------------------------------- time


def interleave(
    runs: dict[str, Run],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = math.inf,
    least: int = 5,
    warmup: int = 2,
    wall: bool = False,
    calibrate: bool = False,
    title: str = "",
) -> dict[str, list[float]]:
    """Seconds of each run, a list over rounds; in a round each has its turn, in an order that alternates.

    A machine whose speed drifts then favours nobody, and figures of one round can be compared.

    Args:
        runs: what to time; each is given the number of its round, to choose its inputs by.
        rounds, warmup: how many rounds count, after how many that do not.
        seconds: ends early after so long, if ``least`` rounds have been taken.
        wall: take the clock on a GPU too, for work that waits for Python; otherwise events, behind a pause in the
            queue that hides how long launching takes.
        calibrate: repeat runs that take less than some milliseconds within a sample.
        title: what a progress bar calls this.
    """
    samples: dict[str, list[Any]] = {name: [] for name in runs}
    repeats = dict.fromkeys(runs, 1)
    on_gpu = device.type == "cuda"
    events = on_gpu and not wall
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    start = time.perf_counter()
    for round_ in bar(range(warmup + rounds), title):
        if round_ >= warmup + least and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items() if round_ % 2 else reversed(runs.items()):
            if events:
                torch.cuda._sleep(4_000_000)
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                run(round_)
                marks[1].record()
                samples[name].append(marks)
                continue
            synchronize()
            before = time.perf_counter()
            for _ in range(repeats[name]):
                run(round_)
            synchronize()
            taken = (time.perf_counter() - before) / repeats[name]
            samples[name].append(taken)
            if calibrate and round_ < warmup:
                repeats[name] = math.ceil(0.01 / taken)
        synchronize()
    return {
        name: [1e-3 * a.elapsed_time(b) for a, b in taken[warmup:]] if events else taken[warmup:]
        for name, taken in samples.items()
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    if len(values) == 1:
        return (values[0],) * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def spread(name: str, values: list[float], digits: int) -> Row:
    """The median of a column and, beside it, its quartiles."""
    rounded = [float(f"{value:.{digits}g}") for value in quartiles(values)]
    return {name: rounded[1], f"{name}_q1": rounded[0], f"{name}_q3": rounded[2]}


def timings(samples: dict[str, list[float]], method: str, references: dict[str, str]) -> Row:
    """The columns of one method: its time, and its ratio to each reference, round by round.

    Args:
        references: the methods to divide by, by the name of the ratio's column; those that were not run are left out.
    """
    row = {**spread("ms", [1e3 * value for value in samples[method]], 4), "rounds": len(samples[method])}
    for column, reference in references.items():
        if reference in samples:
            ratios = [a / b for a, b in zip(samples[method], samples[reference], strict=True)]
            row |= spread(column, ratios, 4)
    return row


# ----------------------------------------------------------------------------------------------------------- memory


@contextmanager
def saved_bytes(*modules: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for the backward pass, by storage, exactly.

    Parameters and buffers of ``modules`` are there anyway and not counted.
    """
    there = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def memory(device: torch.device, *, peak: bool) -> int:
    """Bytes in use now, or at most since :func:`reset_peak`: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    # Not getrusage: a child's ru_maxrss starts at what its parent had.
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak(device: torch.device) -> None:
    """Lets the peak start from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def run_limited(command: list[str], seconds: float | None, **options: Any) -> int | None:
    """The exit status of a command; None where it took longer than ``seconds`` and was killed with all it started."""
    process = subprocess.Popen(command, preexec_fn=os.setpgrp, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def in_fresh_process(function: str, *, seconds: float | None = None, **arguments: Any) -> Any:
    """What ``module:function`` of this folder returns, called in a process of its own.

    Raises:
        MissingError: it raised one.
        RuntimeError: it failed otherwise, or took longer than ``seconds``; with the end of what it wrote to stderr.
    """
    # Freed memory goes back to the system there, as it does for a user.
    environment = {key: value for key, value in os.environ.items() if key not in MALLOC}
    command = [sys.executable, str(FOLDER / "measure.py"), function, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = run_limited(command, seconds, stdout=stdout, stderr=stderr, env=environment)
        written = [file.seek(0) or file.read() for file in (stdout, stderr)]
    if code is None:
        raise RuntimeError(f"{written[1][-3000:]}\n{function}({arguments}) took more than {seconds:.0f} s")
    if code:
        raise RuntimeError(f"{function}({arguments}) failed:\n{written[1][-3000:]}")
    answer = json.loads(written[0].splitlines()[-1])
    if "missing" in answer:
        raise MissingError(answer["missing"])
    return answer["result"]


def _serve(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**json.loads(arguments))}
    except MissingError as error:
        answer = {"missing": str(error)}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    import checkout

    checkout.make_importable()
    # The class that callers catch is this module's, not that of `__main__`.
    importlib.import_module("measure")._serve(*sys.argv[1:])
