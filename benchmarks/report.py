"""Writes what was measured from the results that are committed beside this file: the summary into the README, the
tables into benchmarks/README.md, and the plots.

    python benchmarks/report.py            # prints summary and tables
    python benchmarks/report.py --write    # puts them in their places and draws the plots

The results come from
    python examples/finetune.py --compare    # report.json, kept as results/finetune-cpu.json
    python benchmarks/run.py                 # results/SUITE-cpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout
from study_overview import overview
from study_plan import Method
from study_report import PAIRS, Results, differences, loss, prose
from study_results import RESULTS as STUDY
from study_results import read

import plots
from plots import Row, load

checkout.make_importable()
from methods import METHODS  # noqa: E402

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
NAMES = {
    **{"frozen": "frozen base", "oft": "**OFT, b = 32**", "peft-oft": "PEFT's OFT, b = 32", "lora": "LoRA, r = 16"},
    **{"dora": "DoRA, r = 16", "oftv1": "original OFT, b = 32", "full": "all weights"},
    **{"frozen-nf4": "frozen NF4 base", "qoft": "**QOFT, b = 32**", "peft-qoft": "PEFT's QOFT, b = 32"},
    **{"qlora": "QLoRA, r = 16", "peft-oft-accelerated": "PEFT's OFT, `accelerate_peft`"},
}
SHAPES = [(1024, 1024, 1024), (4096, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 2048, 2048)]
SHAPES.append((1, 1024, 1024))
NOTHING = "—"


def finetune_table(report: dict[str, Any]) -> str:
    """What the main job gave, a column a method."""
    methods, before = report["methods"], report["before"]
    trained, after = ([m[key] for m in methods.values()] for key in ("training", "after"))
    rows = [
        ["", "base", *(name.upper() if name == "oft" else "LoRA (PEFT)" for name in methods)],
        ["settings", "", *(settings(name, report) for name in methods)],
        ["trainable parameters", "0", *(f"{m['trainable_parameters'] / 1e6:.2f} M" for m in methods.values())],
        ["held-out sums exactly right", f"{before['exact']:.1%}", *(f"{a['exact']:.1%}" for a in after)],
        [
            "perplexity of unrelated prose (lower: less forgotten)",
            *(f"{a['perplexity']:.1f}" for a in (before, *after)),
        ],
        ["tokens per second", "", *(f"{t['tokens_per_second']:.0f}" for t in trained)],
        ["training time", "", *(f"{t['seconds']:.0f} s" for t in trained)],
        ["peak memory", "", *(f"{t['peak_memory_bytes'] / 2**30:.2f} GiB" for t in trained)],
    ]
    return markdown(rows)


def settings(name: str, report: dict[str, Any]) -> str:
    """The size and learning rate of a method."""
    size = f"b = {report['arguments']['block_size']}" if name == "oft" else f"r = {report['arguments']['rank']}"
    return f"{size}, lr {report['methods'][name]['lr']:g}"


def layer_table(rows: list[Row]) -> str:
    """One layer's time over the frozen layer's, a column a method."""
    found = {(r["tokens"], r["in"], r["out"], r["method"]): r for r in rows if r["block_size"] == 32}
    methods = ("oft", "lora", "peft-oft", "peft-oft-accelerated", "dora", "oftv1", "full")
    lines = [["tokens, in → out", "frozen layer", *(NAMES[method] for method in methods)]]
    for shape in SHAPES:
        frozen = found.get((*shape, "frozen"))
        if frozen is None:
            continue
        mode = "" if frozen["mode"] == "forward + backward" else f" ({frozen['mode']})"
        cells = [found.get((*shape, method), {}) for method in methods]
        name = "{}, {} → {}".format(*shape) + mode
        lines.append([name, f"{frozen['ms']:.3g} ms", *(number(cell, "over_frozen", ".2f") for cell in cells)])
    return markdown(lines)


def model_table(place: str, methods: tuple[str, ...]) -> str:
    """Everything about a whole model, a row a method."""
    steps = load(f"step-{place}")
    batches = sorted({(row["tokens"], f"{row['batch']} × {row['length']}") for row in steps if "tokens" in row})
    head = ["", "trains", *(f"tokens/s at {name}" for _, name in batches), "memory of training", "kept for backward"]
    lines = [[*head, "generates", "merges", "wraps"]]
    for method in methods:
        mine = {suite: only(load(f"{suite}-{place}"), method) for suite in ("memory", "decode", "merge", "wrap")}
        step = {row["tokens"]: row for row in steps if row.get("method") == method}
        memory = first(mine["memory"], checkpointing=False)
        decode = first(mine["decode"], merged=False, sequences=1)
        any_row = next(iter(step.values()), {})
        speeds = [number(step.get(tokens, {}), "tokens_per_second", ".0f") for tokens, _ in batches]
        lines.append(
            [
                *(NAMES[method], number(any_row, "trainable", ".2f", 1e-6, " M"), *speeds),
                *(number(memory, key, ".2f", 2**-30, " GiB") for key in ("peak_bytes", "saved_bytes")),
                *(number(decode, "ms", ".0f", unit=" ms/token"), number(first(mine["merge"]), "ms", ".2f", 1e-3, " s")),
                number(first(mine["wrap"]), "ms", ".2f", 1e-3, " s"),
            ]
        )
    return markdown(lines)


def answers(place: str) -> str:
    """What a newcomer asks, answered by the ratios and their quartiles, also where the answer is no."""
    lines = [["", "OFT over LoRA", "QOFT over QLoRA", "OFT over PEFT's OFT", "QOFT over PEFT's QOFT"]]
    pairs = [("oft", "over_lora"), ("qoft", "over_lora"), ("oft", "over_peft_oft"), ("qoft", "over_peft_oft")]
    steps, decode, memory = load(f"step-{place}"), load(f"decode-{place}"), load(f"memory-{place}")
    questions: list[tuple[str, list[Row]]] = [
        (f"time of a training step of {tokens} tokens", [r for r in steps if r.get("tokens") == tokens])
        for tokens in sorted({row["tokens"] for row in steps if "tokens" in row})
    ]
    questions += [
        ("memory of training", [row for row in memory if row.get("checkpointing") is False]),
        ("the same with checkpointing", [row for row in memory if row.get("checkpointing") is True]),
        *(
            (f"time of a token, {n} sequence{'s' * (n > 1)} generated, not merged", [r for r in decode if this(r, n)])
            for n in sorted({row["sequences"] for row in decode if "sequences" in row})
        ),
        ("time of merging", load(f"merge-{place}")),
        ("time of wrapping a model", load(f"wrap-{place}")),
    ]
    for question, rows in questions:
        lines.append([question, *(answer(rows, method, column) for method, column in pairs)])
    return markdown(lines)


def this(row: Row, sequences: int) -> bool:
    return row.get("sequences") == sequences and row.get("merged") is False


def answer(rows: list[Row], method: str, column: str) -> str:
    """A ratio, in words: less or more only where the quartiles agree, or, without any, beyond two percent."""
    row = first(only(rows, method))
    if "peak_bytes" in row and column not in row:  # measured each on its own, so that nothing was to be paired
        other = first(only(rows, METHODS[method].ratios[column]))
        row = {column: row["peak_bytes"] / other["peak_bytes"]} if "peak_bytes" in other else row
    if column not in row:
        return NOTHING
    low, high = row.get(f"{column}_q1", row[column] - 0.02), row.get(f"{column}_q3", row[column] + 0.02)
    word = "less" if high < 1 else "more" if low > 1 else "equal"
    return f"{word}: {row[column]:.2f}"


def only(rows: list[Row], method: str) -> list[Row]:
    return [row for row in rows if row.get("method") == method]


def first(rows: list[Row], **fields: Any) -> Row:
    """The first row with these values, or an empty one."""
    return next((row for row in rows if all(row.get(key) == value for key, value in fields.items())), {})


def number(row: Row, key: str, form: str, scale: float = 1.0, unit: str = "") -> str:
    """A figure, or why there is none."""
    return f"{row[key] * scale:{form}}{unit}" if key in row else row.get("missing", NOTHING)


def where(rows: list[Row]) -> str:
    """On what machine, with which versions, in how many rounds."""
    timed = [row for row in rows if "rounds" in row]
    if not timed:
        return "not measured here"
    row, rounds = timed[-1], sorted({row["rounds"] for row in timed})
    packages = ", ".join(f"{name} {row[name]}" for name in ("torch", "peft", "bitsandbytes") if row[name] != "unknown")
    counted = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else rounds[0]
    return f"{row['device']}, {row['threads']} threads, {packages}; medians of {counted} rounds"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def picture(name: str, text: str) -> str:
    """A plot, if what it shows is there."""
    made = plots.pictures().get(RESULTS / f"{name}.svg")
    there = made is not None and any(panel.lines for panel in made())
    return f"\n![{text}](results/{name}.svg)\n" if there else ""


def summary() -> str:
    """What a newcomer asks first, answered in a line each, also where the answer is no."""
    steps, memory, decode = load("step-cpu"), load("memory-cpu"), load("decode-cpu")
    lengths = {row["tokens"] for row in steps if "tokens" in row}
    by_tokens = [[row for row in steps if row.get("tokens") == tokens] for tokens in lengths]
    plain = [row for row in memory if row.get("checkpointing") is False]
    figures = (
        ("time of a training step", by_tokens),
        ("memory of training", [plain]),
        ("time of a token generated, not merged", [[row for row in decode if this(row, 1)]]),
    )
    compared = (("oft", "over_lora"), ("qoft", "over_lora"), ("oft", "over_peft_oft"))
    lines = [["", "OFT over LoRA", "QOFT over QLoRA", "OFT over PEFT's OFT"]]
    lines.append(["parameters that train", *(sizes(steps, *pair) for pair in compared)])
    lines += [[question, *(over_all(groups, *pair) for pair in compared)] for question, groups in figures]
    study = Results(read(STUDY))
    for question, figure in (("loss on held-out answers", loss), ("perplexity of unrelated prose", prose)):
        lines.append([question, *(by_task(study, *pair, figure) for pair in PAIRS[:2]), "the same function"])
    return markdown(lines) + "\n"


def sizes(rows: list[Row], method: str, column: str) -> str:
    """How many parameters train, in each of the two that ``column`` compares."""
    both = [first(only(rows, name)) for name in (method, METHODS[method].ratios[column])]
    return " against ".join(number(row, "trainable", ".2f", 1e-6, " M") for row in both)


def over_all(groups: list[list[Row]], method: str, column: str) -> str:
    """The answers of several settings as one."""
    found = [text.split(": ") for rows in groups if (text := answer(rows, method, column)) != NOTHING]
    if not found:
        return NOTHING
    ratios = sorted({ratio for _, ratio in found})
    words = " or ".join(word for word in ("less", "equal", "more") if word in {word for word, _ in found})
    return f"{words}: {ratios[0]}" + (f" to {ratios[-1]}" if len(ratios) > 1 else "")


def by_task(study: Results, ours: Method, theirs: Method, figure: Callable[[Row], float]) -> str:
    """On which tasks a figure of the study is lower, or higher, by more than the noise of its seeds."""
    found = differences(study, ours, theirs, figure)
    tasks = {word: [task for task in found if found[task] == word] for word in ("lower", "higher", "open")}
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in tasks.items() if names) or NOTHING


def section() -> str:
    """The tables and plots."""
    finetune = json.loads((RESULTS / "finetune-cpu.json").read_text())
    layer, step = load("layer-cpu"), load("step-cpu")
    timed = [*layer, *step, *(row for suite in ("decode", "merge", "wrap") for row in load(f"{suite}-cpu"))]
    busiest = max(row.get("others_cpu", 0.0) for row in timed)
    return f"""**Against LoRA and QLoRA**: SmolLM2-135M on two cores. Less is better, and "equal" is where the quartiles
straddle 1:

{answers("cpu")}

The figures behind it, with a float32 and an NF4 base ({where(step)}):

{model_table("cpu", ("frozen", "oft", "lora", "dora", "peft-oft", "peft-oft-accelerated", "oftv1", "full"))}

{model_table("cpu", ("frozen-nf4", "qoft", "qlora", "peft-qoft"))}

Memory is the resident set of one process each, with what glibc's allocator holds back, and varies by it; what is kept
for the backward pass is counted exactly.

**One layer**, forward and backward with the input's gradient, time over the frozen layer's (float32;
{where(layer)}):

{layer_table(layer)}
{picture("layer-cpu", "Time of one layer over the frozen layer's, for each shape that was measured")}{
        picture("memory-sizes", "Memory of a training step over the size of the model")
    }{picture("study-cpu", "Accuracy over trainable parameters and over time")}{
        picture("study-ablations-cpu", "Forgetting over what was learned, Neumann terms, learning rates")
    }
**The main job** (`python examples/finetune.py --compare`: same data, steps and seed; one seed):

{finetune_table(finetune)}

These are measurements on a shared machine, where other programs took up to {busiest:.0%} of the processors meanwhile;
differences of a few percent are noise. Nothing was measured on a GPU.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them in their places and draw the plots")
    write = parser.parse_args().write
    tables = FOLDER / "README.md"
    places = [("summary", summary(), FOLDER.parent / "README.md"), ("measured", section(), tables)]
    places.append(("studied", overview(STUDY), tables))
    for name, text, document in places:
        made = f"<!-- {name} -->\n{text}<!-- /{name} -->"
        if write:
            before, rest = document.read_text().split(f"<!-- {name} -->")
            document.write_text(before + made + rest.split(f"<!-- /{name} -->")[1])
        else:
            print(made)
    if write:
        plots.main()


if __name__ == "__main__":
    main()
