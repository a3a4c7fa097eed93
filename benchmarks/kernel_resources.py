"""What the compiled Triton kernels need on each GPU generation, found out without a GPU.

    python benchmarks/kernel_resources.py --check                                   # does everything fit? exit 1 if not
    python benchmarks/kernel_resources.py --only 'rotate .* b=32' --targets 90      # some cases, one target
    python benchmarks/kernel_resources.py --out benchmarks/results/kernel-resources # the committed table

Each case of ``kernel_cases.py`` calls a launcher as users' calls do, on tensors without memory, and what it launches is
compiled (``kernel_launches.py``). The figures are read from the machine code (``kernel_binaries.py``). Triton's cache
makes reruns fast. Each row also has a hash of what its kernel is compiled from, which is found 20 times as fast: where
that and Triton's version are the same, so are the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tabular import aligned, write_csv

from kernel_binaries import Instructions, Usage, disassemble, find_disassemblers, read_usage
from kernel_launches import GPUS, compile_launches, kernel_name, launch_sources

TARGETS = [80, 90, 100]
CASES = Path(__file__).parent / "kernel_cases.py"

Row = dict[str, Any]


@functools.lru_cache
def load_cases(path: Path) -> dict[str, Any]:
    """The cases of a file by name."""
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    cases = {case.name: case for case in module.CASES}
    if len(cases) != len(module.CASES):
        raise SystemExit(f"{path}: two cases have the same name")
    return cases


class Compiled(NamedTuple):
    """A kernel that a case launches on a target: all but what its instructions tell."""

    where: str
    capability: int
    row: Row
    usage: Usage
    plain: bool  # is to use no tensor cores


def compile_case(path: Path, name: str, capability: int, cuobjdump: str) -> tuple[list[Compiled], list[str]]:
    """One case for one target: the kernels it launches, and why there are none."""
    case = load_cases(path)[name]
    where = f"{name}, sm_{capability}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints code that it could not compile
            sources = launch_sources(case.launch, capability)
            launches = compile_launches(case.launch, capability)
    except Exception as error:  # whatever a launcher or the compiler raises is this case's finding
        return [], [f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"]
    found: list[Compiled] = []
    for (function, source), (_, compiled) in zip(sources, launches, strict=True):
        row = {
            "case": name,
            "target": f"sm_{capability}",
            "kernel": kernel_name(function),
            "source": source,
            "num_warps": compiled.metadata.num_warps,
            "num_stages": compiled.metadata.num_stages,
            "shared_bytes": compiled.metadata.shared,
        }
        usage = read_usage(compiled.asm["cubin"], cuobjdump)
        found.append(Compiled(where, capability, row, usage, function.fn.__name__ in case.plain))
    return found, [] if launches else [f"{where}: launches no kernel"]


def examine(kernel: Compiled, instructions: Instructions) -> tuple[Row, list[str]]:
    """A kernel's row, and what is wrong with it."""
    registers, spilled, *_ = kernel.usage
    row = {**kernel.row, "registers": registers, "spilled_bytes": spilled, **instructions._asdict()}
    what, problems = f"{kernel.where}, {row['kernel']}", []
    if spilled:
        problems.append(f"{what}: spills {spilled} bytes a thread ({row['spills_in_loops']} instructions in loops)")
    limit = GPUS[kernel.capability].shared_kib * 1024
    if row["shared_bytes"] > limit:
        problems.append(f"{what}: needs {row['shared_bytes']} bytes of shared memory, a block has {limit}")
    if row["tensor_cores"] == "none" and not kernel.plain:
        problems.append(f"{what}: no tensor-core instructions")
    return row, problems


def follow(futures: dict[Future[Any], str]) -> Iterator[Future[Any]]:
    """The futures as they finish, with a progress bar, or a line each where tqdm is missing."""
    finished: Iterable[Future[Any]] = as_completed(futures)
    try:
        from tqdm import tqdm
    except ImportError:
        for count, future in enumerate(finished, 1):
            print(f"{count}/{len(futures)} {futures[future]}", file=sys.stderr, flush=True)
            yield future
    else:
        yield from tqdm(finished, total=len(futures), unit="case", disable=None)


def examine_all(path: Path, only: str, targets: list[int], jobs: int) -> tuple[list[Row], list[str]]:
    """All rows in the cases' order, and all problems."""
    names = [name for name in load_cases(path) if re.search(only, name)]
    if not names:
        raise SystemExit(f"--only {only!r} matches no case of {path}")
    programs = find_disassemblers()
    tasks = [(name, target) for name in names for target in targets]
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_case, path, name, target, programs.cuobjdump) for name, target in tasks]
        labels = {future: f"{name}, sm_{target}" for future, (name, target) in zip(futures, tasks, strict=True)}
        for future in follow(labels):
            future.result()
    results = [future.result() for future in futures]
    codes: dict[str, list[bytes]] = {}
    for usage in (kernel.usage for kernels, _ in results for kernel in kernels):
        codes.setdefault(usage.architecture, []).append(usage.code)
    read = {name: iter(disassemble(each, name, programs.nvdisasm)) for name, each in codes.items()}
    rows: list[Row] = []
    problems: list[str] = []
    for kernels, failures in results:
        problems += failures
        for kernel in kernels:
            row, wrong = examine(kernel, next(read[kernel.usage.architecture]))
            if row not in rows:
                rows.append(row)
                problems += wrong
    return rows, problems


def write(rows: list[Row], out: Path) -> None:
    """The table, and beside it what it was made with."""
    import torch
    import triton

    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out.with_suffix(".csv"), rows)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    out.with_suffix(".json").write_text(json.dumps({"versions": versions}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose names match a regular expression")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=sorted(GPUS))
    parser.add_argument(
        "--check", action="store_true", help="exit 1, with a list, where a kernel is not as it should be"
    )
    parser.add_argument("--cases", type=Path, default=CASES, help="file with a list CASES (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write <out>.csv and <out>.json")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton: the interpreter compiles nothing
    rows, problems = examine_all(args.cases.resolve(), args.only, args.targets, args.jobs)
    if rows:
        print(*aligned([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]), sep="\n")
    if args.out and rows:
        write(rows, args.out)
    if problems:
        print(f"\n{len(problems)} problems:", *problems, sep="\n  ", file=sys.stderr)
    if args.check and problems:
        raise SystemExit(1)
    if args.check:
        print(f"\n{len(rows)} kernels are as they should be")


if __name__ == "__main__":
    main()
