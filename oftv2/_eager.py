"""Generators to a layer's activations as one autograd node that calls the default implementations themselves.

On a CPU, a small layer spends most of its time between operators: the dispatcher, a Python autograd kernel and a node
for each of two operators take longer than the rotation of a few tokens. Where something looks at single operators (a
compiler, a dispatch mode, a tensor subclass), the operators are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._ops import DEFAULTS, check_features
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


class NeumannRotate(torch.autograd.Function):
    """``rotate(x, cayley_neumann(generators, block_size, terms))``; keeps ``x``, the generators and ``Δ``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
        check_features(x, generators.shape[0], block_size)
        delta = DEFAULTS["cayley_neumann"](generators, block_size, terms)
        ctx.save_for_backward(x, generators, delta)
        ctx.settings = block_size, terms
        return DEFAULTS["rotate"](x, delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, generators, delta = ctx.saved_tensors
        wants_x, wants_generators, *_ = ctx.needs_input_grad
        grad_x = DEFAULTS["rotate"](grad, delta.mT) if wants_x else None
        if not wants_generators:
            return grad_x, None, None, None
        grad_delta = DEFAULTS["rotate_delta_grad"](grad, x, delta)
        return grad_x, DEFAULTS["cayley_neumann_backward"](grad_delta, generators, *ctx.settings), None, None


class NeumannWeightForm(torch.autograd.Function):
    """A linear layer in the weight form, ``Δ`` from generators; keeps ``x``, the generators, ``W`` and ``Δ``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, generators: Tensor, weight: Tensor, bias: Tensor | None, block_size: int, terms: int
    ) -> Tensor:
        check_features(x, generators.shape[0], block_size)
        delta = DEFAULTS["cayley_neumann"](generators, block_size, terms)
        ctx.save_for_backward(x, generators, weight, delta)
        ctx.settings = block_size, terms
        return DEFAULTS["weight_form"](x, delta, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, generators, weight, delta = ctx.saved_tensors
        grad_x = grad @ rotated(weight, delta)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None, None
        grad_delta = DEFAULTS["weight_form_delta_grad"](grad_x, x, delta)
        grad_generators = DEFAULTS["cayley_neumann_backward"](grad_delta, generators, *ctx.settings)
        return grad_x, grad_generators, None, None, None, None
