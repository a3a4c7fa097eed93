"""How fast each kernel could be, by its bytes and FLOPs, on the shapes of two models.

    python benchmarks/roofline.py --only 'Llama-3-8B (q|gate).* 8192'        # a Markdown table
    python benchmarks/roofline.py --out benchmarks/results/roofline.csv      # the committed one

"Over frozen" is the bound of a layer with the adapter over that of the same layer without it: the least an adapter of
that design can cost. The formulas and what the bound leaves out are in ``kernel_costs.py``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabular import markdown, write_csv

from kernel_costs import (
    MACHINES,
    Cost,
    cayley_backward,
    cayley_forward,
    lora_backward,
    lora_forward,
    matmul,
    microseconds,
    nf4_dequantize,
    nf4_dequantize_rotate,
    nf4_matmul,
    nf4_rotate_matmul,
    rotate_backward,
    rotate_forward,
    rotate_matmul,
    weight_delta_grad,
    weight_forward,
)
from model_sizes import SIZES, USUAL, Size

BLOCK_SIZE = 32
TRAINING_TOKENS = 8192
DECODING_TOKENS = (1, 16)

Row = dict[str, Any]
# A kernel's name, what it costs, and all that the layer runs without and with the adapter.
Line = tuple[str, list[Cost], list[Cost], list[Cost]]


def training(tokens: int, d: int, n: int, b: int) -> Iterator[Line]:
    """One projection in a training step; its frozen product costs the same forward and backward."""
    frozen, dequantize = [matmul(tokens, d, n)], [nf4_dequantize(d, n)]
    forward, backward = [rotate_forward(tokens, d, b)], [rotate_backward(tokens, d, b)]
    cayley, cayley_grad = [cayley_forward(d, b)], [cayley_backward(d, b)]
    weight, weight_grad = [weight_forward(d, n, b)], [weight_forward(d, n, b), weight_delta_grad(tokens, d, b)]
    lora, lora_grad = lora_forward(tokens, d, n), lora_backward(tokens, d, n)
    fused, rotated = [rotate_matmul(tokens, d, n, b)], [nf4_dequantize_rotate(d, n, b)]
    yield "frozen product", frozen, frozen, frozen
    for name, extra in {
        "cayley forward": cayley,
        "cayley backward": cayley_grad,
        "rotate forward": forward,
        "rotate backward": backward,
        "weight form forward": weight,
        "weight form backward": weight_grad,
        "LoRA r=16 forward": lora,
        "LoRA r=16 backward": lora_grad,
    }.items():
        yield name, extra, frozen, frozen + extra
    yield "rotate_matmul", fused, frozen, fused
    yield "nf4 dequantize", dequantize, dequantize + frozen, dequantize + frozen
    yield "nf4_dequantize_rotate", rotated, dequantize + frozen, rotated + frozen
    for name, step in {
        "input form, whole step": cayley + forward + backward + cayley_grad,
        "weight form, whole step": cayley + weight + weight_grad + cayley_grad,
        "LoRA r=16, whole step": lora + lora_grad,
    }.items():
        yield name, step, frozen * 2, frozen * 2 + step


def decoding(tokens: int, d: int, n: int, b: int) -> Iterator[Line]:
    """One projection where a few tokens are decoded."""
    frozen, quantized = [matmul(tokens, d, n)], [nf4_matmul(tokens, d, n)]
    rotate, lora = [rotate_forward(tokens, d, b)], lora_forward(tokens, d, n)
    fused, fused_quantized = [rotate_matmul(tokens, d, n, b)], [nf4_rotate_matmul(tokens, d, n, b)]
    yield "frozen product", frozen, frozen, frozen
    yield "rotate forward", rotate, frozen, frozen + rotate
    yield "rotate_matmul", fused, frozen, fused
    yield "LoRA r=16 forward", lora, frozen, frozen + lora
    yield "nf4 product", quantized, quantized, quantized
    yield "nf4_rotate_matmul", fused_quantized, quantized, fused_quantized


def grouped(tokens: int, d: int, outs: list[int], b: int) -> Iterator[Line]:
    """Projections of one input in a training step."""
    frozen, group = [matmul(tokens, d, n) for n in outs], len(outs)
    for name, extra in {
        "rotate forward": [rotate_forward(tokens, d, b)] * group,
        "rotate forward, grouped": [rotate_forward(tokens, d, b, group)],
        "rotate backward": [rotate_backward(tokens, d, b)] * group,
        "rotate backward, grouped": [rotate_backward(tokens, d, b, group)],
        "LoRA r=16 forward": [cost for n in outs for cost in lora_forward(tokens, d, n)],
        "LoRA r=16 backward": [cost for n in outs for cost in lora_backward(tokens, d, n)],
    }.items():
        yield name, extra, frozen, frozen + extra


def model_lines(size: Size, b: int) -> Iterator[tuple[str, int, Line]]:
    """Projection, tokens and line for all that a model of this size runs."""
    hidden, kv, ffn = size.hidden, size.kv, size.ffn
    shapes = {"q, o": (hidden, hidden), "k, v": (hidden, kv), "gate, up": (hidden, ffn), "down": (ffn, hidden)}
    for name, (d, n) in shapes.items():
        yield from ((f"{name} {d}→{n}", TRAINING_TOKENS, line) for line in training(TRAINING_TOKENS, d, n, b))
        for tokens in DECODING_TOKENS:
            yield from ((f"{name} {d}→{n}", tokens, line) for line in decoding(tokens, d, n, b))
    for name, outs in {"q k v together": [hidden, kv, kv], "gate up together": [ffn, ffn]}.items():
        yield from ((name, TRAINING_TOKENS, line) for line in grouped(TRAINING_TOKENS, hidden, outs, b))


def table() -> Iterator[Row]:
    """One row a model, projection, number of tokens and kernel."""
    for model in USUAL:
        for projection, tokens, (kernel, run, frozen, adapted) in model_lines(SIZES[model], BLOCK_SIZE):
            row: Row = {"model": model, "projection": projection, "tokens": tokens, "kernel": kernel}
            row["bytes"] = sum(cost.bytes for cost in run)
            row["flops"] = sum(cost.flops for cost in run)
            for machine in MACHINES:
                over = microseconds(adapted, machine) / microseconds(frozen, machine)
                row[f"us {machine.name}"] = f"{microseconds(run, machine):.4g}"
                row[f"over frozen {machine.name}"] = f"{over:.3f}"
            yield row


def cells(row: Row) -> list[str]:
    """Of a Markdown table, in MB and GFLOP."""
    shown = {**row, "bytes": f"{row['bytes'] / 1e6:.4g} MB", "flops": f"{row['flops'] / 1e9:.4g} G"}
    return [str(value) for value in shown.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression for the first four columns")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--out", type=Path, help="write a CSV file")
    args = parser.parse_args()
    keys = ["model", "projection", "tokens", "kernel"]
    rows = [row for row in table() if re.search(args.only, " ".join(str(row[key]) for key in keys))]
    if not rows:
        raise SystemExit(f"--only {args.only!r} matches no row")
    if args.markdown or not args.out:
        print(markdown([list(rows[0]), *map(cells, rows)]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
