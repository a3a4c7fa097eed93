"""Draws the committed results: layers over tokens, block size and width, memory over model size, accuracy.

    python benchmarks/plots.py    # rewrites benchmarks/results/*.svg of every result file that is there

Each picture carries a digest of the numbers that it shows, by which the tests see that it is of the committed results.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from study_plan import CORE, METHODS, TASKS
from study_report import Results, loss, prose
from study_report import quality as task_figure
from study_results import RESULTS as STUDY
from study_results import read
from study_stats import interval

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = {
    **{"oft": "#0b6e99", "qoft": "#0b6e99", "oft-input": "#7fb8d0", "oft-weight": "#04364d"},
    **{"lora": "#d9730d", "qlora": "#d9730d", "dora": "#e8b04a", "peft-oft": "#6940a5", "peft-qoft": "#6940a5"},
    **{"oftv1": "#a8312f", "full": "#4d4d4b", "frozen": "#9a9a97", "frozen-nf4": "#9a9a97"},
    **{"b = 16": "#7fb8d0", "b = 32": "#0b6e99", "b = 64": "#04364d"},
}
LABELS = {
    **{"oft": "OFT", "qoft": "QOFT", "oft-input": "OFT, input form", "oft-weight": "OFT, weight form"},
    **{"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "peft-oft": "PEFT's OFT", "peft-qoft": "PEFT's QOFT"},
    **{"oftv1": "original OFT", "full": "all weights", "frozen": "frozen", "frozen-nf4": "frozen, NF4"},
}
# Methods are told apart by more than their colours; of loose points, sizes of an adapter too.
MARKERS = {
    **{"lora": "s", "qlora": "s", "dora": "P", "peft-oft": "^", "oftv1": "v", "full": "D"},
    **{"oft-16": "v", "oft-64": "^", "lora-4": "v", "lora-8": "s"},
}
# How far loose points of other bases stand aside, of as many parameters.
ASIDE = {"nf4": 1.08, "bfloat16": 1.16}
FACES = {"nf4": "white", "bfloat16": "lightgrey"}
TIME = "time over the frozen layer's"
Row = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass
class Panel:
    """One coordinate system: named lines, or loose points."""

    title: str
    x: str
    y: str
    lines: dict[str, Points] = field(default_factory=dict)
    x_base: int = 2  # of its logarithms; 0 where it is linear
    log_y: bool = False
    joined: bool = True
    ticks: tuple[str, ...] = ()  # names of the values 0, 1, … of x
    spread: dict[str, float] = field(default_factory=dict)  # half the interval of a loose point, by its name


Picture = list[Panel]


def load(name: str) -> list[Row]:
    """The rows of ``results/NAME.json``; none where the file is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def digest(picture: Picture) -> str:
    """Of the numbers that a picture shows."""
    text = json.dumps([[panel.title, panel.lines, panel.spread] for panel in picture])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep(title: str, rows: list[Row], over: str, methods: tuple[str, ...]) -> Panel:
    """Time over the frozen layer's, by method, along one column; everything else as in most of the rows."""
    rows = [row for row in rows if row["mode"] == "forward + backward" and row["base"] != "NF4" and "ms" in row]
    rows = [row for row in rows if row["in"] == row["out"]]
    fixed = {}
    for column in ("in", "tokens", "block_size"):
        if column != over and rows:
            fixed[column] = Counter(row[column] for row in rows).most_common(1)[0][0]
    chosen = [row for row in rows if all(row[column] == value for column, value in fixed.items())]
    said = {"in": "{0} → {0}", "tokens": "{} tokens", "block_size": "b = {}"}
    where = ", ".join(said[column].format(value) for column, value in fixed.items())
    lines = {
        method: sorted((row[over], row["over_frozen"]) for row in chosen if row["method"] == method)
        for method in methods
        if any(row["method"] == method for row in chosen)
    }
    x = {"in": "inputs = outputs", "tokens": "tokens", "block_size": "block size b"}[over]
    return Panel(f"{title}: {where}", x, TIME, lines, log_y=True)


def layers(place: str) -> Picture:
    """One layer over its peers' and over its own two forms; what was measured at one value only has no curve."""
    rows = load(f"layer-{place}")
    peers: tuple[str, ...] = ("oft", "lora", "dora", "peft-oft", "oftv1", "full")
    curves = [
        sweep("Tokens", rows, "tokens", peers),
        sweep("Width", rows, "in", peers),
        sweep("Block size", rows, "block_size", ("oft", "peft-oft", "oftv1")),
        sweep("The two forms", rows, "tokens", ("oft-input", "oft-weight", "oft")),
    ]
    curves = [panel for panel in curves if any(len(points) > 1 for points in panel.lines.values())]
    peers = tuple(method for method in peers if method != "oftv1")  # several times as slow: the curves show it
    return [shapes(rows, peers), *curves]


def shapes(rows: list[Row], methods: tuple[str, ...]) -> Panel:
    """Time over the frozen layer's for the shapes that come first in the suite, before its sweeps."""
    chosen = [row for row in rows if row["mode"] == "forward + backward" and row["base"] != "NF4" and "ms" in row]
    chosen = [row for row in chosen if row["block_size"] == 32 and row["method"] in methods]
    keys = list(dict.fromkeys((row["tokens"], row["in"], row["out"]) for row in chosen))[:5]
    lines: dict[str, Points] = {}
    for row in chosen:
        if (key := (row["tokens"], row["in"], row["out"])) not in keys:
            continue
        lines.setdefault(row["method"], []).append((keys.index(key), row["over_frozen"]))
    names = tuple(f"{tokens} tokens\n{wide} → {out}" for tokens, wide, out in keys)
    return Panel("Forward and backward: b = 32", "", TIME, lines, joined=False, ticks=names)


def memory_of_sizes() -> Picture:
    """Predicted memory of a training step, whole and over the frozen model's on the same base."""
    path = RESULTS / "memory-model.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "predicted"]

    def gib(method: str, checkpointing: str) -> dict[float, float]:
        return {
            float(row["parameters"]): float(row["predicted_gib"])
            for row in rows
            if (row["method"], row["checkpointing"], row["batch"]) == (method, checkpointing, "4")
        }

    def over(method: str, reference: str) -> Points:
        whole = gib(reference, "False")
        return sorted((size, value / whole[size]) for size, value in gib(method, "False").items())

    x, step = "parameters of the model", "4 × 2048 tokens"
    whole = {m: sorted(gib(m, "True").items()) for m in ("full", "lora", "oft", "qlora", "qoft")}
    ratios = {m: over(m, "frozen") for m in ("oftv1", "dora", "peft-oft", "lora", "oft")}
    ratios |= {m: over(m, "frozen-nf4") for m in ("qlora", "qoft")}
    return [
        Panel(f"{step}, checkpointing (predicted)", x, "memory, GiB", whole, x_base=10, log_y=True),
        Panel(f"{step}, no checkpointing (predicted)", x, "memory over the frozen model's", ratios, x_base=10),
    ]


def quality() -> Picture:
    """What each method learned of each task, at its best learning rate: a mean over seeds."""
    results, methods = Results(read(STUDY)), METHODS
    picture = []
    for task in TASKS:
        best = {method.name: rows for method in methods if (rows := results.best(task, method))}
        name, figure, _, scale = task_figure(task)
        points = {
            method: interval([scale * figure(row) for row in rows]) for method, rows in best.items() if len(rows) > 1
        }
        spread = {method: point.half for method, point in points.items()}
        for x, value in (("trainable parameters", "trainable"), ("CPU seconds of training", "cpu_seconds")):
            lines = {method: [(mean(row[value] for row in best[method]), points[method].mean)] for method in points}
            base = 10 if value == "trainable" else 0
            aside = " (NF4 and bf16 a little aside)" if base else ""
            picture.append(Panel(task, x + aside, name, lines, x_base=base, joined=False, spread=spread))
    return [panel for panel in picture if panel.lines]


def ablations() -> Picture:
    """Forgetting in every run, and what the study says of the series and of scaled generators."""
    results = Results(read(STUDY))
    answers, picture = "loss of held-out answers", []
    for task in TASKS:
        found = {method.name: results.of("quality", task, method) for method in CORE}
        runs = {name: sorted((loss(row), prose(row)) for row in rows) for name, rows in found.items() if rows}
        picture.append(Panel(f"Forgetting, every run: {task}", answers, "perplexity of prose", runs, 0, True, False))
    terms = sorted(
        (row["options"]["neumann_terms"], row["rotation"]["orthogonality_error"])
        for row in results.finite
        if row["study"] == "neumann" and "neumann_terms" in row["options"]
    )
    rates: dict[str, Points] = {}
    for row in results.finite:
        if row["study"] == "scaling":
            name = f"b = {row['method'].partition('/')[0].removeprefix('oft-')}" + ", scaled" * bool(row["options"])
            rates.setdefault(name, []).append((row["lr"], loss(row)))
    series = {"oft": terms} if terms else {}
    picture.append(Panel("Neumann terms", "terms k", "‖RᵀR − I‖, worst layer", series, 0, True))
    scaled = {name: sorted(points) for name, points in rates.items()}
    picture.append(Panel("Plain and scaled generators", "learning rate", answers, scaled, 10))
    return [panel for panel in picture if panel.lines]


def pictures() -> dict[Path, Callable[[], Picture]]:
    """Every picture there could be, and how to get what it shows."""
    places = sorted(path.stem.removeprefix("layer-") for path in RESULTS.glob("layer-*.json"))
    found: dict[Path, Callable[[], Picture]] = {
        RESULTS / f"layer-{place}.svg": lambda place=place: layers(place) for place in places
    }
    found |= {RESULTS / "study-cpu.svg": quality, RESULTS / "study-ablations-cpu.svg": ablations}
    return {**found, RESULTS / "memory-sizes.svg": memory_of_sizes}


def label(name: str) -> str:
    """A method as people write it: ``oft-32/nf4`` is ``OFT 32, NF4``."""
    kind, _, base = name.partition("/")
    base = {"nf4": "NF4", "bfloat16": "bf16"}.get(base, base)
    kind = LABELS.get(kind) or re.sub(r"^(\w+)-(\d+)$", lambda match: f"{LABELS[match[1]]} {match[2]}", kind)
    return f"{kind}, {base}" if base else kind


def draw(path: Path, picture: Picture) -> None:
    """Writes one picture, the same bytes for the same numbers and version of matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "oftv2", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    columns = min(2, len(picture))
    lines = -(-len(picture) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(9, 3.2 * lines), layout="constrained", squeeze=False)
    for ax in axes.flat[len(picture) :]:
        ax.set_visible(False)
    loose: dict[str, Any] = {}  # of the panels whose points have no legend of their own
    for ax, panel in zip(axes.flat, picture, strict=False):
        alone = not panel.joined and not panel.ticks and all(len(points) == 1 for points in panel.lines.values())
        for i, (name, points) in enumerate(panel.lines.items()):
            kind = re.split(r"[-/]|, ", name)[0]
            size, _, base = name.partition("/")
            thick = kind in ("oft", "qoft")
            style = {
                "marker": MARKERS.get(size, "o"),
                "markersize": 3 if panel.joined else 5,
                "linewidth": 2.2 if thick else 1.2,
                "zorder": 2.1 if thick else 2.3 if kind == "peft" else 2.2,  # what is of the same height stays in sight
            }
            dashed = ":" if kind == "peft" else "--" if kind.startswith("q") or name.endswith("scaled") else "-"
            style["linestyle"] = dashed if panel.joined else "none"
            style["markerfacecolor"] = FACES.get(base)
            xs, ys = zip(*points, strict=True)
            if panel.ticks:  # side by side
                xs = tuple(x + 0.12 * (i - (len(panel.lines) - 1) / 2) for x in xs)
            if alone and panel.x_base:
                xs = tuple(x * ASIDE.get(base, 1) for x in xs)
            bars, colour = panel.spread.get(name), COLOURS.get(name, COLOURS.get(kind))
            drawn = ax.errorbar(xs, ys, yerr=bars, elinewidth=0.8, label=label(name), color=colour, **style)
            if alone:
                loose.setdefault(label(name), drawn)
        ax.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if panel.ticks:
            ax.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=6)
            ax.set_ylim(bottom=1)
        elif panel.x_base:
            ax.set_xscale("log", base=panel.x_base)
            if panel.x_base == 2:
                ax.xaxis.set_major_formatter("{x:g}")
        if panel.log_y:
            ax.set_yscale("log")
            span = ax.get_ylim()[1] / ax.get_ylim()[0]
            subs = (1,) if span > 1e4 else (1, 2, 5) if span > 20 else (1, 1.2, 1.5, 2, 3, 5)
            ax.yaxis.set_major_locator(LogLocator(subs=subs))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        if "%" in panel.y:  # intervals may go beyond
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, 0), min(high, 100))
        if not alone:
            ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    if loose:
        figure.legend(loose.values(), loose.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, metadata={"Date": None, "Description": digest(picture)})
    plt.close(figure)


def main() -> None:
    for path, make in pictures().items():
        picture = make()
        if any(panel.lines for panel in picture):
            draw(path, picture)
            print(path)


if __name__ == "__main__":
    main()
