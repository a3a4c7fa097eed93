"""The study in four panels: quality and size, forgetting, Neumann terms, learning rates."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from study_plan import CORE, SIZES, TASKS
from study_report import BASES, NAMES, Results, loss, prose
from study_results import read
from study_stats import interval

COLOURS = {"oft": "#0b6e99", "lora": "#d9730d", "dora": "#b08968", "full": "#6940a5"}
MARKERS = {"float32": "o", "nf4": "s"}


def study_plots(path: Path, out: Path) -> None:
    """Draws accuracy over trainable parameters, forgetting over loss, Neumann terms and learning rates, as one PNG."""
    results = Results(read(path))
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    size, forgetting, terms, rates = panels.flat
    for kind, colour in COLOURS.items():
        chosen = [m for m in (*CORE, *SIZES) if m.kind == kind]
        for base, marker in MARKERS.items():
            mine = [method for method in chosen if method.base == base]
            best = [(task, rows) for task in TASKS for m in mine if (rows := results.best(task, m))]
            swept = [row for task in TASKS for m in mine for row in results.of("quality", task, m)]
            if not swept:
                continue
            style = {"color": colour, "marker": marker, "linestyle": "none"}
            name = f"{NAMES[kind].split(' ')[0]}{BASES[base]}"
            points = [(rows[0]["trainable"], interval([loss(row) for row in rows])) for _, rows in best]
            if points:
                bars = [0.0 if math.isnan(point.half) else point.half for _, point in points]
                size.errorbar([n for n, _ in points], [p.mean for _, p in points], yerr=bars, label=name, **style)
            forgetting.plot([loss(r) for r in swept], [prose(r) for r in swept], label=name, alpha=0.7, **style)
    size.set(xscale="log", xlabel="trainable parameters", ylabel="held-out loss, best learning rate")
    forgetting.set(xlabel="held-out loss", ylabel="perplexity of prose", title="Every run: forgetting against quality")
    series = [r for r in results.finite if r["study"] == "neumann" and "neumann_terms" in r["options"]]
    series.sort(key=lambda row: row["options"]["neumann_terms"])
    terms.semilogy(
        [row["options"]["neumann_terms"] for row in series],
        [row["rotation"]["orthogonality_error"] for row in series],
        "o-",
    )
    terms.set(xlabel="Neumann terms", ylabel="distance from orthogonal, worst layer")
    scaling = [row for row in results.finite if row["study"] == "scaling"]
    for name in dict.fromkeys(row["method"] for row in scaling):
        mine = sorted((row for row in scaling if row["method"] == name), key=lambda row: row["lr"])
        dashes = "--" if mine[0]["options"] else "-"
        rates.loglog([r["lr"] for r in mine], [loss(r) for r in mine], "o", linestyle=dashes, label=name)
    rates.set(xlabel="learning rate", ylabel="held-out loss", title="Generators as they are, and scaled (dashed)")
    for axes in panels.flat:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
