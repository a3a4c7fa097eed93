"""Recognising a base model: an adapter on other weights than it was trained on gives nonsense without any error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .experts import is_experts
from .partitioned import gathered, is_partitioned
from .quant import find_backend
from .sharding import class_name, unsharded

_MAX_LAYERS = 8
_ROWS = 8
# A sketch changes by 0.2% when weights are rounded to bf16 (0.7% was the most of 1800, and 1% would refuse one base in
# some thousands), by about 10% when they are quantized to NF4, and by 140% between unrelated weights. What is smaller
# than that, such as a slight adapter merged already, merged_before.py finds.
_TOLERANCE = 0.02
_TOLERANCE_QUANTIZED = 0.4


def keep_sketches(layers: Mapping[str, nn.Module]) -> None:
    """Notes the sketches of weights that ZeRO-3 partitions, of layers that :func:`describe_base` would choose.

    It gathers them, in which every process takes part; checkpoints are written by one process alone.
    """
    for name in _chosen(layers):
        weight: Any = layers[name]._parameters.get("weight")
        if is_partitioned(weight):
            with gathered([weight]):
                weight._oftv2_sketch = sketch(layers[name])


def _chosen(layers: Mapping[str, nn.Module]) -> list[str]:
    return list(layers)[:: max(1, -(-len(layers) // _MAX_LAYERS))]


def describe_base(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Any]:
    """What identifies a base model: its class, its name, and sketches of the weights of some adapted layers.

    Args:
        model (nn.Module): the model.
        layers (dict[str, nn.Module]): base layers by their path.
    """
    sketches = {name: sketch(layers[name]) for name in _chosen(layers)}
    return {
        "class": class_name(model),
        "name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or "",
        "sketches": {name: values for name, values in sketches.items() if values is not None},
    }


def compare_base(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """The layers of ``model`` whose weights are not those described in ``saved``, one message each."""

    def ours(name: str) -> dict[str, Any] | None:
        module = model.get_submodule(name)
        return sketch(getattr(module, "base_layer", module))

    return compare_sketches(saved, ours)


def compare_sketches(saved: dict[str, Any], ours_of: Callable[[str], dict[str, Any] | None]) -> list[str]:
    """The layers whose sketches, given by their paths, are not those in ``saved``, one message each."""
    problems = []
    for name, theirs in saved.get("sketches", {}).items():
        ours = ours_of(name)
        if ours is None:
            continue
        a, b = torch.tensor(theirs["values"]), torch.tensor(ours["values"])
        quantized = theirs["quantized"] or ours["quantized"]
        scale = max(a.norm().item(), b.norm().item(), 1e-30)
        difference = (a - b).norm().item() / scale if a.shape == b.shape else float("inf")
        if difference > (_TOLERANCE_QUANTIZED if quantized else _TOLERANCE):
            base = f"{saved['name_or_path'] or 'the base'} ({saved['class']})"
            problems.append(
                f"{name}: the base weights differ by {difference:.0%} from those of {base} that the adapter was "
                "trained on"
            )
    return problems


@torch.no_grad()
def sketch(module: Any) -> dict[str, Any] | None:
    """A few weighted sums of the weight, which survive rounding and quantization; None where it cannot be read."""
    backend = find_backend(module)
    if is_partitioned(module._parameters.get("weight")):
        return getattr(module.weight, "_oftv2_sketch", None)
    with unsharded(module, module.parameters()):
        if backend is None:
            weight: Tensor | None = module.down_proj if is_experts(module) else getattr(module, "weight", None)
        else:
            weight = None if backend.dequantize is None else backend.dequantize(module)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point() or weight.dim() < 2:
        return None
    return sketch_weight(weight, quantized=backend is not None)


def sketched_rows(count: int) -> range:
    """The rows of a weight that its sketch is made of; a weight of just these has the same sketch."""
    return range(0, count, max(1, count // _ROWS))[:_ROWS]


def sketch_weight(weight: Tensor, *, quantized: bool) -> dict[str, Any]:
    """The sketch of a floating-point weight of two dimensions or more."""
    chosen = sketched_rows(weight.shape[0])
    rows = weight.flatten(1)[chosen.start : chosen.stop : chosen.step].float().cpu()
    position = torch.arange(rows.shape[1], dtype=torch.float64)
    values = rows @ torch.cos(0.37 * position * position).float()
    return {"quantized": quantized, "values": [round(value, 7) for value in values.tolist()]}
