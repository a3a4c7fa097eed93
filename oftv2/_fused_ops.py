"""Operators that join steps which a backend may do in one pass: generators to rotated activations, several rotations
of one input, and a rotation on its way into the product with the weight.

Their default implementations are the steps one after the other, so what they compute does not depend on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operator import ops
from ._ops import check_features, check_rotation

ops.define("neumann_rotate", "(Tensor x, Tensor generators, int block_size, int terms) -> Tensor")
ops.define(
    "neumann_rotate_backward",
    "(Tensor grad, Tensor x, Tensor generators, int block_size, int terms) -> (Tensor, Tensor)",
)
ops.define("rotate_group", "(Tensor x, Tensor[] deltas) -> Tensor[]")
ops.define("rotate_group_backward", "(Tensor[] grads, Tensor x, Tensor[] deltas) -> (Tensor, Tensor[])")
ops.define("rotate_matmul", "(Tensor x, Tensor delta, Tensor weight, Tensor? bias) -> Tensor")


# ---------------------------------------------------------------------------------------------- from the generators


@ops.neumann_rotate.default
def _neumann_rotate(x: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    return ops.rotate(x, ops.cayley_neumann(generators, block_size, terms))


@ops.neumann_rotate_backward.default
def _neumann_rotate_backward(
    grad: Tensor, x: Tensor, generators: Tensor, block_size: int, terms: int
) -> tuple[Tensor, Tensor]:
    delta = ops.cayley_neumann(generators, block_size, terms)
    grad_x, grad_delta = ops.rotate_backward(grad, x, delta)
    return grad_x, ops.cayley_neumann_backward(grad_delta, generators, block_size, terms)


def _fake_neumann_rotate(x: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    check_features(x, generators.shape[0], block_size)
    return x.new_empty(x.shape)


ops.neumann_rotate.fake(_fake_neumann_rotate)
ops.neumann_rotate_backward.fake(
    lambda grad, x, generators, block_size, terms: (grad.new_empty(grad.shape), generators.new_empty(generators.shape))
)


def _save_neumann_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, generators, ctx.block_size, ctx.terms = inputs
    ctx.save_for_backward(x, generators)


def _neumann_rotate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, generators = ctx.saved_tensors
    settings = ctx.block_size, ctx.terms
    if ctx.needs_input_grad[1]:
        return *ops.neumann_rotate_backward(grad, x, generators, *settings), None, None
    return ops.neumann_rotate(grad, -generators, *settings), None, None, None  # Rᵀ is R of −Q


ops.neumann_rotate.differentiable(_save_neumann_rotate, _neumann_rotate_grad)


# ---------------------------------------------------------------------------------------------- several of one input


@ops.rotate_group.default
def _rotate_group(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    return [ops.rotate(x, delta) for delta in deltas]


@ops.rotate_group_backward.default
def _rotate_group_backward(grads: list[Tensor], x: Tensor, deltas: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    grad_x, *rest = (ops.rotate(grad, delta.mT) for grad, delta in zip(grads, deltas, strict=True))
    for other in rest:
        grad_x += other
    return grad_x, [ops.rotate_delta_grad(grad, x, delta) for grad, delta in zip(grads, deltas, strict=True)]


def _fake_rotate_group(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    for delta in deltas:
        check_rotation(x, delta)
    return [x.new_empty(x.shape) for _ in deltas]


ops.rotate_group.fake(_fake_rotate_group)
ops.rotate_group_backward.fake(
    lambda grads, x, deltas: (x.new_empty(x.shape), [delta.new_empty(delta.shape) for delta in deltas])
)


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, deltas = inputs
    ctx.save_for_backward(x, *deltas)


def _group_grad(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    x, *deltas = ctx.saved_tensors
    filled = [torch.zeros_like(x) if grad is None else grad for grad in grads]
    return ops.rotate_group_backward(filled, x, deltas)


ops.rotate_group.differentiable(_save_group, _group_grad)


# ---------------------------------------------------------------------------------------------- into the product


@ops.rotate_matmul.default
def _rotate_matmul(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(ops.rotate(x, delta), weight, bias)


def _fake_rotate_matmul(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_rotation(x, delta)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


ops.rotate_matmul.fake(_fake_rotate_matmul)
