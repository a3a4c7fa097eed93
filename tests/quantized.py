"""Quantized layers for the tests, and what they should compute.

The oracle is a float64 computation with the dequantized weight, read by bitsandbytes' own means and not by this
library's. On a CPU bitsandbytes computes 4-bit layers, and int8 ones in training, as a float32 product with the
dequantized weight: sums of at most 192 products, rounded to 2⁻²⁴ each, stay within 1e-6 of float64 relative to their
norm. An int8 layer in evaluation quantizes its input too: see ``int8_bound``.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from conftest import randomize
from oftv2 import (
    OFTConfig,
    QuantOFTLinear,
    functional,
    reference,
    wrap_model,
)

FOUR_BIT = ["nf4", "nf4-double", "fp4", "fp4-double"]
KINDS = [*FOUR_BIT, "int8"]
# How much of a Gaussian weight's norm each format loses, measured on this file's layers: 9.2 %, 11.2 % and 0.4 %.
LOSS = {"nf4": (0.08, 0.11), "fp4": (0.09, 0.13), "int8": (0.002, 0.008)}
B = 16

each_kind = pytest.mark.parametrize("kind", KINDS)


def quantized(kind: str, d: int = 128, n: int = 96, *, bias: bool = True, seed: int = 0) -> nn.Module:
    """A quantized linear layer in training mode, made from the same weight for the same seed and sizes."""
    torch.manual_seed(seed)
    return quantize(nn.Linear(d, n, bias=bias), kind)


def quantize(plain: nn.Linear, kind: str, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    d, n, bias = plain.in_features, plain.out_features, plain.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(d, n, bias, has_fp16_weights=False)
    else:
        name, _, double = kind.partition("-")
        layer = bnb.nn.Linear4bit(
            d, n, bias, quant_type=name, compress_statistics=bool(double), compute_dtype=compute_dtype
        )
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(plain.weight.dtype).to("cpu") if kind != "int8" else layer.to("cpu")
    if kind != "int8":
        layer.support_avx512bf16_for_cpu = True  # as on a CPU with bf16 instructions, whatever this one has
    return layer.train(plain.training)


def dequantized(layer: nn.Module) -> Tensor:
    """The weight as bitsandbytes reads it, ``(n, d)``, in float64."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.double() * scales.double()[:, None] / 127
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def adapted(kind: str, *, std: float = 0.05, block_size: int = B, **fields: Any) -> QuantOFTLinear:
    """An adapter with random generators on a quantized layer, in training mode."""
    layer = QuantOFTLinear(quantized(kind, **fields), OFTConfig(block_size=block_size), name="proj")
    randomize(layer, std=std)
    return layer


def packed_weight(layer: nn.Module) -> dict[str, Tensor]:
    """Every tensor that makes up a quantized weight and its bias, copied."""
    tensors = {"data": layer.weight.data}
    if layer.bias is not None:
        tensors["bias"] = layer.bias.data
    if isinstance(layer, bnb.nn.Linear8bitLt):
        tensors["scales"] = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    else:
        state = layer.weight.quant_state
        tensors["absmax"] = state.absmax
        if state.nested:
            tensors |= {"absmax of absmax": state.state2.absmax, "offset": state.offset}
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_same_bits(layer: nn.Module, before: dict[str, Tensor]) -> None:
    after = packed_weight(layer)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name


def expected(layer: QuantOFTLinear, x: Tensor, packed: Tensor | None = None) -> Tensor:
    """The layer's function in float64."""
    packed = layer.generators["default"].detach().double() if packed is None else packed
    R = reference.cayley_neumann(reference.skew(packed, layer.rotation.block_size), layer.rotation.terms)
    bias = None if layer.base_layer.bias is None else layer.base_layer.bias.detach().double()
    return reference.oft_linear(x.double(), R, dequantized(layer.base_layer), bias)


def int8_bound(layer: QuantOFTLinear, x: Tensor) -> Tensor:
    """How far an output of LLM.int8 in evaluation may be off, element by element.

    Each row of the rotated input is rounded to float16 (2⁻¹¹ relative) and then to multiples of its largest entry
    divided by 127, by half a step at most; the output adds these up with the weights' magnitudes. Half a step more
    covers the float16 rounding of what is multiplied, and 1e-6 that of the sum.
    """
    rotated = functional.rotate(x, layer.delta()).detach().double()
    step = rotated.abs().amax(-1, keepdim=True) / 127
    return step * dequantized(layer.base_layer).abs().sum(1) + 1e-6


def relative(actual: Tensor, wanted: Tensor) -> float:
    return (torch.linalg.norm((actual - wanted).double()) / torch.linalg.norm(wanted.double())).item()


class Block(nn.Module):
    """A small model: a dense layer, two quantized ones, a dense head."""

    def __init__(self, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        dense = [nn.Linear(24, 128), nn.Linear(128, 192), nn.Linear(192, 128), nn.Linear(128, 5)]
        self.stem, up, down, self.head = (layer.to(dtype) for layer in dense)
        self.up, self.down = quantize(up, kind, dtype), quantize(down, kind, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.stem(x)))))


def wrapped(kind: str, *, std: float = 0.05, **fields: Any) -> Block:
    model = wrap_model(Block(kind, **fields), block_size=B, target_modules=["up", "down"])
    randomize(model, std=std)
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    model.train()
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
