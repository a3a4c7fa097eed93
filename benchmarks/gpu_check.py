"""Everything that wants a GPU, in one command: the kernel tests, then benchmarks, figures and goals side by side.

    make gpu-check                                        # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --quick                # of each test one shape, one model's shapes, fewer rounds
    python benchmarks/gpu_check.py --only 'kernels|steps' # some suites; `tests` is one
    python benchmarks/gpu_check.py --device cpu           # tiny shapes: checks this script, not the speed

It needs torch and triton, nothing else, and no installation: the package is taken from this checkout. Parts that
compare with bitsandbytes or PEFT run where those are importable, and are reported as missing where not. Results are
checked against float64 before anything is timed. One table is printed, and written to results/gpu-<device>.csv, .json.

On a GPU each suite has a process of its own: one that fails, crashes or hangs costs no other's figures. Rows are
printed and written as they come, and what `--minutes` leave no time for is listed as not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_measure
import torch
from checkout import ROOT, package_folder
from tabular import aligned, write_csv

import measure

RESULTS = ROOT / "benchmarks" / "results"
SUITES = (
    "tests",
    *(f"gpu_kernels:{name}" for name in ("determinism", "kernels", "nf4_kernels")),
    *(f"gpu_layers:{name}" for name in ("launches", "saved", "host")),
    *(f"gpu_layers:{name}" for name in ("decoder", "decoder_nf4", "decoding", "decoding_nf4")),
    *(f"gpu_models:{name}" for name in ("steps", "steps_nf4")),
)
# What a suite may take, and the tests: several times what they should.
_SECONDS, _TEST_SECONDS = 240, 420


def test_files() -> list[str]:
    """The kernel tests; those of layers on 4-bit weights want bitsandbytes."""
    names = sorted(path.name for path in (ROOT / "tests").glob("test_kernels*.py"))
    names += ["test_quant_forms.py"] if importlib.util.find_spec("bitsandbytes") else []
    return [str(ROOT / "tests" / name) for name in names]


def run_tests(folder: str, log: Path, seconds: float, *, quick: bool) -> dict[str, object]:
    """The tests marked ``gpu``: a row of the table. What they print goes to ``log``."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"what": "tests on the device", "goal": "pass", "figure": f"missing: {', '.join(missing)}", "met": None}
    # The package comes from `folder`: not from the working directory, and with the options of pyproject.toml that want
    # plugins left out. A kernel that goes wrong takes all that follows in its process with it, so not many may fail.
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-o", "addopts=", "--maxfail=10"]
    command = [sys.executable, "-m", "pytest", *options, *["--quick"] * quick]
    # Blocking launches: an error belongs to the test that made it.
    place: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": folder, "CUDA_LAUNCH_BLOCKING": "1"}}
    parts = log.parent / log.stem  # a file for each process while they run
    parts.mkdir(parents=True, exist_ok=True)

    def run(tests: str) -> tuple[int | None, str]:
        part = parts / f"{Path(tests).stem}.txt"
        with part.open("wb") as file:
            code = measure.run_limited([*command, tests], seconds, stdout=file, stderr=file, **place)
        return code, part.read_text(encoding="utf-8", errors="replace")

    # Compiling takes most of the time, up to 900 variants of the kernels: a process for each file of tests.
    with ThreadPoolExecutor(len(test_files())) as pool:
        found = list(pool.map(run, test_files()))
    log.write_text("\n".join(text for _, text in found), encoding="utf-8")
    shutil.rmtree(parts)
    for code, text in found:
        if code:
            print(text[-6000:])
    without = "" if importlib.util.find_spec("bitsandbytes") else ", without those of 4-bit layers: no bitsandbytes"
    passed = all(code == 0 for code, _ in found)
    return {
        "what": f"tests on the device: {outcomes(found, seconds)}{without}",
        "goal": "pass",
        "figure": "pass" if passed else "FAIL",
        "met": passed,
    }


def outcomes(found: list[tuple[int | None, str]], seconds: float) -> str:
    """How many tests passed and failed, and where processes were stopped, from pytest's last lines."""
    counts: Counter[str] = Counter()
    stopped = []
    for code, text in found:
        last = (text.strip().splitlines() or ["nothing was printed"])[-1].strip("= ")
        if code is None:
            stopped.append(f"stopped after {seconds:.0f} s at {last}")
            continue
        for number, outcome in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last):
            counts[outcome] += int(number)
    ended = ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "no process ran to its end"
    return "; ".join([ended, *stopped])


def run_suite(suite: str, seconds: float, *, device: str, quick: bool, isolated: bool) -> list[dict[str, object]]:
    """The rows of one suite; one that says what went wrong where it fails."""
    name = suite.partition(":")[2]
    arguments = {"suite": suite, "device": device, "quick": quick}
    try:
        if not isolated:
            return gpu_measure.run_suite(**arguments)
        return measure.in_fresh_process("gpu_measure:run_suite", seconds=seconds, **arguments)
    except measure.MissingError as missing:
        return [gpu_measure.row(f"{name}: {missing}", "", "missing")]
    except (Exception, SystemExit) as error:  # whatever happens to one suite, the others' figures are wanted
        print(error, file=sys.stderr, flush=True)
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return [gpu_measure.row(f"{name}: {last}", "runs", "FAIL", False)]


def table(rows: list[dict[str, object]]) -> str:
    """Goal and figure side by side."""
    marks = {True: "met", False: "MISSED", None: ""}
    cells = [[str(r["what"]), str(r["goal"]), str(r["figure"]), marks[r["met"]]] for r in rows]  # type: ignore[index]
    cells.insert(0, ["what", "goal", "figure", ""])
    lines = aligned(cells)
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write(out: Path, about: dict[str, object], rows: list[dict[str, object]]) -> None:
    """The table as far as it is there, as ``<out>.csv`` and ``<out>.json``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    write_csv(Path(f"{out}.csv"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="of each test one shape, one model's, fewer rounds")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", metavar="PATTERN", help="suites whose names match a regular expression")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.5, help="start nothing after so long (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write <out>.csv and <out>.json instead of results/gpu-<device>.*")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu runs the script on tiny shapes, to check the script")
    folder = package_folder()
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder  # for the suites' own processes
    on_gpu = args.device == "cuda"
    if on_gpu:
        from oftv2.functional import runs_kernels

        if not runs_kernels(torch.device(args.device)):
            raise SystemExit("Triton's kernels do not run on this device: there is nothing to check")
    about = gpu_measure.about(gpu_measure.Settings(torch.device(args.device), quick=args.quick))
    out = args.out or RESULTS / f"gpu-{str(about['device']).replace(' ', '-').lower()}"
    rows: list[dict[str, object]] = []
    for suite in SUITES:
        if not re.search(args.only, suite) or (suite == "tests" and args.skip_tests):
            continue
        before = time.perf_counter()
        left = 60 * args.minutes - (before - start)
        if left < 10:
            found = [gpu_measure.row(f"{suite}: no time was left of --minutes {args.minutes:g}", "", "not run")]
        elif suite == "tests":
            found = [run_tests(folder, Path(f"{out}-tests.txt"), min(left, _TEST_SECONDS), quick=args.quick)]
        else:
            limits = {"device": args.device, "quick": args.quick, "isolated": on_gpu}
            found = run_suite(suite, min(left, _SECONDS), **limits)
        rows += found
        print(f"{suite}: {time.perf_counter() - before:.0f} s", file=sys.stderr, flush=True)
        if on_gpu:
            print(table(found), flush=True)
        if on_gpu or args.out:
            write(out, about, rows)
    print(json.dumps(about), table(rows), sep="\n")
    if not on_gpu:
        print("tiny shapes on a CPU: the figures mean nothing")
    if any(r["figure"] == "FAIL" for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
