"""Is a layer right? Its output and gradients against float64; nothing wrong is to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import oftv1
import oftv2
from measure import relative_error
from methods import Sizes, linear, on_layer
from oftv2 import reference


class _Reference(nn.Module):
    """A rotated layer by the float64 reference."""

    def __init__(self, generators: Tensor, rotation: Callable[[Tensor], Tensor], weight: Tensor, bias: Any) -> None:
        super().__init__()
        self.generators = nn.Parameter(generators.detach().double())
        self.rotation, self.weight, self.bias = rotation, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return reference.oft_linear(x, self.rotation(self.generators), self.weight, self.bias)


def in_float64(name: str, layer: nn.Module, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> nn.Module:
    """What ``layer`` should compute, in float64: ours and ``oftv1`` by the reference, a peer by its own code."""
    weight, bias = weight.double(), None if bias is None else bias.double()
    if isinstance(layer, oftv2.OFTLinear):
        rotation = layer.rotation
        return _Reference(
            layer.generators["default"],
            lambda g: reference.cayley_neumann(reference.skew(g, rotation.block_size), rotation.terms),
            weight,
            bias,
        )
    if isinstance(layer, oftv1.OFTv1Linear):
        b = layer.block_size
        return _Reference(layer.generators, lambda g: reference.cayley(reference.skew(g, b)), weight, bias)
    exact = on_layer(name, linear(weight, bias), sizes).double()
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for path, parameter in exact.named_parameters():
            if parameter.requires_grad and name != "full":  # which has no adapter, and the weights that are given
                parameter.copy_(own[path])
    return exact


def check(
    name: str, layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor, upstream: Tensor, sizes: Sizes
) -> float:
    """Compares output and gradients with float64, for nothing wrong is to be timed.

    Args:
        weight, bias: what the base layer holds, dequantized, ``(n, d)`` and ``(n)``.
        x, upstream: input ``(T, d)`` and output gradient ``(T, n)``.

    Returns:
        float: the largest relative error among the output, the gradient of ``x`` and those of the adapter.

    Raises:
        SystemExit: it is larger than rounding explains.
    """
    exact = in_float64(name, layer, weight, bias, sizes)
    results = []
    for module, dtype in ((layer, x.dtype), (exact, torch.float64)):
        own = x.detach().to(dtype, copy=True).requires_grad_()
        y = module(own)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y, [own, *trained], upstream.to(dtype))])
    error = max(relative_error(a, e) for a, e in zip(*results, strict=True))
    limit = 1e-4 if x.dtype == torch.float32 else 5e-2
    if not error < limit:
        raise SystemExit(
            f"{name}: wrong result, relative error {error:.1e} where {limit:.0e} is allowed; nothing timed"
        )
    return error
