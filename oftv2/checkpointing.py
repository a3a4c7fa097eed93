"""Gradient checkpointing over a frozen beginning of the model.

A reentrant checkpoint yields no gradients at all when none of its inputs requires one, and with a frozen embedding in
front none does. Hooks on the embeddings and on the convolutions that vision towers begin with (or, of a model that is
none of transformers', on its inputs) see to it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ._operator import in_torch_func


def in_checkpoint() -> bool:
    """Whether this is called within ``torch.utils.checkpoint``, in the forward pass or in its recomputation."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Start(torch.autograd.Function):
    """A tensor that requires a gradient, over the memory of one that does not. Unlike a leaf it may be written to."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, leaf: Tensor) -> Tensor:
        return value.data  # what is detached instead would count as a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class InputGradients:
    """A hook that makes the model's first floating-point tensors require a gradient.

    A transformers model says when it checkpoints: the hook does nothing otherwise. Of any other model that is not
    known, so there it is always on while training; the price is one input gradient of the first adapted layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switches = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def _wanted(self, module: nn.Module) -> bool:
        if torch.compiler.is_compiling() or in_torch_func():
            return False
        if not (module.training and torch.is_grad_enabled()):
            return False
        return not self.switches or any(switch.gradient_checkpointing for switch in self.switches)


class OutputHook(InputGradients):
    """As a forward hook of an embedding or a convolution: its output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _with_grad(output) if self._wanted(module) else output


class InputHook(InputGradients):
    """As a forward pre-hook of the model: its floating-point inputs, as tensors of their own."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not self._wanted(module):
            return None
        return tuple(map(_with_grad, args)), {key: _with_grad(value) for key, value in kwargs.items()}


def _with_grad(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return Start.apply(value, torch.empty(0, requires_grad=True))
    return value


def add_hooks(model: nn.Module) -> None:
    """Registers the hooks on ``model``."""
    hook = OutputHook(model)
    kinds = (nn.Embedding, nn.modules.conv._ConvNd) if hook.switches else nn.Embedding
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(hook)
    if not hook.switches:
        model.register_forward_pre_hook(InputHook(model), with_kwargs=True)


def remove_hooks(model: nn.Module) -> None:
    """Takes them off again."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, InputGradients)]:
                del hooks[key]
        for key in set(module._forward_pre_hooks_with_kwargs) - set(module._forward_pre_hooks):
            del module._forward_pre_hooks_with_kwargs[key]
