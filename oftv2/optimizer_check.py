"""Warnings at an optimizer's first steps: it was made before the adapter was, or layers are read and not called; and
DistributedDataParallel that was made before."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .base import OFTLayer
from .errors import AdapterError, OptimizerWarning, TargetWarning
from .state import oft_layers


@dataclass
class _Watch:
    """How often each optimizer that stepped has been looked at, and the adapters that one of them trains."""

    looks: WeakKeyDictionary[Optimizer, int] = field(default_factory=WeakKeyDictionary)
    trained: set[str] = field(default_factory=set)


_watched: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()  # by model with an adapter that none trains yet
_LOOKS = 2
_hooks: list[Any] = []  # the one on all optimizers, from the first model on
_exchanged: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # what trained in the first pass in a DDP


def watch_optimizers(model: nn.Module) -> None:
    """Warns, once, if an optimizer steps that holds something of this model, and no optimizer holds an adapter of it.

    It does so at the optimizer's second step, for another one may train the adapter; with the first step of such a one
    the search ends. Whether anything got a gradient or changed does not matter, so accumulation, skipped steps and a
    learning rate of 0 do not either. At that first step it warns of layers whose weight was read, and whose adapter got
    no gradient where others did: they were multiplied by, and never called.

    Args:
        model (nn.Module): a wrapped model, of which generators just began to train.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))
    _watched[model] = _Watch()


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _watched:
        return
    for model, watch in list(_watched.items()):
        look = watch.looks.get(optimizer, 0) + 1
        if look > _LOOKS:
            continue
        watch.looks[optimizer] = look
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trains = _trains(model)
        watch.trained |= {name for name, own in trains.items() if any(id(parameter) in held for parameter in own)}
        missing = [name for name in trains if name not in watch.trained]
        adapters = {id(parameter) for own in trains.values() for parameter in own}
        others = (p for p in model.parameters() if not p.requires_grad or id(p) in adapters)
        if trains and not missing:
            del _watched[model]
            _warn_of_reads(model, held)
        elif missing and look == _LOOKS and any(id(parameter) in held for parameter in others):
            del _watched[model]
            _warn(model, optimizer, missing)


def _trains(model: nn.Module) -> dict[str, list[Tensor]]:
    """The generators that train, by adapter."""
    found: dict[str, list[Tensor]] = {}
    for _, layer in oft_layers(model):
        for name, packed in layer.generators.items():
            if packed.requires_grad:
                found.setdefault(name, []).append(packed)
    return found


def _warn(model: nn.Module, optimizer: Optimizer, missing: list[str]) -> None:
    warnings.warn(
        f"this {type(optimizer).__name__} trains nothing of the adapter {missing[0]!r} in the {type(model).__name__}: "
        "it holds other parameters of the model and none of that adapter's. Make the optimizer after wrap_model, "
        "load_adapter or set_adapter: AdamW([p for p in model.parameters() if p.requires_grad])",
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


def check_exchanged(model: nn.Module) -> None:
    """In a pass of DistributedDataParallel, which exchanges the gradients of what trained when it was made.

    Raises:
        AdapterError: generators began to train after its first pass: each process would train its own.
    """
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    now = {id(packed): name for name, own in _trains(model).items() for packed in own}
    new = [name for key, name in now.items() if key not in _exchanged.setdefault(ddp, set(now))]
    if new:
        raise AdapterError(
            f"the adapter {new[0]!r} trains since set_adapter, and this DistributedDataParallel was made before and "
            "would not exchange its gradients: make it anew, DistributedDataParallel(model), after set_adapter"
        )
