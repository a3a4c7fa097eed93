"""Refusing base layers that let no gradient through, before training starts: nothing in front of them would train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .backends import find_backend
from .errors import AdapterError


def check_gradients(layers: Mapping[str, nn.Module]) -> None:
    """Raises one AdapterError that names every layer which lets no gradient through: nothing before it would train.

    Args:
        layers (Mapping[str, nn.Module]): base layers by their path.
    """
    blocked = {name: reason for name, module in layers.items() if (reason := blocks_gradient(module))}
    if not blocked:
        return
    name, reason = next(iter(blocked.items()))
    others = f" (and {len(blocked) - 1} other layers)" if len(blocked) > 1 else ""
    raise AdapterError(
        f"{name}{others}: this {type(layers[name]).__name__} lets no gradient through, so nothing in front of it "
        f"would train: {reason}. Choose a quantization that can be trained through, such as bitsandbytes NF4 or a "
        "weight-only one, or leave the layer out with exclude_modules"
    )


def blocks_gradient(module: nn.Module) -> str | None:
    """Why a layer lets no gradient through to its input, or None where it does, or cannot be tried out here.

    What its class does not tell is tried out on one row, in training mode: rounding without a straight-through
    gradient leaves none, or only one for the few inputs that set a scale.
    """
    backend = find_backend(module)
    if backend is not None and (reason := backend.blocks_gradient(module)):
        return reason
    if not hasattr(module, "in_features") or (type(module) is nn.Linear if backend is None else not backend.probed):
        return None
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return None
    features: Any = module.in_features
    rows = torch.zeros(1, 2, features)
    rows[0, 0].normal_(generator=torch.Generator().manual_seed(0))
    training = module.training
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()] if backend is None else []  # spectral_norm's, say
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = rows.to(tensors[0].device, _activation_dtype(module)).requires_grad_()
            y = module.train()(x)
    except Exception:  # a layer that does not run here says so itself in the first forward pass, in its own words
        return None
    finally:
        module.train(training)
        for buffer, value in kept:
            buffer.data.copy_(value)
    if not isinstance(y, torch.Tensor):
        return f"what it returns is a {type(y).__name__} and no linear layer's output"
    if torch.equal(y[0, 0], y[0, 1]):  # a weight of zeros: there is nothing to tell
        return None
    try:
        gradient = torch.autograd.grad(y[0, 0].sum(), x, allow_unused=True)[0] if y.requires_grad else None
    except Exception as error:
        return f"its backward pass fails ({error})"
    if gradient is None or 2 * int(gradient[0, 0].count_nonzero()) < features:
        return "its output carries no gradient to its input, as where activations are rounded"
    return None


def _activation_dtype(module: nn.Module) -> torch.dtype:
    """A dtype of activations that a layer takes."""
    named = [getattr(module, "compute_dtype", None), getattr(getattr(module, "weight", None), "dtype", None)]
    held = [tensor.dtype for tensor in (*module.parameters(), *module.buffers())]
    wide = [t for t in (*named, *held) if isinstance(t, torch.dtype) and t.is_floating_point and t.itemsize > 1]
    return wide[0] if wide else torch.float32
