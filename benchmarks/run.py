"""One command for every benchmark: suites by name, methods by name, on whatever machine this is.

    python benchmarks/run.py                                  # every suite; resumes where it was stopped
    python benchmarks/run.py layer step --methods oft lora    # some suites and methods
    python benchmarks/run.py --quick                          # all on tiny sizes, two minutes: the figures mean little
    python benchmarks/run.py layer --only '^1024 x' --again   # some groups, measured anew
    python benchmarks/run.py step --device cuda --model Llama-3-8B

Methods take turns round by round and ratios are taken within a round, after a warm-up; figures are medians with
quartiles (columns ending in _q1 and _q3). Results are checked before anything is timed. Each group of rows is written
as soon as it is measured, to results/SUITE-DEVICE.csv and .json; a row has the device, the versions, the commit, the
seed, and the share of the processors that other programs took meanwhile (others_cpu; --undisturbed 0.05 measures anew
where that was more). A peer that is not installed gets a row that says so. `python benchmarks/report.py` makes tables
and plots of the results.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkout

checkout.make_importable()

import torch  # noqa: E402
from provenance import Neighbours, environment  # noqa: E402
from tabular import aligned, write_csv  # noqa: E402

from measure import MissingError, Row, keep_freed_memory  # noqa: E402
from methods import METHODS, Sizes  # noqa: E402
from options import Options  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = checkout.ROOT / "benchmarks" / "results"
QUICK = Path("runs") / "benchmarks"
# Each is `module:function`, called with Options; it gives rows, of which those of one "group" come one after another.
SUITES = {
    "layer": "suite_layer:measure",
    "kernels": "suite_kernels:measure",
    "step": "suite_step:measure",
    "memory": "suite_memory:measure",
    "sizes": "suite_sizes:measure",
    "decode": "suite_decode:measure",
    "merge": "suite_merge:measure",
    "wrap": "suite_wrap:measure",
    "rows": "suite_rows:measure",
    "experts": "suite_experts:measure",
    "quality": "study:quality",
    "forgetting": "study:forgetting",
}


class Results:
    """The rows of one suite on one device, in two files that are rewritten whole after every group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        json_file = path.with_name(f"{path.name}.json")
        self.rows: list[Row] = json.loads(json_file.read_text(encoding="utf-8")) if json_file.is_file() else []

    def done(self, methods: tuple[str, ...] | None, disturbed: float = 1.0) -> set[str]:
        """The groups that are there, with all of ``methods`` if some are asked for, and with neighbours no busier."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            if row.get("others_cpu", 0) <= disturbed:
                found.setdefault(row["group"], set()).add(row.get("method", ""))
        return {group for group, there in found.items() if there.issuperset(methods or ())}

    def add(self, rows: list[Row]) -> None:
        """Puts new rows in the place of those of the same group and method."""
        new = {(row["group"], row.get("method", "")) for row in rows}
        new |= {(row.get("suite"), "") for row in rows}  # that the suite as a whole was missing
        self.rows = [row for row in self.rows if (row["group"], row.get("method", "")) not in new] + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        _replace(self.path.with_name(f"{self.path.name}.json"), f"[\n{lines}\n]\n")
        write_csv(self.path.with_name(f"{self.path.name}.csv"), self.rows)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def find(suite: str) -> Callable[[Options], Iterable[Row]]:
    """The function of a suite."""
    module, _, function = SUITES[suite].partition(":")
    if importlib.util.find_spec(module) is None:
        raise MissingError(f"benchmarks/{module}.py is not there")
    found = getattr(importlib.import_module(module), function, None)
    if found is None:
        raise MissingError(f"benchmarks/{module}.py has no function {function}(options)")
    return found


def run(suite: str, options: Options, results: Results, about: Row) -> list[Row]:
    """Measures a suite and returns its new rows; each group is written when it is complete."""
    new: list[Row] = []
    start, neighbours = time.perf_counter(), Neighbours()
    try:
        groups = itertools.groupby(find(suite)(options), key=lambda row: row["group"])
        for group, found in groups:
            measured = list(found)
            taken = {"seed": options.seed, "run": RUN, "others_cpu": neighbours.share(), **about}
            rows = [{"suite": suite, **row, **taken} for row in measured]
            results.add(rows)
            new += rows
            seconds, start = time.perf_counter() - start, time.perf_counter()
            print(f"{suite}: {group}: {len(rows)} rows, {seconds:.0f} s", file=sys.stderr, flush=True)
    except MissingError as error:
        rows = [{"suite": suite, "group": suite, "missing": str(error), "run": RUN, **about}]
        results.add(rows)
        new += rows
    return new


# When this run began: rows with the same were measured in turn.
RUN = time.strftime("%Y-%m-%dT%H:%M:%S")


def table(rows: list[Row]) -> str:
    """The figures of a suite; what is the same in every row stands above."""
    columns = [key for key in dict.fromkeys(itertools.chain.from_iterable(rows)) if not key.endswith(("_q1", "_q3"))]
    same = [key for key in columns if key not in ("group", "method") and len({str(r.get(key)) for r in rows}) == 1]
    shown = [key for key in columns if key not in same]
    text = aligned([shown, *([_cell(row, key) for key in shown] for row in rows)])
    stated = ", ".join(f"{key} {rows[0][key]}" for key in same if rows[0].get(key) not in (None, ""))
    return "\n".join([stated, text[0], "-" * len(text[0]), *text[1:]])


def _cell(row: Row, key: str) -> str:
    value: Any = row.get(key, "")
    if f"{key}_q1" in row:
        return f"{value:g} [{row[f'{key}_q1']:g}, {row[f'{key}_q3']:g}]"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all without any")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all works")
    parser.add_argument("--only", default="", metavar="REGEX", help="groups whose name contains it")
    parser.add_argument("--again", action="store_true", help="measure groups anew that have results")
    parser.add_argument(
        "--undisturbed", type=float, metavar="SHARE", help="measure anew what other programs took more of the CPUs from"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--model", help="smollm2 (default), tiny, a model_sizes name, a folder or hub name")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, help="that count, at most: 21, with --quick 3")
    parser.add_argument("--seconds", type=float, default=20.0, help="for a group, once five rounds are there: 20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="folder for results; default benchmarks/results, --quick: runs/benchmarks"
    )
    args = parser.parse_args(arguments)
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    return args


def main() -> None:
    args = parse()
    folder: Path = args.out or (QUICK if args.quick else RESULTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"run.py: error: no results can be written: {error}; name another folder with --out") from None
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    about = environment(device)
    place = "cpu" if device.type == "cpu" else about["device"].lower().replace(" ", "-")
    for suite in args.suites or SUITES:
        results = Results(folder / f"{suite}-{place}")
        methods = tuple(args.methods) if args.methods else None
        options = Options(
            device=device,
            dtype=getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16")),
            quick=args.quick,
            methods=methods,
            model=args.model or ("tiny" if args.quick else "smollm2"),
            sizes=Sizes(args.block_size, args.rank),
            rounds=args.rounds or (3 if args.quick else 21),
            seconds=args.seconds,
            seed=args.seed,
            only=args.only,
            done=set() if args.again else results.done(methods, 1.0 if args.undisturbed is None else args.undisturbed),
        )
        new = run(suite, options, results, about)
        print(f"\n{suite}: {results.path}.csv, .json")
        print(table(new) if new else "nothing new to measure (--again measures anew)")
    if args.quick:
        print("\ntiny sizes: the figures mean little")


if __name__ == "__main__":
    main()
