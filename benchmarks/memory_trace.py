"""Which memory operators fill, tensor by tensor, on any device and without its allocator: who holds it is not asked."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Every storage that operators fill while it is entered, until it is freed.

    It sees what autograd keeps, and what custom functions and modules keep in attributes; not what an operator of this
    library frees within one call.

    Args:
        there (list[Tensor]): tensors that are there anyway, and are not counted.

    Attributes:
        live, peak (int): bytes that exist now, and that existed at most.
    """

    def __init__(self, there: list[Tensor] | None = None) -> None:
        super().__init__()
        self._there = {tensor.untyped_storage()._cdata for tensor in there or []}
        self._alive: dict[int, tuple[torch.dtype, int]] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._there and key not in self._alive:
            self._alive[key] = tensor.dtype, storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._alive.pop(key)[1]

    def alive(self, besides: set[int] | None = None) -> list[tuple[torch.dtype, int]]:
        """``(dtype, bytes)`` of those that exist, but for the storages of ``besides`` (their ``_cdata``)."""
        return [entry for key, entry in self._alive.items() if key not in (besides or ())]


def held(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, those of bitsandbytes' 4-bit weights too."""
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    nested = [state.state2 for state in states if state.nested]
    offsets = [state.offset for state in states if state.nested]
    scales = [tensor for state in (*states, *nested) for tensor in (state.absmax, state.code)]
    return [*model.parameters(), *model.buffers(), *scales, *offsets]


def kept_and_peak(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """Bytes that exist between a forward and its backward pass, and the most in either, beside what is ``held``.

    The gradients of what trains are part of the peak.
    """
    with Storages([*held(model), ids]) as storages:
        loss = model(input_ids=ids, labels=ids).loss
        kept = storages.live
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return kept, storages.peak
