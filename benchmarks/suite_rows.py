"""A batch whose rows go through 1, 8 or 64 adapters, in one pass and adapter by adapter: the suite ``rows``.

The base model alone, and one adapter for the whole batch, are what it is compared with. ``rows`` is one pass within
``adapters_per_row``; ``rows, anew`` enters it for the pass, which makes every Δ again, as activating an adapter does;
``one by one`` activates each adapter and passes its rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
import oftv2
from measure import Row, in_fresh_process, interleave, memory, relative_error, timings
from model_sizes import Size
from options import Options

ADAPTERS = (1, 8, 64)
BATCH = 64
BASE, ONE, ROWS, ANEW, APART = "frozen", "one adapter", "rows", "rows, anew", "one by one"
RATIOS = {"over_frozen": BASE, "over_one_adapter": ONE, "over_one_by_one": APART}
SMALL, LARGE, TINY = Size(256, 640, 4, 4, 4, 512), Size(4096, 14336, 4, 32, 8, 512), Size(32, 64, 1, 2, 2, 128)


class Case(NamedTuple):
    """A plain model, its batch, and how it is called."""

    name: str
    tokens: int
    model: Any
    batch: Tensor
    call: Callable[[Any, Tensor], Tensor]


def measure(options: Options) -> Iterator[Row]:
    for kind in ("layer, one token", "layer", "model"):
        for count in ADAPTERS:
            made = case(kind, options)
            group = f"{made.name}, {BATCH} rows of {made.tokens}, {count} adapters"
            if options.wanted(group):
                shared = {"group": group, "rows": BATCH, "tokens": made.tokens, "adapters": count}
                yield from _measure(shared, made, options)
                if kind == "model":
                    grew = in_fresh_process("suite_rows:memory_growth", count=count, told=options.to_json())
                    yield {**shared, "method": "memory", "grew_bytes": grew}


def case(kind: str, options: Options) -> Case:
    """One of the kinds that are measured."""
    on_gpu = options.device.type == "cuda"
    torch.manual_seed(options.seed)
    if kind == "model":
        size = TINY if options.quick else LARGE if on_gpu else SMALL
        ids = torch.randint(3, 128, (BATCH, 16), device=options.device)
        model = models.random_model(size, options.device, options.dtype).eval()
        return Case(f"Llama of {size.layers} x {size.hidden}", 16, model, ids, lambda model, ids: model(ids).logits)
    side, tokens = 64 if options.quick else 4096 if on_gpu else 1024, 1 if kind.endswith("token") else 16
    place = {"device": options.device, "dtype": options.dtype}
    model = nn.ModuleDict({"linear": nn.Linear(side, side, **place)}).eval()
    x = torch.randn(BATCH, tokens, side, **place)
    return Case(f"layer {side} x {side}", tokens, model, x, lambda model, x: model["linear"](x))


def adapt(model: nn.Module, count: int, options: Options) -> tuple[list[str], list[str]]:
    """Gives a model adapters with small random weights: their names, and those of the rows, in turn."""
    names = [f"adapter{i}" for i in range(count)]
    oftv2.wrap_model(model, adapter_name=names[0], block_size=options.sizes.block_size)
    for name in names[1:]:
        oftv2.add_adapter(model, name, block_size=options.sizes.block_size)
    with torch.no_grad():
        for layer in adapted(model):
            for packed in layer.generators.values():
                packed.normal_(std=0.02)
    return names, [names[i % count] for i in range(BATCH)]


def adapted(model: nn.Module) -> list[oftv2.OFTLayer]:
    return [layer for layer in model.modules() if isinstance(layer, oftv2.OFTLayer)]


@torch.no_grad()
def _measure(shared: Row, made: Case, options: Options) -> Iterator[Row]:
    _, _, model, batch, call = made
    names, rows = adapt(model, shared["adapters"], options)
    kept = copy.deepcopy(model)  # that stays within the context: its Δ are kept from one pass to the next

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

    error = relative_error(anew(), one_by_one())
    if not error < (1e-5 if options.dtype == torch.float32 else 3e-2):
        raise SystemExit(f"{shared['group']}: in one pass the rows are {error:.1e} from their own; nothing was timed")
    with oftv2.adapters_per_row(kept, rows):
        runs = {BASE: frozen, ONE: lambda _: call(model, batch), ROWS: lambda _: call(kept, batch)}
        runs |= {ANEW: anew, APART: one_by_one}
        samples = interleave(runs, options.device, calibrate=True, title=shared["group"], **options.effort)
        delta_bytes = sum(layer.rows.delta(layer, layer.weight).nbytes for layer in adapted(kept))
    sizes = {
        "generator_bytes": sum(packed.nbytes for layer in adapted(model) for packed in layer.generators.values()),
        "kept_delta_bytes": delta_bytes,
        "merged_copies_bytes": sum(layer.weight.nbytes for layer in adapted(model)) * len(names),
    }
    for method in runs:
        row = {**shared, "dtype": options.dtype_name, "block_size": options.sizes.block_size, "method": method}
        yield row | timings(samples, method, RATIOS) | sizes | {"error": float(f"{error:.1e}")}


@torch.no_grad()
def memory_growth(count: int, told: dict[str, Any]) -> int:
    """Bytes by which the model grows with its adapters and the Δ that are kept in the context."""
    options = Options.of(told)
    _, _, model, batch, call = case("model", options)
    call(model, batch)
    before = memory(options.device, peak=False)
    _, rows = adapt(model, count, options)
    with oftv2.adapters_per_row(model, rows):
        call(model, batch)
        return memory(options.device, peak=False) - before
