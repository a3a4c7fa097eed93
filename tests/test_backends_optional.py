"""Adapters on layers of libraries that are too large, or want too new a torch, to be installed for every run.

    pip install --no-deps hqq termcolor einops
    pip install --no-deps compressed-tensors loguru
    pip install --no-deps gptqmodel logbar device-smi tokenicer defuser threadpoolctl pypcre protobuf

``--no-deps`` keeps the torch that is there; GPTQModel 7.7 asks for a newer one and runs with 2.13 all the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import trained
from torch import nn

from oftv2 import AdapterError, QuantOFTLinear, RequantizationWarning, merge, reference, wrap_model
from oftv2.backends import find_backend
from other_backends import B, adapted, assert_same_bits, dense, rotation_of, stored, weight_of
from quantized import relative


def library(name: str) -> Any:
    """The library, or a skip that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is optional: install it as the first lines of this file say ({error})")


def hqq(plain: nn.Linear) -> nn.Module:
    quantize = library("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return quantize.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")


def groups_of_32(plain: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points ``(n, groups)`` for 4 bit."""
    weight = plain.weight.detach().unflatten(1, (-1, 32))
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    scale = (high - low) / 15
    return scale, torch.round(-low / scale)


def gptq(plain: nn.Linear) -> nn.Module:
    module = library("gptqmodel.nn_modules.qlinear.torch")
    layer = module.TorchLinear(4, 32, False, False, plain.in_features, plain.out_features, bias=True)
    layer.pack(plain.requires_grad_(False), *groups_of_32(plain), torch.arange(plain.in_features).int() // 32)
    layer.optimized = True  # post_init would compile the dequantization
    layer.post_init()
    return layer


def awq(plain: nn.Linear) -> nn.Module:
    module = library("gptqmodel.nn_modules.qlinear.torch_awq")
    layer = module.AwqTorchLinear(4, 32, False, False, plain.in_features, plain.out_features, bias=True)
    layer.pack(plain.requires_grad_(False), *groups_of_32(plain))
    layer.post_init()
    return layer


def compressed(preset: str, *, decompressed: bool = False) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        library("compressed_tensors")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams

        scheme = preset_name_to_scheme(preset, ["Linear"])
        config = QuantizationConfig(config_groups={"all": scheme})
        model = nn.Sequential(plain)
        apply_quantization_config(model, config)
        grouped = plain.weight.detach().unflatten(1, (plain.weight_scale.shape[1], -1))
        plain.weight_scale.data.copy_(calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)[0])
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(model)
        if decompressed:  # as after a model's first forward pass
            compressor.decompress_model(model)
        return plain

    return make


# What each computes in, as a relative error.
MAKERS = {
    "hqq": (hqq, 1e-6),
    "gptq": (gptq, 1e-4),
    "awq": (awq, 2e-3),  # rounds its input and output to float16
    "compressed-w4a16": (compressed("W4A16", decompressed=True), 1e-6),
    "compressed-w8a16": (compressed("W8A16", decompressed=True), 1e-6),
}


@pytest.mark.parametrize("kind", MAKERS)
class TestLayers:
    def test_trains_merges_and_comes_back(self, kind: str) -> None:
        make, rounding = MAKERS[kind]
        base = make(dense())
        wrapped = wrap_model(nn.Sequential(nn.Linear(32, 128), base), block_size=B)
        assert type(wrapped[1]) is QuantOFTLinear
        wrapped(torch.randn(2, 5, 32)).sum().backward()
        assert all(parameter.grad is not None for parameter in trained(wrapped))
        layer, bits = adapted(base), stored(base)
        x, g = torch.randn(2, 7, 128), torch.randn(2, 7, 96)
        weight, bias = weight_of(base), layer.bias.detach().double()
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        packed = layer.generators["default"].detach().double().requires_grad_()
        y, wanted = layer(mine), reference.oft_linear(exact, rotation_of(layer, packed), weight, bias)
        (y * g).sum().backward()
        (wanted * g).sum().backward()
        assert relative(y.detach(), wanted.detach()) < 2 * rounding
        assert relative(mine.grad, exact.grad) < 2 * rounding
        assert relative(layer.generators["default"].grad, packed.grad) < 3 * rounding
        layer.merge()
        assert type(layer.base_layer) is nn.Linear
        assert relative(layer.base_layer.weight, reference.merge_weight(weight, rotation_of(layer))) < rounding
        layer.unmerge()
        assert layer.base_layer is base
        assert_same_bits(base, bits)

    def test_quantized_again_or_refused(self, kind: str) -> None:
        make, _ = MAKERS[kind]
        model = wrap_model(nn.Sequential(nn.Linear(32, 128), make(dense())), block_size=B)
        adapter = model[1]
        with torch.no_grad():
            adapter.generators["default"].normal_(std=0.05)
        if kind != "hqq":
            with pytest.raises(AdapterError, match=r"^1: .* cannot quantize a merged weight again without calibration"):
                merge(model, requantize=True)
            assert not model[0].merged
            return
        wanted = reference.merge_weight(weight_of(adapter.base_layer), rotation_of(adapter))
        with pytest.warns(RequantizationWarning):
            merge(model, requantize=True)
        assert type(model[1]).__name__ == "HQQLinear"
        error = relative(weight_of(model[1]), wanted)
        assert 0.05 < error < 0.12
        assert adapter.requantization_error == pytest.approx(error, rel=1e-3)


class TestCompressedTensors:
    @pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "W8A8"])
    @pytest.mark.parametrize("decompressed", [False, True])
    def test_rounded_activations_are_refused(self, preset: str, decompressed: bool) -> None:
        model = nn.Sequential(nn.Linear(32, 128), compressed(preset, decompressed=decompressed)(dense()))
        with pytest.raises(AdapterError, match=r"^1: this Linear lets no gradient.*compressed-tensors rounds its"):
            wrap_model(model, block_size=B)
        assert type(model[0]) is nn.Linear

    @pytest.mark.parametrize("preset", ["W4A16", "W8A16", "FP8_DYNAMIC", "W8A8"])
    def test_reads_a_weight_that_is_still_compressed(self, preset: str) -> None:
        layers = [compressed(preset, decompressed=decompressed)(dense()) for decompressed in (False, True)]
        before = stored(layers[0])
        packed, dense_ = (find_backend(layer).dequantize(layer) for layer in layers)
        assert torch.equal(packed, dense_)
        assert_same_bits(layers[0], before)
        assert 0.001 < relative(dense_, dense().weight.detach()) < 0.1

    def test_a_wrapped_model_is_decompressed_by_its_own_hook(self) -> None:
        library("compressed_tensors")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

        model = nn.Sequential(dense(128, 128), dense())
        config = QuantizationConfig(config_groups={"all": preset_name_to_scheme("W8A16", ["Linear"])})
        apply_quantization_config(model, config)
        for layer in model:
            layer.weight_scale.data.copy_(layer.weight.detach().abs().amax(1, keepdim=True) / 127)
        ModelCompressor(quantization_config=config).compress_model(model)
        wrap_model(model, block_size=B)
        x = torch.randn(5, 128)
        model(x).sum().backward()
        assert sorted(name for name, p in model.named_parameters() if p.grad is not None) == [
            "0.generators.default",
            "1.generators.default",
        ]
        y = model(x).detach()
        assert relative(merge(model)(x).detach(), y) < 1e-6
