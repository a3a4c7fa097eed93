"""Writes the README's "Measured" section from the results that are committed beside this file.

    python benchmarks/report.py            # prints it
    python benchmarks/report.py --write    # puts it into the README

The results come from
    python examples/finetune.py --compare              # report.json, kept as results/finetune-cpu.json
    python benchmarks/layer.py --out benchmarks/results/layer-cpu
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.S)


def finetune_table(report: dict[str, Any]) -> str:
    """What the main job gave, a column a method."""
    methods, before = report["methods"], report["before"]
    rows: list[list[str]] = [["", "base", *(name.upper() if name == "oft" else "LoRA (PEFT)" for name in methods)]]
    rows.append(["settings", "", *(settings(name, report) for name in methods)])
    rows.append(["trainable parameters", "0", *(f"{m['trainable_parameters'] / 1e6:.2f} M" for m in methods.values())])
    rows.append(
        [
            "held-out sums exactly right",
            f"{before['exact']:.1%}",
            *(f"{m['after']['exact']:.1%}" for m in methods.values()),
        ]
    )
    rows.append(
        [
            "perplexity of unrelated prose (lower: less forgotten)",
            f"{before['perplexity']:.1f}",
            *(f"{m['after']['perplexity']:.1f}" for m in methods.values()),
        ]
    )
    rows.append(["tokens per second", "", *(f"{m['training']['tokens_per_second']:.0f}" for m in methods.values())])
    rows.append(["training time", "", *(f"{m['training']['seconds']:.0f} s" for m in methods.values())])
    rows.append(
        ["peak memory", "", *(f"{m['training']['peak_memory_bytes'] / 2**30:.2f} GiB" for m in methods.values())]
    )
    return markdown(rows)


def settings(name: str, report: dict[str, Any]) -> str:
    """The size and learning rate of a method."""
    size = f"b = {report['arguments']['block_size']}" if name == "oft" else f"r = {report['arguments']['rank']}"
    return f"{size}, lr {report['methods'][name]['lr']:g}"


def layer_table(results: dict[str, Any]) -> str:
    """One layer's time over the frozen layer's, a column a method."""
    names = {"oft": "oftv2", "peft-lora": "PEFT LoRA r = 16", "peft-oft": "PEFT OFT b = 32"}
    shapes = list(dict.fromkeys(row["shape"] for row in results["rows"]))
    found = {(row["shape"], row["method"]): row for row in results["rows"]}
    rows = [["tokens, in → out", "frozen layer", *names.values()]]
    for shape in shapes:
        tokens, d, n = shape.split("x")
        frozen = found[shape, "frozen"]
        mode = "" if frozen["mode"] == "forward+backward" else f" ({frozen['mode']})"
        rows.append(
            [
                f"{tokens}, {d} → {n}{mode}",
                f"{frozen['median_ms']:.3g} ms",
                *(f"{found[shape, method]['over_frozen']:.2f}" for method in names),
            ]
        )
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def section() -> str:
    """The whole section."""
    finetune = json.loads((RESULTS / "finetune-cpu.json").read_text())
    layer = json.loads((RESULTS / "layer-cpu.json").read_text())
    about = layer["machine"]
    versions = about["versions"]
    return f"""The main job on two cores (`python examples/finetune.py --compare`: same data, steps and seed; one seed;
taken before the rotation's CPU path was reworked, so its speed is that of the version before):

{finetune_table(finetune)}

One layer, forward and backward with the input's gradient, time over the frozen layer's (`python benchmarks/layer.py`:
{about["device"]}, {about["threads"]} threads, {about["dtype"]}, torch {versions["torch"]}, peft {versions["peft"]};
medians of {about["rounds"]} interleaved rounds):

{layer_table(layer)}

Both are small measurements on a shared machine; differences of a few percent are noise. Nothing was measured on a GPU.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into the README")
    if parser.parse_args().write:
        README.write_text(SECTION.sub(lambda match: match[1] + section() + match[2], README.read_text()))
    else:
        print(section())


if __name__ == "__main__":
    main()
