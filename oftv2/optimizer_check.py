"""Warnings at an optimizer's first steps: it was made before the adapter was, or layers are read and not called."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .base import OFTLayer
from .errors import OptimizerWarning, TargetWarning
from .state import oft_layers

# By model whose adapter no optimizer has trained yet, how often each optimizer that stepped has been looked at.
_watched: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Optimizer, int]] = WeakKeyDictionary()
_LOOKS = 2
_hooks: list[Any] = []  # the one on all optimizers, from the first model on


def watch_optimizers(model: nn.Module) -> None:
    """Warns, once, if an optimizer steps that holds what is frozen in this model and nothing of its adapter.

    It does so at the optimizer's second step, for another one may train the adapter; with the first step of such a one
    the search ends. Whether anything got a gradient or changed does not matter, so accumulation, skipped steps and a
    learning rate of 0 do not either. At that first step it warns of layers whose weight was read, and whose adapter got
    no gradient where others did: they were multiplied by, and never called.

    Args:
        model (nn.Module): a wrapped model, of which generators just began to train.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))
    _watched[model] = WeakKeyDictionary()


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _watched:
        return
    for model, looks in list(_watched.items()):
        look = looks.get(optimizer, 0) + 1
        if look > _LOOKS:
            continue
        looks[optimizer] = look
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trains = [p for _, layer in oft_layers(model) for p in layer.generators.values() if p.requires_grad]
        if any(id(parameter) in held for parameter in trains):
            del _watched[model]
            _warn_of_reads(model, held)
        elif trains and look == _LOOKS and any(id(p) in held for p in model.parameters() if not p.requires_grad):
            del _watched[model]
            _warn(model, optimizer)


def _warn(model: nn.Module, optimizer: Optimizer) -> None:
    warnings.warn(
        f"this {type(optimizer).__name__} trains nothing of the adapter in the {type(model).__name__}: it holds "
        "parameters that are frozen now and none of the adapter's. Make the optimizer after wrap_model, load_adapter "
        "or set_adapter: AdamW([p for p in model.parameters() if p.requires_grad])",
        OptimizerWarning,
        stacklevel=4,  # the line that calls optimizer.step()
    )


def _warn_of_reads(model: nn.Module, held: set[int]) -> None:
    trained = {path: _held(layer, held) for path, layer in oft_layers(model) if layer.weight_read}
    dead = [path for path, packed in trained.items() if packed and all(p.grad is None for p in packed)]
    if not dead or not any(p.grad is not None for _, layer in oft_layers(model) for p in _held(layer, held)):
        return
    reader = type(model.get_submodule(dead[0].rpartition(".")[0])).__name__
    leaves = sorted({path.rpartition(".")[2] for path in dead})
    others = f" (and {len(dead) - 1} other layers)" if len(dead) > 1 else ""
    warnings.warn(
        f"{dead[0]}{others} got no gradient: the {reader} reads this layer's weight instead of calling it, so its "
        f"adapter never trains. exclude_modules={leaves} leaves such layers out",
        TargetWarning,
        stacklevel=4,  # the line that calls optimizer.step()
    )


def _held(layer: OFTLayer, held: set[int]) -> list[Tensor]:
    """The generators of a layer that train, of those parameters."""
    return [packed for packed in layer.generators.values() if packed.requires_grad and id(packed) in held]
