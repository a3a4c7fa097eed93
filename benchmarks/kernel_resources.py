"""What the compiled Triton kernels need on each GPU generation, found out without a GPU.

    python benchmarks/kernel_resources.py --check                                   # does everything fit? exit 1 if not
    python benchmarks/kernel_resources.py --only 'rotate .* b=32' --targets 90      # some cases, one target
    python benchmarks/kernel_resources.py --out benchmarks/results/kernel-resources # the committed table

Each case of ``kernel_cases.py`` calls a launcher as users' calls do, on tensors without memory. A stand-in for the CUDA
driver names the target, and a launch compiles its kernel and stops there; so what is examined is what would run on that
GPU: the launcher's own tile sizes, warps and stages, and Triton's own specialization on divisible arguments. The
figures are read from the machine code (``cuobjdump``, which ships with Triton). Triton's cache makes reruns fast.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


class GPU(NamedTuple):
    """What launchers ask of a device; KiB as in the CUDA programming guide's table of technical specifications."""

    multiprocessors: int
    shared_kib: int  # that one block can have

    def answers(self) -> dict[str, int]:
        """By the functions of ``oftv2.kernels.tiles`` that ask."""
        return {"multiprocessors": self.multiprocessors, "shared_memory": self.shared_kib * 1024}


# By compute capability: A100, RTX 3090, RTX 4090, H100 and H200, B200, RTX 5090.
GPUS = {80: GPU(108, 163), 86: GPU(82, 99), 89: GPU(128, 99), 90: GPU(132, 227), 100: GPU(148, 227), 120: GPU(170, 99)}
TARGETS = [80, 90, 100]
CASES = Path(__file__).parent / "kernel_cases.py"

Row = dict[str, Any]


class CompileOnlyDriver:
    """Takes the CUDA driver's place in Triton: says which GPU to compile for, and knows no other."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device: one "device" a target

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launch: Any, capability: int, device: str = "meta") -> list[tuple[Any, Any]]:
    """The kernels that ``launch(device)`` launches, compiled for a target and not run: (function, compiled kernel)."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # Triton's default is what users run
    launches: list[tuple[Any, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return launches[-1][1]

    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in [module for name, module in sys.modules.items() if name.startswith("oftv2.kernels.")]:
            for name, answer in GPUS[capability].answers().items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, return_value=answer))
        launch(torch.device(device))
    return launches


def find_cuobjdump() -> str:
    """The disassembler that ships with Triton, or else one on the path."""
    import triton

    try:
        return triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError) as error:
        if found := shutil.which("cuobjdump"):
            return found
        raise SystemExit(
            "cuobjdump is neither in the triton package nor on PATH; it is part of the CUDA toolkit"
        ) from error


class Binary(NamedTuple):
    """What the machine code of a kernel shows."""

    registers: int  # a thread
    spilled_bytes: int  # of a thread: what it keeps in memory for want of registers
    spills_in_loops: int  # instructions that move such bytes, between a loop's first and last instruction
    tensor_cores: str  # names of the instructions that use them


def read_binary(cubin: bytes, cuobjdump: str) -> Binary:
    """Takes a kernel's machine code apart."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)(.*?);", text, re.MULTILINE)
    code = [(int(address, 16), name, rest) for address, name, rest in lines]
    if usage is None or not any(name == "EXIT" for _, name, _ in code):
        raise RuntimeError(f"{' '.join(command)} printed something that is not understood: {text[:500]!r}")
    registers, stack, local = map(int, usage.groups())
    jumps = [
        (int(to[0], 16), at) for at, name, rest in code if name == "BRA" and (to := re.findall("0x[0-9a-f]+", rest))
    ]
    loops = [(start, end) for start, end in jumps if start < end]
    spills = [at for at, name, _ in code if name in ("LDL", "STL") and any(start <= at <= end for start, end in loops)]
    tensor_cores = sorted({name for _, name, _ in code if name.endswith("MMA")})
    return Binary(registers, stack + local, len(spills), " ".join(tensor_cores) or "none")


@functools.lru_cache
def load_cases(path: Path) -> dict[str, Any]:
    """The cases of a file by name."""
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    cases = {case.name: case for case in module.CASES}
    if len(cases) != len(module.CASES):
        raise SystemExit(f"{path}: two cases have the same name")
    return cases


def examine(path: Path, name: str, capability: int, cuobjdump: str) -> tuple[list[Row], list[str]]:
    """One case for one target: a row for each kernel it launches, and what is wrong with it."""
    case = load_cases(path)[name]
    where = f"{name}, sm_{capability}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints code that it could not compile
            launches = compile_launches(case.launch, capability)
    except Exception as error:  # whatever a launcher or the compiler raises is this case's finding
        return [], [f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"]
    rows: list[Row] = []
    problems = [] if launches else [f"{where}: launches no kernel"]
    for function, compiled in launches:
        kernel = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"
        binary = read_binary(compiled.asm["cubin"], cuobjdump)
        row = {
            "case": name,
            "target": f"sm_{capability}",
            "kernel": kernel,
            "num_warps": compiled.metadata.num_warps,
            "num_stages": compiled.metadata.num_stages,
            "shared_bytes": compiled.metadata.shared,
            **binary._asdict(),
        }
        if row in rows:
            continue
        rows.append(row)
        if binary.spilled_bytes:
            problems.append(
                f"{where}, {kernel}: spills {binary.spilled_bytes} bytes a thread "
                f"({binary.spills_in_loops} instructions in loops)"
            )
        if row["shared_bytes"] > GPUS[capability].shared_kib * 1024:
            problems.append(
                f"{where}, {kernel}: needs {row['shared_bytes']} bytes of shared memory, "
                f"a block has {GPUS[capability].shared_kib * 1024}"
            )
        if binary.tensor_cores == "none" and function.fn.__name__ not in case.plain:
            problems.append(f"{where}, {kernel}: no tensor-core instructions")
    return rows, problems


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
    cuobjdump = find_cuobjdump()
    tasks = [(name, target) for name in names for target in targets]
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(examine, path, name, target, cuobjdump) for name, target in tasks]
        labels = {future: f"{name}, sm_{target}" for future, (name, target) in zip(futures, tasks, strict=True)}
        for future in follow(labels):
            future.result()
    results = [future.result() for future in futures]
    return [row for rows, _ in results for row in rows], [line for _, lines in results for line in lines]


def write(rows: list[Row], out: Path) -> None:
    """The table, and beside it what it was made with."""
    import torch
    import triton

    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    out.with_suffix(".json").write_text(json.dumps({"versions": versions}, indent=2) + "\n")


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
        widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
        for row in [{key: key for key in widths}, *rows]:
            print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip())
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
