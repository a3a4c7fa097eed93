"""Tables of the study's results, finished or not (plots.py draws them).

python benchmarks/study_report.py > benchmarks/results/study-cpu.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from study_plan import HEAD_TO_HEAD, LORA, METHODS, OFT, SEEDS, TASKS, Method, Row, Run, best_lr, plan
from study_results import RESULTS, read
from study_stats import Interval, at_equal_loss, interval, paired
from tabular import markdown

CORPUS = "shakespeare"
NAMES = {"oft": "OFT b = ", "lora": "LoRA r = ", "dora": "DoRA r = ", "full": "all weights", "base": "base"}
BASES = {"float32": "", "nf4": ", NF4", "bfloat16": ", bf16"}


def label(method: Method) -> str:
    """Such as ``OFT b = 32, NF4``."""
    return f"{NAMES[method.kind]}{method.size or ''}{BASES[method.base]}"


def show(value: Interval | None, form: str, scale: float = 1.0) -> str:
    """``mean ± half width``, or the value alone where there is one seed."""
    if value is None:
        return "–"
    text = format(scale * value.mean, form)
    return text if math.isnan(value.half) else f"{text} ± {format(scale * value.half, form.lstrip('+'))}"


def accuracy(row: Row) -> float:
    return row["test"]["accuracy"]


def loss(row: Row) -> float:
    return row["test"]["loss"]


def prose(row: Row) -> float:
    return row["prose_perplexity"]


def others(row: Row) -> float:
    """Mean loss of the answers to the tasks that were not trained on."""
    return sum(score["loss"] for score in row["others"].values()) / len(row["others"])


def quality(task: str) -> tuple[str, Callable[[Row], float], str, float]:
    """A task's own figure: its name, the function, its format and scale."""
    if task == CORPUS:
        return "perplexity of a play not trained on", lambda row: math.exp(loss(row)), ".1f", 1.0
    return "held-out exactly right, %", accuracy, ".1f", 100.0


class Results:
    """The rows, by what the tables ask for."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.finite = [row for row in rows if not row.get("diverged")]

    def of(self, study: str, task: str, method: Method) -> list[Row]:
        """Every run that did not diverge, of all learning rates and seeds."""
        wanted = (study, task, method.name)
        return [row for row in self.finite if (row["study"], row["task"], row["method"]) == wanted]

    def sweep(self, task: str, method: Method) -> list[Row]:
        """The runs of all learning rates with the first seed."""
        return [row for row in self.of("quality", task, method) if row["seed"] == SEEDS[0]]

    def base(self, task: str, base: str) -> Row | None:
        return next((r for r in self.finite if r["key"] == f"base/{task}/{base}"), None)

    def best(self, task: str, method: Method) -> list[Row]:
        """The runs at the learning rate chosen on validation data, a row a seed; empty while the sweep is running."""
        lr = best_lr(self.rows, Run("quality", task, method, SEEDS[0], None))
        return [row for row in self.of("quality", task, method) if row["lr"] == lr]


def task_table(results: Results, task: str) -> str:
    """What each method gave on one task at its best learning rate."""
    name, figure, form, scale = quality(task)
    learned = "loss" if task == CORPUS else "loss of the answers"
    head = ["", "trainable", "learning rate", "seeds", name, learned, "perplexity of prose", "loss, other tasks"]
    head.append("CPU s a step (shared machine)")
    lines = []
    for base in BASES:
        if (row := results.base(task, base)) is not None:
            values = [format(scale * figure(row), form), f"{loss(row):.3f}", f"{prose(row):.1f}", f"{others(row):.2f}"]
            lines.append([f"base{BASES[base]}", "0", "", "", *values, ""])
    for method in METHODS:
        rows = results.best(task, method)
        if not rows:
            continue
        lr, tried = rows[0]["lr"], {row["lr"] for row in results.sweep(task, method)}
        figures = [(figure, form, scale), (loss, ".3f", 1.0), (prose, ".1f", 1.0), (others, ".2f", 1.0)]
        lines.append(
            [
                label(method),
                f"{rows[0]['trainable'] / 1e6:.2f} M",
                f"{lr:g}" + (" (edge)" if lr in (min(tried), max(tried)) else ""),
                str(len(rows)),
                *(show(interval([f(row) for row in rows]), form, scale) for f, form, scale in figures),
                f"{sum(row['cpu_seconds'] / row['steps'] for row in rows) / len(rows):.2f}",
            ]
        )
    return markdown([head, *lines])


def sweep_table(results: Results) -> str:
    """Test loss at every learning rate that was tried, first seed: the effort was equal."""
    lines = []
    for task in TASKS:
        for method in METHODS:
            found = {row["lr"]: loss(row) for row in results.sweep(task, method)}
            if found:
                lines.append([task, label(method), ", ".join(f"{lr:g}: {found[lr]:.3f}" for lr in sorted(found))])
    return markdown([["task", "method", "learning rate: loss"], *lines])


NF4_OFT, NF4_LORA = HEAD_TO_HEAD[2:]
PAIRS = ((OFT, LORA), (NF4_OFT, NF4_LORA), (NF4_OFT, OFT), (NF4_LORA, LORA))


def paired_table(results: Results) -> str:
    """Differences between methods at their best learning rates, by seed."""
    lines = []
    for ours, theirs in PAIRS:
        for task in TASKS:
            a, b = results.best(task, ours), results.best(task, theirs)
            differences = [paired(a, b, figure) for figure in (accuracy, loss, prose)]
            if differences[0] is not None:
                shown = ["–" if task == CORPUS else show(differences[0], "+.1f", 100)]
                shown += [show(differences[1], "+.3f"), show(differences[2], "+.1f")]
                lines.append([f"{label(ours)} − {label(theirs)}", task, str(differences[0].n), *shown])
    return markdown([["difference", "task", "seeds", "accuracy, points", "loss", "perplexity of prose"], *lines])


def forgetting_table(results: Results) -> str:
    """Prose perplexity where two methods are about equally good, over all learning rates of the first seed."""
    lines = []
    for ours, theirs in (*PAIRS[:2], (OFT, Method("full"))):
        for task in TASKS:
            found = least_forgetting(results, task, ours, theirs)
            cells = [f"{prose(row):.1f} (loss {loss(row):.3f}, lr {row['lr']:g})" for row in found]
            if cells:
                lines.append([task, f"{label(ours)}: {cells[0]}", f"{label(theirs)}: {cells[1]}"])
    return markdown([["task", "", ""], *lines])


def least_forgetting(results: Results, task: str, ours: Method, theirs: Method) -> list[Row]:
    """The runs of two methods that forgot least at about equal loss; none before both sweeps are done."""
    runs = {label(method): results.sweep(task, method) for method in (ours, theirs)}
    return list(at_equal_loss(runs).values()) if all(len(rows) >= 3 for rows in runs.values()) else []


def neumann_table(results: Results) -> str:
    """Terms of the series against the exact transform."""
    lines = []
    for row in sorted((r for r in results.rows if r["study"] == "neumann"), key=lambda r: r["method"]):
        name = "exact" if "parametrization" in row["options"] else f"k = {row['options']['neumann_terms']}"
        if row["diverged"]:
            lines.append([name, "diverged", "", "", "", ""])
            continue
        turned = row["rotation"]
        lines.append(
            [name, f"{100 * accuracy(row):.1f}", f"{loss(row):.3f}", f"{turned['orthogonality_error']:.1e}",
             f"{turned['generator_norm']:.2f}", f"{row['cpu_seconds'] / row['steps']:.2f}"]
        )  # fmt: skip
    head = ["", "held-out right, %", "loss", "‖RᵀR − I‖, worst layer", "‖Q‖, largest", "CPU s a step (shared machine)"]
    return markdown([head, *lines])


def grid_table(results: Results, study: str) -> str:
    """Test loss (and accuracy) of a study over learning rates, a row a method."""
    rows = [row for row in results.rows if row["study"] == study]
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["lr"])
        cells = [
            f"{row['lr']:g}: " + ("diverged" if row["diverged"] else f"{loss(row):.2f} ({100 * accuracy(row):.0f}%)")
            for row in mine
        ]
        lines.append([name, " · ".join(cells)])
    return markdown([["method", "learning rate: loss (accuracy)"], *lines])


def differences(results: Results, ours: Method, theirs: Method, figure: Callable[[Row], float]) -> dict[str, str]:
    """By task with several seeds of both: ours is ``"lower"``, ``"higher"`` or, within the noise, ``"open"``."""
    words = {}
    for task in TASKS:
        difference = paired(results.best(task, ours), results.best(task, theirs), figure)
        if difference is not None and difference.n > 1:
            words[task] = "open" if not difference.excludes_zero else "lower" if difference.mean < 0 else "higher"
    return words


def verdicts(results: Results) -> list[str]:
    """What the runs say of each goal, in words; intervals over seeds that hold zero decide nothing."""
    lines = []
    goals = (
        ("OFT b = 32 at least as good as LoRA r = 16 at half the parameters", PAIRS[0], loss),
        ("OFT b = 32 forgets less than LoRA r = 16 (each at its best learning rate)", PAIRS[0], prose),
        ("QOFT at least as good as QLoRA", PAIRS[1], loss),
        ("NF4 no worse than float32, with OFT", PAIRS[2], loss),
    )
    for text, (ours, theirs), figure in goals:
        found = differences(results, ours, theirs, figure)
        missing = [task for task in TASKS if task not in found]
        words = {"lower": "yes", "higher": "no", "open": "open"}
        said = ", ".join(f"{task} {words[word]}" for task, word in found.items()) or "nothing yet"
        lines.append(f"- {text}: {said}" + (f" (not run: {', '.join(missing)})" if missing else "") + ".")
    for ours, theirs in PAIRS[:2]:
        pairs = {task: least_forgetting(results, task, ours, theirs) for task in TASKS}
        figures = {task: [prose(row) for row in rows] for task, rows in pairs.items() if rows}
        if figures:
            less = [task for task, (own, other) in figures.items() if own < other]
            lines.append(
                f"- At about equal loss, by the learning rate that forgot least (one seed, no interval): {label(ours)} "
                f"forgets less than {label(theirs)} on {len(less)} of {len(figures)}: {', '.join(less) or 'none'}."
            )
    return lines


def study_tables(path: Path) -> str:
    """All tables as Markdown, with how much of the study is done."""
    results = Results(read(path))
    runs = plan(results.rows)
    done = {row["key"] for row in results.rows}
    trained = [row for row in results.rows if row["study"] != "base"]
    diverged = sum(row["diverged"] for row in trained)
    planned = sum(run.key in done for run in runs)
    other = len(trained) - planned
    parts = [f"{planned} of {len(runs)} planned runs are done, {other} others besides; {diverged} diverged."]
    parts.append("\n".join(verdicts(results)))
    for task in TASKS:
        if any(results.best(task, method) for method in METHODS):
            parts += [f"**{task}**, mean ± 95% interval over seeds:", task_table(results, task)]
    sections = (
        ("Paired by seed, each at its best learning rate:", paired_table(results)),
        (
            "Least forgetting at about equal loss (10%), over the learning rates tried with the first seed:",
            forgetting_table(results),
        ),
        ("Neumann terms:", neumann_table(results)),
        ("Scaled generators:", grid_table(results, "scaling")),
        ("High learning rates:", grid_table(results, "stability")),
        ("Learning rates tried (test loss, first seed):", sweep_table(results)),
    )
    for title, table in sections:
        if table.count("\n") > 1:
            parts += [title, table]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    args = parser.parse_args()
    print(study_tables(args.results))


if __name__ == "__main__":
    main()
