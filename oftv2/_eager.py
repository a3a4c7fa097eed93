"""Generators to activations as autograd nodes that call the default implementations themselves.

On a CPU, a small layer spends most of its time between operators: the dispatcher and a Python autograd kernel for each
take longer than the rotation of a few tokens. Where something looks at single operators (a compiler, a dispatch mode, a
tensor subclass), the operators are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import DEFAULTS
from ._weight_form import rotated

_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(*tensors: Tensor) -> bool:
    """Whether nothing needs to see which operators work on ``tensors``."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


def version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to, as far as that is counted."""
    return None if tensor.is_inference() else tensor._version


class Transform(torch.autograd.Function):
    """``Δ`` of several layers' generators of one block size. What is not used has no gradient.

    It keeps the generators itself: tensors that autograd keeps are gone after one backward pass, and layers that share
    this node may have several, each with a loss of its own.
    """

    @staticmethod
    def forward(ctx: Any, block_size: int, terms: int, *generators: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings = block_size, terms
        ctx.generators, ctx.versions = generators, [version(packed) for packed in generators]
        return tuple(_together("cayley_neumann", (generators,), block_size, terms))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[i + 2]]
        if any(version(ctx.generators[i]) != ctx.versions[i] for i in wanted):
            raise RuntimeError(
                "the generators of an adapter were written to between a forward pass and its backward pass, as by an "
                "optimizer's step; their gradients would be wrong"
            )
        found: Sequence[Tensor] = ()
        if wanted:
            used = [grads[i] for i in wanted], [ctx.generators[i] for i in wanted]
            found = _together("cayley_neumann_backward", used, *ctx.settings)
        by_place = dict(zip(wanted, found, strict=True))
        return None, None, *(by_place.get(i) for i in range(len(grads)))


def _together(name: str, operands: tuple[Sequence[Any], ...], *settings: int) -> Sequence[Tensor]:
    """An operator on the blocks of several layers, and its result layer by layer."""
    counts = [len(tensor) for tensor in operands[0]]
    joined = [tensors[0] if len(tensors) == 1 else torch.cat(list(tensors)) for tensors in operands]
    result: Tensor = DEFAULTS[name](*joined, *settings)
    return [result] if len(counts) == 1 else result.split(counts)


class Rotate(torch.autograd.Function):
    """``rotate(x, delta)``; keeps both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        return DEFAULTS["rotate"](x, delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, delta = ctx.saved_tensors
        wants_x, wants_delta = ctx.needs_input_grad
        grad_x = DEFAULTS["rotate"](grad, delta.mT) if wants_x else None
        return grad_x, DEFAULTS["rotate_delta_grad"](grad, x, delta) if wants_delta else None


class WeightForm(torch.autograd.Function):
    """A linear layer in the weight form; keeps ``x``, ``Δ`` and ``W``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, delta, weight)
        return DEFAULTS["weight_form"](x, delta, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, weight = ctx.saved_tensors
        grad_x = grad @ rotated(weight, delta)
        wants_delta = ctx.needs_input_grad[1]
        return grad_x, DEFAULTS["weight_form_delta_grad"](grad_x, x, delta) if wants_delta else None, None, None
