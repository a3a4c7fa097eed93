"""Δ of all layers of a model made together, as a forward pass begins: on a CPU, where a layer has few blocks.

The transform of some tens of small blocks takes a CPU little longer to compute than to begin. So hooks of the model
make it for all layers that train and hand each its own, for this pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._eager import Transform
from .base import OFTLayer
from .checkpointing import in_checkpoint
from .errors import AdapterError
from .functional import can_be_direct
from .optimizer_check import check_exchanged
from .rotation import KeptRotation
from .sharding import is_distributed

# Generators that are transformed at once (2 threads, float32, b = 32, a step of 64 tokens of SmolLM2-135M, with 4680
# blocks in 210 layers: 480 ms in parts of 130 to 530 blocks, 505 in parts of 35, 540 in one).
_PACKED_ELEMENTS = 1 << 17
_SERVED: WeakKeyDictionary[nn.Module, Sequence[OFTLayer]] = WeakKeyDictionary()  # the layers of passes under way


def add_pass_hooks(model: nn.Module) -> None:
    """Registers the hooks on ``model``."""
    model.register_forward_pre_hook(hand_out, with_kwargs=True)
    model.register_forward_hook(take_back, always_call=True)


def remove_pass_hooks(model: nn.Module) -> None:
    """Takes them off again."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (hand_out, take_back)]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def hand_out(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: makes the Δ of this pass and hands them to the layers.

    Processes that share the work exchange each layer's gradients while the next are computed; there each makes its own.

    Raises:
        AdapterError: ``adapter_names``, which goes by rows in PEFT, and which transformers' models take and ignore.
    """
    if "adapter_names" in kwargs:
        raise AdapterError(
            "adapter_names, as PEFT's models take it, would be ignored: use `with oftv2.adapters_per_row(model, …):` "
            "around the call, with None for the base model"
        )
    take_back(model)  # what is left of a pass that a KeyboardInterrupt ended
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_checkpoint():
        return
    if is_distributed():
        check_exchanged(model)
        return
    alike: dict[tuple[int, int, torch.dtype], list[tuple[OFTLayer, Tensor]]] = {}
    for module in model.modules():
        if not isinstance(module, OFTLayer):
            if module.training and _checkpoints(module):
                return
        elif module.rotating and not _stands_apart(module):
            packed = module.changing_generators()
            if packed is not None and can_be_direct(packed):
                rotation = module.rotation
                alike.setdefault((rotation.block_size, rotation.terms, packed.dtype), []).append((module, packed))
    for (block_size, terms, _), found in alike.items():
        for part in _parts(found):
            deltas = Transform.apply(block_size, terms, *(packed for _, packed in part))
            for (layer, _), delta in zip(part, deltas, strict=True):
                _hand(layer, KeptRotation(layer.generators_of(layer.sequence), delta))
    _SERVED[model] = [layer for found in alike.values() for layer, _ in found]


def _checkpoints(module: nn.Module) -> bool:
    """Whether a module of transformers' checkpoints; asked of each module of a model, so by no slow ``getattr``."""
    of_class = getattr(type(module), "gradient_checkpointing", False)
    return bool(vars(module).get("gradient_checkpointing", of_class))


def _parts(layers: Sequence[tuple[OFTLayer, Tensor]]) -> Iterator[Sequence[tuple[OFTLayer, Tensor]]]:
    """Neighbours whose Δ are made at once, as many as stay in a CPU's caches; so does, in the backward pass, what their
    gradients are made of."""
    start = size = 0
    for i, (_, packed) in enumerate(layers, 1):
        size += packed.numel()
        if size >= _PACKED_ELEMENTS or i == len(layers):
            yield layers[start:i]
            start, size = i, 0


def _stands_apart(layer: OFTLayer) -> bool:
    """Whether layers in one node of the graph would mind each other's backward passes: scaling and projection keep what
    is gone after one, and hooks of generators would be called without a gradient where only other layers are used."""
    for name, packed in zip(layer.sequence, layer.generators_of(layer.sequence), strict=True):
        rotation = layer.rotations[name]
        if rotation.scale or rotation.constraint is not None:
            return True
        if packed._backward_hooks or packed._post_accumulate_grad_hooks:
            return True
    return False


def take_back(model: nn.Module, args: Any = (), output: Any = None) -> None:
    """A forward hook, called after failures too: no later pass finds these Δ."""
    for layer in _SERVED.pop(model, ()):
        _hand(layer, None)


def _hand(layer: OFTLayer, made: KeptRotation | None) -> None:
    object.__setattr__(layer, "handed", made)  # a module's own looks first whether this is a parameter or a module
