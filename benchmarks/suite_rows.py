"""A batch whose rows go through 1, 8 or 64 adapters, in one pass and adapter by adapter: the suite ``rows``.

The base model alone, and one adapter for the whole batch, are what it is compared with. ``rows`` is one pass within
``adapters_per_row``; ``rows, anew`` enters it for the pass, which makes every Δ again, as activating an adapter does;
``one by one`` activates each adapter and passes its rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import models
import torch
from torch import Tensor, nn

import oftv2
from measure import Row, interleave, memory, timings
from options import Options

ADAPTERS = (1, 8, 64)
BASE, ONE, ROWS, ANEW, APART = "frozen", "one adapter", "rows", "rows, anew", "one by one"
RATIOS = {"over_frozen": BASE, "over_one_adapter": ONE, "over_one_by_one": APART}
# hidden size, feed-forward size, layers, heads, heads of k and v, vocabulary
MODEL, LARGE, TINY = (256, 640, 4, 4, 4, 512), (4096, 14336, 4, 32, 8, 512), (32, 64, 1, 2, 2, 128)


def measure(options: Options) -> Iterator[Row]:
    large = options.device.type == "cuda"
    side = 64 if options.quick else 4096 if large else 1024
    size = TINY if options.quick else LARGE if large else MODEL
    for tokens in (1, 16):
        for count in ADAPTERS:
            shared = {"rows": max(ADAPTERS), "tokens": tokens, "adapters": count}
            group = f"layer {side} x {side}, {shared['rows']} rows of {tokens}, {count} adapters"
            if options.wanted(group):
                linear = nn.Linear(side, side, device=options.device, dtype=options.dtype)
                x = torch.randn(shared["rows"], tokens, side, device=options.device, dtype=options.dtype)
                model = nn.ModuleDict({"linear": linear})
                yield from _measure({"group": group, **shared}, model, lambda m, part: m["linear"](part), x, options)
    for count in ADAPTERS:
        shared = {"rows": max(ADAPTERS), "tokens": 16, "adapters": count}
        group = f"Llama of {size[2]} x {size[0]}, {shared['rows']} rows of 16, {count} adapters"
        if options.wanted(group):
            model = models.random_llama(size, options.device, options.dtype)
            ids = torch.randint(3, 128, (shared["rows"], 16), device=options.device)
            yield from _measure({"group": group, **shared}, model, lambda m, part: m(part).logits, ids, options)


@torch.no_grad()
def _measure(
    shared: Row, model: Any, call: Callable[[Any, Tensor], Tensor], batch: Tensor, options: Options
) -> Iterator[Row]:
    names = [f"adapter{i}" for i in range(shared["adapters"])]
    adapt(model, names, options)
    by_row = copy.deepcopy(model)  # whose Δ are kept from one pass to the next
    rows = [names[i % len(names)] for i in range(len(batch))]

    def one_by_one(_: int = 0) -> Tensor:
        parts = []
        for i, name in enumerate(names):
            oftv2.set_adapter(model, name, trainable=False)
            parts.append(call(model, batch[i :: len(names)]))
        return torch.stack(parts, dim=1).flatten(0, 1)

    def anew(_: int = 0) -> Tensor:
        with oftv2.adapters_per_row(model, rows):
            return call(model, batch)

    def frozen(_: int) -> Tensor:
        with oftv2.disable_adapter(model):
            return call(model, batch)

    expected = one_by_one()
    error = (torch.linalg.norm((anew() - expected).float()) / torch.linalg.norm(expected.float())).item()
    if not error < (1e-5 if options.dtype == torch.float32 else 3e-2):
        raise SystemExit(f"{shared['group']}: in one pass the rows are {error:.1e} from their own; nothing was timed")
    with oftv2.adapters_per_row(by_row, rows):
        layers = [layer for layer in by_row.modules() if isinstance(layer, oftv2.OFTLayer)]
        before = memory(options.device, peak=False)
        kept = sum(layer.rows.delta(layer, options.dtype).nbytes for layer in layers)
        grew = memory(options.device, peak=False) - before
        runs = {BASE: frozen, ONE: lambda _: call(model, batch), ROWS: lambda _: call(by_row, batch)}
        runs |= {ANEW: anew, APART: one_by_one}
        samples = interleave(runs, options.device, calibrate=True, title=shared["group"], **options.effort)
    generators = sum(packed.nbytes for layer in layers for packed in layer.generators.values())
    weights = sum(layer.base_layer.weight.nbytes for layer in layers)
    for method in runs:
        row = {**shared, "dtype": options.dtype_name, "block_size": options.sizes.block_size, "method": method}
        row |= timings(samples, method, RATIOS)
        row |= {"generator_bytes": generators, "merged_copies_bytes": weights * len(names)}
        row |= {"kept_delta_bytes": kept, "memory_grew_bytes": grew} if method == ROWS else {}
        yield row | {"error": float(f"{error:.1e}")}


def adapt(model: nn.Module, names: list[str], options: Options) -> None:
    """Gives a model adapters with small random weights."""
    model.eval()
    oftv2.wrap_model(model, adapter_name=names[0], block_size=options.sizes.block_size)
    for name in names[1:]:
        oftv2.add_adapter(model, name, block_size=options.sizes.block_size)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, oftv2.OFTLayer):
                for packed in layer.generators.values():
                    packed.normal_(std=0.02)
