"""Operators that join steps which a backend may do in one pass: generators to rotated activations, several rotations
of one input, and a rotation on its way into the product with the weight.

Their default implementations are the steps one after the other, so what they compute does not depend on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops import check_features, check_rotation, default

torch.library.define("oftv2::neumann_rotate", "(Tensor x, Tensor generators, int block_size, int terms) -> Tensor")
torch.library.define(
    "oftv2::neumann_rotate_backward",
    "(Tensor grad, Tensor x, Tensor generators, int block_size, int terms) -> (Tensor, Tensor)",
)
torch.library.define("oftv2::rotate_group", "(Tensor x, Tensor[] deltas) -> Tensor[]")
torch.library.define(
    "oftv2::rotate_group_backward", "(Tensor[] grads, Tensor x, Tensor[] deltas) -> (Tensor, Tensor[])"
)
torch.library.define("oftv2::rotate_matmul", "(Tensor x, Tensor delta, Tensor weight, Tensor? bias) -> Tensor")


# ---------------------------------------------------------------------------------------------- from the generators


@default("neumann_rotate")
def _neumann_rotate(x: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    return torch.ops.oftv2.rotate(x, torch.ops.oftv2.cayley_neumann(generators, block_size, terms))


@default("neumann_rotate_backward")
def _neumann_rotate_backward(
    grad: Tensor, x: Tensor, generators: Tensor, block_size: int, terms: int
) -> tuple[Tensor, Tensor]:
    delta = torch.ops.oftv2.cayley_neumann(generators, block_size, terms)
    grad_x, grad_delta = torch.ops.oftv2.rotate_backward(grad, x, delta)
    return grad_x, torch.ops.oftv2.cayley_neumann_backward(grad_delta, generators, block_size, terms)


def _fake_neumann_rotate(x: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    check_features(x, generators.shape[0], block_size)
    return x.new_empty(x.shape)


torch.library.register_fake("oftv2::neumann_rotate")(_fake_neumann_rotate)
torch.library.register_fake("oftv2::neumann_rotate_backward")(
    lambda grad, x, generators, block_size, terms: (grad.new_empty(grad.shape), generators.new_empty(generators.shape))
)


def _save_neumann_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, generators, ctx.block_size, ctx.terms = inputs
    ctx.save_for_backward(x, generators)


def _neumann_rotate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, generators = ctx.saved_tensors
    settings = ctx.block_size, ctx.terms
    if ctx.needs_input_grad[1]:
        return *torch.ops.oftv2.neumann_rotate_backward(grad, x, generators, *settings), None, None
    return torch.ops.oftv2.neumann_rotate(grad, -generators, *settings), None, None, None  # Rᵀ is R of −Q


torch.library.register_autograd("oftv2::neumann_rotate", _neumann_rotate_grad, setup_context=_save_neumann_rotate)


# ---------------------------------------------------------------------------------------------- several of one input


@default("rotate_group")
def _rotate_group(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    return [torch.ops.oftv2.rotate(x, delta) for delta in deltas]


@default("rotate_group_backward")
def _rotate_group_backward(grads: list[Tensor], x: Tensor, deltas: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    grad_x, *rest = (torch.ops.oftv2.rotate(grad, delta.mT) for grad, delta in zip(grads, deltas, strict=True))
    for other in rest:
        grad_x += other
    return grad_x, [
        torch.ops.oftv2.rotate_delta_grad(grad, x, delta) for grad, delta in zip(grads, deltas, strict=True)
    ]


def _fake_rotate_group(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    for delta in deltas:
        check_rotation(x, delta)
    return [x.new_empty(x.shape) for _ in deltas]


torch.library.register_fake("oftv2::rotate_group")(_fake_rotate_group)
torch.library.register_fake("oftv2::rotate_group_backward")(
    lambda grads, x, deltas: (x.new_empty(x.shape), [delta.new_empty(delta.shape) for delta in deltas])
)


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, deltas = inputs
    ctx.save_for_backward(x, *deltas)


def _group_grad(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    x, *deltas = ctx.saved_tensors
    filled = [torch.zeros_like(x) if grad is None else grad for grad in grads]
    return torch.ops.oftv2.rotate_group_backward(filled, x, deltas)


torch.library.register_autograd("oftv2::rotate_group", _group_grad, setup_context=_save_group)


# ---------------------------------------------------------------------------------------------- into the product


@default("rotate_matmul")
def _rotate_matmul(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(torch.ops.oftv2.rotate(x, delta), weight, bias)


def _fake_rotate_matmul(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_rotation(x, delta)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("oftv2::rotate_matmul")(_fake_rotate_matmul)
