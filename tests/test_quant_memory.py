"""What a 4-bit model keeps between its forward and its backward pass, counted storage by storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conftest import randomize
from memory_trace import Storages
from oftv2 import wrap_model
from other_backends import MAKERS, adapted, each_maker, parts, quantized
from quantized import quantize, relative

T, D, N, B = 256, 128, 256, 16


def kept(model: nn.Module, x: torch.Tensor) -> list[tuple[torch.dtype, int]]:
    states = [layer.weight.quant_state.absmax for layer in model.modules() if type(layer).__name__ == "Linear4bit"]
    tensors = [part for t in (*model.parameters(), *model.buffers(), x, *states) for _, part in parts(t)]
    known = {tensor.untyped_storage()._cdata for tensor in tensors}
    with Storages() as storages:
        y = model(x)
    besides = known | {y.untyped_storage()._cdata}
    found = storages.alive(besides)
    y.sum().backward()
    return found


def make(kind: str, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    dense = [nn.Linear(*size).to(dtype) for size in [(D, N), (N, D)]]
    quantized = [MAKERS[kind](layer) if kind in MAKERS else quantize(layer, kind, dtype) for layer in dense]
    return nn.Sequential(*quantized).train()


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", *MAKERS])
def test_two_layers_in_16_bit_keep_one_input_each(kind: str) -> None:
    """The first layer's input is there anyway; between the layers lies one tensor of T × N, in bfloat16.

    Nothing of that size is kept in float32, no rotated input, and no dequantized weight.
    """
    model = wrap_model(make(kind, torch.bfloat16), block_size=B)
    randomize(model)
    found = kept(model, torch.randn(T, D).bfloat16().requires_grad_())
    blocks = (D + N) * B * 4  # the rotations of both layers, in float32
    large = [entry for entry in found if entry[1] >= min(T * D, N * D)]
    assert large == [(torch.bfloat16, T * N * 2)]
    assert sum(size for _, size in found) <= T * N * 2 + 6 * blocks
    assert model[0].generators["default"].grad.any()


def test_the_counter_sees_what_is_kept() -> None:
    """A layer that keeps a dequantized weight and a float32 copy of its input is caught, by both."""

    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, D).bfloat16(), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = self.weight.float()
            return (x.float() ** 2 @ self.cache.T).bfloat16()

    found = kept(Wasteful(), torch.randn(T, D).bfloat16().requires_grad_())
    assert (torch.float32, N * D * 4) in found
    assert (torch.float32, T * D * 4) in found


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_evaluation_keeps_no_weight(cast: bool) -> None:
    model = wrap_model(make("nf4", torch.float32), block_size=B).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast), Storages() as storages:
        y = model(torch.randn(T, D))
    large = [size for dtype, size in storages.alive({y.untyped_storage()._cdata}) if size >= N * D]
    assert not large


@each_maker
class TestRecomputedProducts:
    """Libraries whose products would keep the dequantized weight: their layers dequantize once more in the backward."""

    @pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
    @pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
    def test_gradients_are_the_librarys(self, kind: str, cast: bool, checkpointed: bool) -> None:
        x, g, results = torch.randn(2, 7, 128), torch.randn(2, 7, 96), []
        for recompute in (True, False):
            layer = adapted(quantized(kind))
            assert layer._recompute
            layer._recompute = recompute
            mine = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                y = checkpoint(layer, mine, use_reentrant=False) if checkpointed else layer(mine)
            (y * g.to(y.dtype)).sum().backward()
            assert mine.grad.dtype == layer.generators["default"].grad.dtype == torch.float32
            results.append((y.detach(), mine.grad, layer.generators["default"].grad))
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            assert relative(ours, theirs) < (4 * 2**-9 if cast else 1e-6)

    def test_the_library_computes_where_more_than_the_product_is_asked_for(self, kind: str) -> None:
        """A hook, or a bias that trains."""
        layer, x = adapted(quantized(kind)), torch.randn(7, 128)
        calls: list[int] = []
        handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
        layer(x).sum().backward()
        assert calls
        handle.remove()
        layer.bias.requires_grad_()
        layer(x).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((96,), 7.0))
