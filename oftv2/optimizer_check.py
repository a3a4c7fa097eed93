"""A warning where an optimizer trains nothing, because it was made before the adapter was."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .errors import OptimizerWarning
from .state import oft_layers

# By model whose adapter no optimizer has trained yet, how often each optimizer that stepped has been looked at.
_watched: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Optimizer, int]] = WeakKeyDictionary()
_LOOKS = 2
_hooks: list[Any] = []  # the one on all optimizers, from the first model on


def watch_optimizers(model: nn.Module) -> None:
    """Warns, once, if an optimizer steps that holds what is frozen in this model and nothing of its adapter.

    It does so at the optimizer's second step, for another one may train the adapter; with the first step of such a one
    the search ends. Whether anything got a gradient or changed does not matter, so accumulation, skipped steps and a
    learning rate of 0 do not either.

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
