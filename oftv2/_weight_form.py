"""The weight form of an adapted linear layer, as an operator: the weight is rotated, and the activations are not.

``y = x W′ᵀ`` with ``W′ = W · blockdiag(R)ᵀ`` is the same function as rotating ``x``. It costs ``4 n d b`` operations
where rotating ``x`` costs ``4 T d b``, and passes over ``W`` rather than over activations, so it is the cheaper form
once there are more tokens than output features. ``W′`` lives within one call: the backward pass builds it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operator import ops
from ._ops import add_identity, check_features, check_rotation, identity, rotate, rotate_delta_grad

ops.define("weight_form", "(Tensor x, Tensor delta, Tensor weight, Tensor? bias) -> Tensor")
ops.define("weight_form_backward", "(Tensor grad, Tensor x, Tensor delta, Tensor weight) -> (Tensor, Tensor)")
ops.define(
    "neumann_weight_form",
    "(Tensor x, Tensor generators, Tensor weight, Tensor? bias, int block_size, int terms) -> Tensor",
)
ops.define("weight_form_delta_grad", "(Tensor grad_x, Tensor x, Tensor delta) -> Tensor")


# Up to so many elements of W, a batched product is quicker to start than a convolution, of which the step is made twice
# (2 threads, float32, b = 32, whole training steps: 0.4 ms less at (n, d) = (576, 1536), 0.1 at (1024, 1024); the
# rotation alone 6.1 against 2.8 ms at (2048, 2048)).
_SMALL_WEIGHT = 1 << 20


def rotated(weight: Tensor, delta: Tensor) -> Tensor:
    """``W′``; of a small W as the transpose of R times Wᵀ, which takes W as it lies and returns rows of Wᵀ."""
    if weight.device.type != "cpu":
        return ops.rotate(weight, delta.mT)
    if weight.numel() > _SMALL_WEIGHT:
        return rotate(weight, delta.mT)
    R = add_identity(delta.to(weight.dtype))
    return torch.bmm(R, weight.t().unflatten(0, delta.shape[:2])).flatten(0, 1).t()


@ops.weight_form.default
def _weight_form(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_rotation(x, delta)
    return torch.nn.functional.linear(x, rotated(weight, delta), bias)


@ops.weight_form_backward.default
def _weight_form_backward(grad: Tensor, x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = grad @ rotated(weight, delta)
    return grad_x, ops.weight_form_delta_grad(grad_x, x, delta)


@ops.weight_form_delta_grad.default
def _weight_form_delta_grad(grad_x: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    """``∂L/∂R_j = x_jᵀ (∂L/∂x̂)_j``, and ``(∂L/∂x̂)_j = (∂L/∂x)_j R_j⁻ᵀ``."""
    R = add_identity(delta)
    if R.device.type == "cpu":
        return torch.bmm(rotate_delta_grad(grad_x, x, delta), _inverse(R).mT)
    inverse = torch.linalg.inv_ex(R).inverse  # does not wait for the device
    return torch.bmm(ops.rotate_delta_grad(grad_x, x, delta), inverse.mT)


def _inverse(R: Tensor) -> Tensor:
    """``R⁻¹``: Rᵀ, improved by Newton steps that square its error; a direct solver where R is far from orthogonal.

    A few batched products take a third of the time of LAPACK's block by block (127 against 346 µs, 32 blocks of 32),
    and a tenth of it or less when other programs compete for the cores.
    """
    inverse, precision, bound = R.mT, torch.finfo(R.dtype).eps, 0.1
    while True:
        residual = torch.baddbmm(identity(R.shape[-1], R.dtype, R.device), R, inverse, alpha=-1)
        error = R.shape[-1] * torch.linalg.vector_norm(residual, torch.inf).item()  # bounds ‖I − R·inverse‖
        if not error < bound:  # or products are of less than R's precision, as torch may be told to make them
            return torch.linalg.inv_ex(R).inverse  # NaN in, NaN out
        inverse = torch.baddbmm(inverse, inverse, residual)
        if error**2 < precision:
            return inverse
        bound = error / 2


def _fake_weight_form(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_rotation(x, delta)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


ops.weight_form.fake(_fake_weight_form)
ops.weight_form_backward.fake(lambda grad, x, delta, weight: (x.new_empty(x.shape), delta.new_empty(delta.shape)))
ops.weight_form_delta_grad.fake(lambda grad_x, x, delta: delta.new_empty(delta.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, delta, weight = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        return *ops.weight_form_backward(grad, x, delta, weight), None, None
    return grad @ rotated(weight, delta), None, None, None


ops.weight_form.differentiable(_save, _gradients)


# ---------------------------------------------------------------------------------------------- from the generators
# What is kept of the rotation is the generators, which are there anyway; the backward pass makes Δ again.


@ops.neumann_weight_form.default
def _neumann_weight_form(
    x: Tensor, generators: Tensor, weight: Tensor, bias: Tensor | None, block_size: int, terms: int
) -> Tensor:
    delta = ops.cayley_neumann(generators, block_size, terms)
    return ops.weight_form(x, delta, weight, bias)


def _fake_neumann_weight_form(
    x: Tensor, generators: Tensor, weight: Tensor, bias: Tensor | None, block_size: int, terms: int
) -> Tensor:
    check_features(x, generators.shape[0], block_size)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


ops.neumann_weight_form.fake(_fake_neumann_weight_form)


def _save_neumann(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, generators, weight, _, ctx.block_size, ctx.terms = inputs
    ctx.save_for_backward(x, generators, weight)


def _neumann_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, generators, weight = ctx.saved_tensors
    settings = ctx.block_size, ctx.terms
    delta = ops.cayley_neumann(generators, *settings)
    grad_x, grad_delta = ops.weight_form_backward(grad, x, delta, weight)
    return grad_x, ops.cayley_neumann_backward(grad_delta, generators, *settings), None, None, None, None


ops.neumann_weight_form.differentiable(_save_neumann, _neumann_gradients)
