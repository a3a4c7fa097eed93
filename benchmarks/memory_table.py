"""The predicted memory of a training step, by size and method, and the paper's figures beside it.

    python benchmarks/memory_table.py            # prints the table
    python benchmarks/memory_table.py --write    # and writes results/memory-model.csv

The prediction itself, from shapes alone, is in `benchmarks/memory_model.py`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

import checkout
from tabular import write_csv

from memory_model import GIB, ITEMSIZE, METHODS, Step, kept, peak, trainable, weights
from model_sizes import SIZES

RESULTS = Path(__file__).parent / "results"
# What a step on one GPU of so many GiB may take: 24, 80 and 141 GB of marketing, less what CUDA itself takes.
GPUS = {"24 GB": 23.0, "80 GB": 78.0, "141 GB": 138.0}
# The tokens of a step at which this reproduces the figures of the paper, which states neither batch nor length; and a
# step of the size that speed is measured with.
SETTINGS = ((1, 1024), (4, 2048))


def rows() -> list[dict[str, object]]:
    """The predicted table: every size, method and kind of base, with and without checkpointing."""
    paper = _paper()
    found: list[dict[str, object]] = []
    for (batch, sequence), (name, size), base in itertools.product(SETTINGS, SIZES.items(), ("bfloat16", "nf4")):
        for (method, on_nf4), checkpointing in itertools.product(METHODS.items(), (False, True)):
            label = on_nf4 if base == "nf4" else method
            if label is not None:
                step = Step(size, method, base, batch, sequence, checkpointing)
                compared = (batch, sequence) == SETTINGS[0] and not checkpointing
                found.append(_row(name, label, step) | {"paper_gb": paper.get((name, label)) if compared else None})
    return found


def _row(name: str, label: str, step: Step) -> dict[str, object]:
    total = peak(step) / GIB
    return {
        "source": "predicted",
        "size": name,
        "parameters": step.size.parameters,
        "method": label,
        "base_dtype": step.base,
        "batch": step.batch,
        "sequence": step.sequence,
        "checkpointing": step.checkpointing,
        "trainable": trainable(step),
        "weights_gib": round(weights(step) / GIB, 3),
        "adapter_gradients_optimizer_gib": round(4 * trainable(step) * step.adapter_itemsize / GIB, 3),
        "kept_for_backward_gib": round(kept(step) / GIB, 3),
        "predicted_gib": round(total, 3),
        "predicted_gb": round(total * GIB / 1e9, 2),
        **{f"fits_{gpu.replace(' ', '_').lower()}": total <= limit for gpu, limit in GPUS.items()},
    }


def _paper() -> dict[tuple[str, str], float]:
    """The paper's figures of memory, in GB, by size and method."""
    names = {"OFT": "oft-peft-0.15", "OFTv2": "oft", "LoRA": "lora-16bit", "QOFT": "qoft", "QLoRA": "qlora-16bit"}
    with open(RESULTS / "paper-oftv2.csv", encoding="utf-8", newline="") as file:
        return {
            (row["model"], names[row["method"]]): float(row["value"])
            for row in csv.DictReader(file)
            if row["quantity"] == "memory" and row["base_dtype"] in ITEMSIZE
        }


def table(found: list[dict[str, object]]) -> str:
    """Predicted GiB, a line a size and setting, a column a method; in brackets the paper's figure in GiB."""
    lines = []
    for base in ("bfloat16", "nf4"):
        labels = [on_nf4 if base == "nf4" else method for method, on_nf4 in METHODS.items()]
        lines.append(f"{'predicted GiB, ' + base:44}" + "".join(f"{label:>15}" for label in labels if label))
        chosen = [row for row in found if row["base_dtype"] == base]
        for (name, batch, sequence, checkpointing), cells in itertools.groupby(
            sorted(chosen, key=lambda r: (r["batch"], r["checkpointing"], r["parameters"])),
            key=lambda r: (r["size"], r["batch"], r["sequence"], r["checkpointing"]),
        ):
            how = f"{name}, {batch} x {sequence}{', checkpointing' * bool(checkpointing)}"
            lines.append(f"{how:44}" + "".join(f"{_cell(row):>15}" for row in cells))
    return "\n".join(lines)


def _cell(row: dict[str, object]) -> str:
    paper = row["paper_gb"]
    return f"{row['predicted_gib']:.1f}" + (f" ({paper * 1e9 / GIB:.1f})" if isinstance(paper, float) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write results/memory-model.csv")
    args = parser.parse_args()
    found = rows()
    print(table(found))
    if args.write:
        write_csv(RESULTS / "memory-model.csv", found)


if __name__ == "__main__":
    checkout.make_importable()
    main()
