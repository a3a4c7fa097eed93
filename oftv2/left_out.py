"""Warnings of what ``"all-linear"`` leaves as it is, where that may be most of a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from torch import nn

from .config import ALL_LINEAR
from .errors import TargetWarning
from .experts import holds_experts, is_experts

_NEARLY_ALL = 10  # times the adapted weights; of ResNet-50 with its 1000 classes it is 11


def warn_of_experts(modules: dict[str, nn.Module], known: set[int]) -> None:
    """A TargetWarning where experts with stacked weights are neither adapted nor excluded."""
    found = [name for name, module in modules.items() if id(module) not in known and holds_experts(module, name)]
    if not found:
        return
    module, last = modules[found[0]], found[0].rpartition(".")[2]
    rotates = f"target_modules=[{ALL_LINEAR!r}, {last!r}] rotates each expert on its own"
    warnings.warn(
        f"{ALL_LINEAR!r} leaves the experts of {len(found)} modules ({found[0]}, a {type(module).__name__}, …) as they "
        f"are, most of the weights as a rule: {rotates if is_experts(module) else 'this kind cannot be adapted'}. "
        f"exclude_modules=[{last!r}] spares this warning",
        TargetWarning,
        stacklevel=4,
    )


def warn_of_convolutions(modules: dict[str, nn.Module], adapted: Iterable[nn.Module], known: set[int]) -> None:
    """A TargetWarning where convolutions that are not ``known`` hold nearly all of the weights."""
    found = {
        name: math.prod((module.in_channels // module.groups, module.out_channels, *module.kernel_size))
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and id(module) not in known
    }
    layers = list(adapted)
    weights = sum(tensor.numel() for module in layers for tensor in (*module.parameters(), *module.buffers()))
    if not found or sum(found.values()) < _NEARLY_ALL * weights:
        return
    first = next(iter(found))
    warnings.warn(
        f"{ALL_LINEAR!r} leaves the {len(found)} convolutions ({first}, …) as they are, which are nearly all of the "
        f"weights: target_modules=[{ALL_LINEAR!r}, {first!r}] rotates those that it names too, and a list without "
        f"{ALL_LINEAR!r} spares this warning",
        TargetWarning,
        stacklevel=4,
    )
