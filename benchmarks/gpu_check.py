"""Everything that wants a GPU, in one command: the kernel tests, then benchmarks, figures and goals side by side.

    make gpu-check                               # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --quick       # one model's shapes, fewer rounds
    python benchmarks/gpu_check.py --device cpu  # the same code on tiny shapes: checks this script, not the speed

It needs torch and triton, nothing else, and no installation: the package is taken from this checkout. Parts that
compare with bitsandbytes or PEFT run where those are importable, and are reported as missing where not. Results are
checked against float64 before anything is timed. One table is printed, and written to results/gpu-<device>.csv, .json.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from checkout import ROOT, package_folder

RESULTS = ROOT / "benchmarks" / "results"


def test_files() -> list[str]:
    """The kernel tests; those on 4-bit weights want bitsandbytes to compare with."""
    names = sorted(path.name for path in (ROOT / "tests").glob("test_kernels*.py"))
    names.append("test_quant_forms.py")
    if importlib.util.find_spec("bitsandbytes") is None:
        names = [name for name in names if name not in ("test_kernels_nf4.py", "test_quant_forms.py")]
    return [str(ROOT / "tests" / name) for name in names]


def run_tests(folder: str) -> dict[str, object]:
    """The tests marked ``gpu``: a row of the table."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"what": "tests on the device", "goal": "pass", "figure": f"missing: {', '.join(missing)}", "met": None}
    # The package comes from `folder`: not from the working directory, and with the options of pyproject.toml that want
    # plugins left out.
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-o", "addopts="]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *test_files()],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": folder},
        check=False,
    )
    if finished.returncode:
        print(finished.stdout[-6000:], finished.stderr[-2000:], sep="\n")
    lines = finished.stdout.strip().splitlines() or ["nothing was printed"]
    without = "" if importlib.util.find_spec("bitsandbytes") else ", without those on 4-bit weights: no bitsandbytes"
    return {
        "what": f"tests on the device: {lines[-1].strip('= ')}{without}",
        "goal": "pass",
        "figure": "pass" if finished.returncode == 0 else "FAIL",
        "met": finished.returncode == 0,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Goal and figure side by side."""
    marks = {True: "met", False: "MISSED", None: ""}
    cells = [[str(r["what"]), str(r["goal"]), str(r["figure"]), marks[r["met"]]] for r in rows]  # type: ignore[index]
    cells.insert(0, ["what", "goal", "figure", ""])
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 6), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model's shapes, fewer rounds")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--out", type=Path, help="write <out>.csv and <out>.json instead of results/gpu-<device>.*")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu runs the script on tiny shapes, to check the script")
    folder = package_folder()
    sys.path.insert(0, folder)
    import gpu_kernels
    import gpu_layers
    import gpu_measure
    import gpu_models

    import measure

    rows = [] if args.skip_tests else [run_tests(folder)]
    settings = gpu_measure.Settings(torch.device(args.device), quick=args.quick)
    suites = [
        *(gpu_kernels.determinism, gpu_kernels.kernels, gpu_kernels.nf4_kernels),
        *(gpu_layers.decoder, gpu_layers.decoder_nf4, gpu_layers.decoding, gpu_layers.decoding_nf4),
        *(gpu_layers.saved, gpu_layers.launches, gpu_models.steps, gpu_models.steps_nf4),
    ]
    for suite in suites:
        start = time.perf_counter()
        try:
            found = suite(settings)
        except measure.MissingError as missing:
            found = [gpu_measure.row(f"{suite.__name__}: {missing}", "", "missing")]
        rows += found
        print(f"{suite.__name__}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    about = gpu_measure.about(settings)
    print(json.dumps(about), table(rows), sep="\n")
    if not settings.real:
        print("tiny shapes on a CPU: the figures mean nothing")
    if args.device == "cuda" or args.out:
        out = args.out or RESULTS / f"gpu-{str(about['device']).replace(' ', '-').lower()}"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
        with open(out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if any(r["figure"] == "FAIL" for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
