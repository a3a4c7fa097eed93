"""The study at a glance, for benchmarks/README.md; study_report.py has every table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from study_plan import METHODS, TASKS, Row, plan
from study_report import BASES, Results, grid_table, label, neumann_table, prose, quality, show, verdicts
from study_results import read
from study_stats import interval
from tabular import markdown


def task_columns(results: Results, figure_of: Callable[[str], tuple[str, Callable[[Row], float], str, float]]) -> str:
    """One figure of every method at its best learning rate, a column a task, beside what the base does untrained."""
    found: dict[str, list[list[Row]]] = {}
    for base in BASES:
        found[f"base{BASES[base]}"] = [list(filter(None, [results.base(task, base)])) for task in TASKS]
    found |= {label(method): [results.best(task, method) for task in TASKS] for method in METHODS}
    lines = []
    for name, columns in found.items():
        cells = []
        for task, rows in zip(TASKS, columns, strict=True):
            _, figure, form, scale = figure_of(task)
            cells.append(show(interval([figure(row) for row in rows]) if rows else None, form, scale))
        if any(columns):
            trained = next(rows[0].get("trainable", 0) for rows in columns if rows)
            lines.append([name, f"{trained / 1e6:.2f} M", *cells])
    return markdown([["", "trainable", *TASKS], *lines])


def overview(path: Path) -> str:
    """What was hoped for and what came of it; what every method learned, and what it forgot; terms of the series."""
    results = Results(read(path))
    done, runs = {row["key"] for row in results.rows}, plan(results.rows)
    parts = [
        f"{sum(run.key in done for run in runs)} of {len(runs)} runs are done. What was hoped for, and what they say "
        "of it where an interval over seeds excludes zero (as good: by the loss of held-out answers; forgets: by the "
        "perplexity of unrelated prose):",
        "\n".join(verdicts(results)),
        "Held-out answers exactly right, %; of the corpus, the perplexity of a play that was not trained on:",
        task_columns(results, quality),
        "Perplexity of unrelated prose:",
        task_columns(results, lambda task: ("", prose, ".1f", 1.0)),
    ]
    if (terms := neumann_table(results)).count("\n") > 1:
        parts += ["Neumann terms, on sums (one seed; the paper's Table 10):", terms]
    for study, title in (
        (
            "scaling",
            "Does one learning rate fit all block sizes? On sums (40 steps, one seed), plain and scaled generators:",
        ),
        ("stability", "Learning rates far above the useful ones, on sums (40 steps, one seed):"),
    ):
        if (table := grid_table(results, study)).count("\n") > 1:
            parts += [title, table]
    return "\n\n".join(parts) + "\n"
