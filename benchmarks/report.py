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

import checkout
from report_tables import (
    NOTHING,
    experts_table,
    finetune_table,
    first,
    layer_table,
    model_table,
    number,
    only,
    where,
)
from study_overview import overview
from study_plan import Method
from study_report import PAIRS, Results, differences, loss, prose
from study_results import RESULTS as STUDY
from study_results import read
from tabular import markdown

import plots
from plots import Row, load

checkout.make_importable()
from methods import METHODS  # noqa: E402

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


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
    ratio = f"{row[column]:.2f}"
    word = "equal" if ratio == "1.00" else "less" if high < 1 else "more" if low > 1 else "equal"
    return f"{word}: {ratio}"


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
    experts = load("experts-cpu")
    mixtures = [[row for row in experts if row["group"] == name] for name in dict.fromkeys(r["group"] for r in experts)]
    figures = (
        ("time of a training step", by_tokens),
        ("the same of experts alone (mixtures)", mixtures),
        ("memory of training", [plain]),
        ("time of a token generated, not merged", [[row for row in decode if this(row, 1)]]),
    )
    compared = (("oft", "over_lora"), ("qoft", "over_lora"), ("oft", "over_peft_oft"))
    lines = [["", "OFT over LoRA", "QOFT over QLoRA", "OFT over PEFT's OFT"]]
    lines.append(["parameters that train", *(sizes(steps, *pair) for pair in compared)])
    lines += [[question, *(over_all(groups, *pair) for pair in compared)] for question, groups in figures]
    study = Results(read(STUDY))
    learned, forgotten = "loss on held-out answers", "perplexity of unrelated prose (lower: less forgotten)"
    for question, figure in ((learned, loss), (forgotten, prose)):
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
    words = [word for word in ("less", "equal", "more") if word in {word for word, _ in found}]
    stated = "less or more" if len({"less", "more"}.intersection(words)) == 2 else " or ".join(words)
    return f"{stated}: {ratios[0]}" + (f" to {ratios[-1]}" if len(ratios) > 1 else "")


def by_task(study: Results, ours: Method, theirs: Method, figure: Callable[[Row], float]) -> str:
    """On which tasks a figure of the study is lower, or higher, by more than the noise of its seeds."""
    found = differences(study, ours, theirs, figure)
    tasks = {word: [task for task in found if found[task] == word] for word in ("lower", "higher", "open")}
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in tasks.items() if names) or NOTHING


def section() -> str:
    """The tables and plots."""
    finetune = json.loads((RESULTS / "finetune-cpu.json").read_text(encoding="utf-8"))
    layer, step = load("layer-cpu"), load("step-cpu")
    timed = [*layer, *step, *(row for suite in ("decode", "merge", "wrap") for row in load(f"{suite}-cpu"))]
    busiest = max(row.get("others_cpu", 0.0) for row in timed)
    return f"""**Against LoRA and QLoRA**: SmolLM2-135M on two cores. Less is better, and "equal" is where the quartiles
straddle 1, or the ratio is 1.00:

{answers("cpu")}

The figures behind it, with a float32 and an NF4 base ({where(step)}):

{model_table("cpu", ("frozen", "oft", "lora", "dora", "peft-oft", "peft-oft-accelerated", "oftv1", "full"))}

{model_table("cpu", ("frozen-nf4", "qoft", "qlora", "peft-qoft"))}

Memory is the resident set of one process each, with what glibc's allocator holds back, and varies by it; what is kept
for the backward pass is counted exactly.

**One layer**, forward and backward with the input's gradient, time over the frozen layer's (float32;
{where(layer)}):

{layer_table(layer)}

**The experts of a mixture** (transformers' `Qwen3MoeExperts`; PEFT's LoRA by `target_parameters`, its OFT takes none),
forward and backward, time over the frozen experts' (float32; {where(load("experts-cpu"))}):

{experts_table(load("experts-cpu"))}
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
            before, rest = document.read_text(encoding="utf-8").split(f"<!-- {name} -->")
            document.write_text(before + made + rest.split(f"<!-- /{name} -->")[1], encoding="utf-8")
        else:
            print(made)
    if write:
        plots.main()


if __name__ == "__main__":
    main()
