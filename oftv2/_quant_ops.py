"""Operators on bitsandbytes' 4-bit weights: dequantized and rotated in one go, and the forms of a layer made of that.

A 4-bit weight ``(n, d)`` is handed over as bitsandbytes stores it: ``packed``, two neighbours a byte, the first in the
high half; ``absmax``, a scale for each ``blocksize`` neighbours; ``code``, the 16 values of the format; and where
``absmax`` is quantized itself, ``nested`` = its code, its absmax and its offset. ``nested`` is empty otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._operator import ops
from ._ops import check_features, check_rotation

_WEIGHT = "Tensor packed, Tensor absmax, Tensor code, Tensor[] nested, int[] shape, int blocksize, int blocksize2"

ops.define("dequantize_rotate_4bit", f"(Tensor delta, {_WEIGHT}, ScalarType dtype) -> Tensor")
ops.define("weight_form_4bit", f"(Tensor x, Tensor delta, Tensor? bias, {_WEIGHT}) -> Tensor")
ops.define("weight_form_4bit_backward", f"(Tensor grad, Tensor x, Tensor delta, {_WEIGHT}) -> (Tensor, Tensor)")
ops.define(
    "neumann_weight_form_4bit",
    f"(Tensor x, Tensor generators, Tensor? bias, {_WEIGHT}, int block_size, int terms) -> Tensor",
)
ops.define("rotate_matmul_4bit", f"(Tensor x, Tensor delta, Tensor? bias, {_WEIGHT}) -> Tensor")


class Weight4bit(NamedTuple):
    """A 4-bit weight in the order of the operators' arguments."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested: list[Tensor]
    shape: list[int]
    blocksize: int
    blocksize2: int


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """``(n, d)`` in plain torch, rounded to ``dtype`` as bitsandbytes does."""
    packed = weight.packed.reshape(-1).view(torch.uint8).int()
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    scales = with_plain_scales(weight).absmax.float().repeat_interleave(weight.blocksize)[: nibbles.numel()]
    return (weight.code[nibbles] * scales).to(dtype).view(weight.shape)


def with_plain_scales(weight: Weight4bit) -> Weight4bit:
    """The same weight with ``absmax`` itself not quantized."""
    if not weight.nested:
        return weight
    code, scale, offset = weight.nested
    scales = scale.repeat_interleave(weight.blocksize2)[: weight.absmax.numel()]
    return weight._replace(absmax=code[weight.absmax.int()] * scales + offset, nested=[])


@ops.dequantize_rotate_4bit.default
def _dequantize_rotate(delta: Tensor, *arguments: Any) -> Tensor:
    *weight, dtype = arguments
    return ops.rotate(dequantize_4bit(Weight4bit(*weight), dtype), delta.mT)


@ops.weight_form_4bit.default
def _weight_form(x: Tensor, delta: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    check_rotation(x, delta)
    return torch.nn.functional.linear(x, ops.dequantize_rotate_4bit(delta, *weight, x.dtype), bias)


@ops.weight_form_4bit_backward.default
def _weight_form_backward(grad: Tensor, x: Tensor, delta: Tensor, *weight: Any) -> tuple[Tensor, Tensor]:
    grad_x = grad @ ops.dequantize_rotate_4bit(delta, *weight, x.dtype)
    return grad_x, ops.weight_form_delta_grad(grad_x, x, delta)


@ops.rotate_matmul_4bit.default
def _rotate_matmul(x: Tensor, delta: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return torch.nn.functional.linear(ops.rotate(x, delta), dequantize_4bit(Weight4bit(*weight), x.dtype), bias)


def _fake_output(x: Tensor, delta: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    check_rotation(x, delta)
    return x.new_empty(*x.shape[:-1], Weight4bit(*weight).shape[0])


ops.dequantize_rotate_4bit.fake(lambda delta, *arguments: delta.new_empty(arguments[4], dtype=arguments[-1]))
ops.weight_form_4bit.fake(_fake_output)
ops.rotate_matmul_4bit.fake(_fake_output)
ops.weight_form_4bit_backward.fake(lambda grad, x, delta, *weight: (x.new_empty(x.shape), delta.new_empty(delta.shape)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, delta, _, packed, absmax, code, nested, *ctx.rest = inputs
    ctx.save_for_backward(x, delta, packed, absmax, code, *nested)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, delta, packed, absmax, code, *nested = ctx.saved_tensors
    grads = ops.weight_form_4bit_backward(grad, x, delta, packed, absmax, code, nested, *ctx.rest)
    return *grads, None, None, None, None, [None] * len(nested), None, None, None


ops.weight_form_4bit.differentiable(_save, _gradients)


# ---------------------------------------------------------------------------------------------- from the generators


@ops.neumann_weight_form_4bit.default
def _neumann_weight_form(x: Tensor, generators: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    *weight, block_size, terms = arguments
    delta = ops.cayley_neumann(generators, block_size, terms)
    return ops.weight_form_4bit(x, delta, bias, *weight)


def _fake_neumann_weight_form(x: Tensor, generators: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    *weight, block_size, _ = arguments
    check_features(x, generators.shape[0], block_size)
    return x.new_empty(*x.shape[:-1], Weight4bit(*weight).shape[0])


ops.neumann_weight_form_4bit.fake(_fake_neumann_weight_form)


def _neumann_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, generators, packed, absmax, code, *nested = ctx.saved_tensors
    *rest, block_size, terms = ctx.rest
    delta = ops.cayley_neumann(generators, block_size, terms)
    weight = (packed, absmax, code, nested, *rest)
    grad_x, grad_delta = ops.weight_form_4bit_backward(grad, x, delta, *weight)
    grad_generators = ops.cayley_neumann_backward(grad_delta, generators, block_size, terms)
    return grad_x, grad_generators, None, None, None, None, [None] * len(nested), None, None, None, None, None


ops.neumann_weight_form_4bit.differentiable(_save, _neumann_gradients)
