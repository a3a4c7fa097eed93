"""Generators stay in float32 where a trainer casts whatever trains.

TRL casts every trainable parameter of a 4- or 8-bit model to bf16 through ``.data``. Late in training most of an
adapter's updates are too small for bf16 and would be lost. Nothing has been computed by then: the tensors from before
are put back into the same Parameter objects, which is what optimizers hold.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .state import oft_layers

ATTRIBUTE = "_oftv2_float32"


@torch.no_grad()
def restore_float32(model: nn.Module, *, warn: bool = True) -> None:
    """Puts generators that were cast to 16 bit since the last call back into float32, unrounded where possible."""
    kept: dict[int, tuple[nn.Parameter, Tensor]] = model.__dict__.get(ATTRIBUTE, {})
    parameters = [parameter for _, layer in oft_layers(model) for parameter in layer.generators.values()]
    restored = 0
    for parameter in parameters:
        # Only what is known to be a Parameter's own: engines that shard put others, in 16 bit on purpose, in its place.
        _, wide = kept.get(id(parameter), (None, parameter))
        if parameter.element_size() >= min(wide.element_size(), 4) or parameter.shape != wide.shape:
            continue
        unrounded = wide.to(parameter).equal(parameter)  # else it was written to after the cast, or elsewhere
        parameter.data = wide.to(parameter.device) if unrounded else parameter.data.to(wide.dtype)
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to(wide.dtype)
        restored += 1
    model.__dict__[ATTRIBUTE] = {id(parameter): (parameter, parameter.data) for parameter in parameters}
    if restored and warn:
        warnings.warn(
            f"the generators of {restored} adapted layers had been cast to 16 bit, as TRL does with all that trains in "
            "a quantized model; they are back in float32, for small updates would be lost in 16 bit",
            stacklevel=3,
        )


def forget_float32(model: nn.Module) -> None:
    """Lets go of the tensors."""
    model.__dict__.pop(ATTRIBUTE, None)
