"""Saving, reloading and merging adapters on quantized layers."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapted import trained
from torch import nn

import oftv2
from conftest import randomize
from oftv2 import (
    AdapterError,
    QuantOFTLinear,
    RequantizationWarning,
    load_adapter,
    merge,
    reference,
    save_adapter,
    unmerge,
    unwrap_model,
    wrap_model,
)
from quantized import (
    FOUR_BIT,
    LOSS,
    B,
    Block,
    adapted,
    assert_same_bits,
    dequantized,
    each_kind,
    expected,
    packed_weight,
    quantized,
    relative,
    wrapped,
)


class TestSaveAndLoad:
    @each_kind
    def test_into_a_freshly_quantized_base(self, kind: str, tmp_path: Path) -> None:
        model, x = wrapped(kind), torch.randn(4, 24)
        save_adapter(model, tmp_path)
        again = load_adapter(Block(kind), tmp_path)
        assert torch.equal(again.train()(x), model.train()(x))
        assert not trained(again)
        assert type(again.up) is QuantOFTLinear
        resumed = load_adapter(Block(kind), tmp_path, trainable=True)
        assert len(trained(resumed)) == 2

    @pytest.mark.parametrize("saved", ["nf4", "int8", "dense"])
    @pytest.mark.parametrize("loaded", ["fp4-double", "int8", "dense"])
    def test_across_quantizations_of_one_base(self, saved: str, loaded: str, tmp_path: Path) -> None:
        def make(kind: str) -> nn.Module:
            model = Block("nf4" if kind == "dense" else kind)
            if kind == "dense":  # the weights that the quantized layers were made from
                torch.manual_seed(0)
                _, model.up, model.down = nn.Linear(24, 128), nn.Linear(128, 192), nn.Linear(192, 128)
            return model

        model = wrap_model(make(saved), block_size=B, target_modules=["up", "down"])
        randomize(model)
        again = load_adapter(make(loaded), save_adapter(model, tmp_path))
        for name in ("up", "down"):
            mine, other = (getattr(m, name).generators["default"] for m in (model, again))
            assert torch.equal(mine, other)

    @each_kind
    def test_into_another_base_is_refused(self, kind: str, tmp_path: Path) -> None:
        save_adapter(wrapped(kind), tmp_path)
        other = Block(kind, seed=7)
        with pytest.raises(AdapterError, match=r"up: the base weights differ by \d+%"):
            load_adapter(other, tmp_path)
        assert type(other.up) is not QuantOFTLinear
        load_adapter(other, tmp_path, check_base=False)

    @each_kind
    def test_of_a_merged_adapter_is_refused_until_it_is_unmerged(self, kind: str, tmp_path: Path) -> None:
        model = merge(wrapped(kind), unload=False)
        with pytest.raises(AdapterError, match="merged"):
            save_adapter(model, tmp_path)
        save_adapter(unmerge(model), tmp_path)
        load_adapter(Block(kind), tmp_path)


class TestMerge:
    @each_kind
    def test_to_a_dequantized_layer(self, kind: str) -> None:
        model, x = wrapped(kind), torch.randn(16, 24)
        before = model.train()(x).detach()
        wanted = {name: dequantized(getattr(model, name).base_layer) for name in ("up", "down")}
        rotations = {
            name: reference.cayley_neumann(reference.skew(getattr(model, name).generators["default"].double(), B), 4)
            for name in wanted
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert merge(model) is model
        for name, weight in wanted.items():
            layer = getattr(model, name)
            assert type(layer) is nn.Linear
            assert layer.weight.dtype == layer.bias.dtype == torch.float32
            assert relative(layer.weight, reference.merge_weight(weight, rotations[name])) < 1e-6
            assert (layer.in_features, layer.out_features) == tuple(reversed(layer.weight.shape))
        assert relative(model(x).detach(), before) < 2e-6
        assert relative(model.eval()(x).detach(), before) < 2e-6

    @each_kind
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtype_is_the_callers_choice(self, kind: str, dtype: torch.dtype) -> None:
        layer = adapted(kind)
        exact = expected(layer, torch.eye(128)) - layer.base_layer.bias.double()
        merge(layer, unload=False, dtype=dtype)
        assert layer.base_layer.weight.dtype == layer.base_layer.bias.dtype == dtype
        # one rounding of each entry to 8 or 11 bits, in the root mean square, after a float32 product
        rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 0}[dtype]
        assert relative(layer.base_layer.weight.T, exact) < rounding + 1e-6
        unmerge(layer)

    @pytest.mark.parametrize("kind", FOUR_BIT)
    def test_default_dtype_is_that_of_the_other_weights(self, kind: str) -> None:
        model = wrapped(kind, dtype=torch.bfloat16)
        merge(model)
        assert model.up.weight.dtype == model.down.bias.dtype == torch.bfloat16
        assert model(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16

    def test_dtype_must_be_floating_point(self) -> None:
        model = wrapped("nf4")
        for dtype in (torch.int8, "bfloat16"):
            with pytest.raises(AdapterError, match=rf"dtype={dtype!r} is not allowed: .*torch\.bfloat16"):
                merge(model, dtype=dtype)
        assert not model.up.merged

    @each_kind
    def test_requantized(self, kind: str) -> None:
        model, x = wrapped(kind), torch.randn(16, 24)
        before = model.train()(x).detach()
        exact = {
            name: (expected(getattr(model, name), torch.eye(d)) - getattr(model, name).base_layer.bias.double()).T
            for name, d in {"up": 128, "down": 192}.items()
        }
        layers, low, high = {name: getattr(model, name) for name in exact}, *LOSS[kind.partition("-")[0]]
        figures = (
            r"requantizing changed the merged weights by (\d+\.\d+)% on average, (\d+\.\d+)% at most \((up|down)\)"
        )
        with pytest.warns(RequantizationWarning, match=figures) as caught:
            merge(model, unload=False, requantize=True)
        assert len(caught) == 1
        for name, layer in layers.items():
            error = relative(dequantized(layer.base_layer), exact[name])
            assert low < error < high
            assert layer.requantization_error == pytest.approx(error, rel=1e-3)
            assert type(layer.base_layer) is type(quantized(kind))
        if kind != "int8":
            assert model.up.base_layer.weight.quant_state.nested == ("double" in kind)
            assert model.up.base_layer.weight.quant_state.quant_type == kind.partition("-")[0]
        shown = max(layer.requantization_error for layer in layers.values())
        assert f"{shown:.2%} at most" in str(caught[0].message)
        after = model(x).detach()
        assert 0 < relative(after, before) < 5 * high  # two layers and a relu in a row
        for _ in range(2):
            model.eval()
            with torch.no_grad():
                model(x)
        assert torch.equal(model.train()(x).detach(), after)
        unmerge(model)
        assert all(layer.requantization_error is None for layer in layers.values())
        assert torch.equal(model.train()(x), before)

    @each_kind
    def test_requantized_and_unloaded(self, kind: str) -> None:
        model = wrapped(kind)
        with pytest.warns(RequantizationWarning):
            merge(model, requantize=True)
        assert type(model.up) is type(model.down) is type(quantized(kind))
        assert not any(isinstance(module, oftv2.OFTLayer) for module in model.modules())
        twice = wrap_model(model, block_size=B, target_modules=["up", "down"])
        y = twice.train()(torch.randn(3, 24))
        y.sum().backward()
        assert twice.up.generators["default"].grad.any()

    @each_kind
    @pytest.mark.filterwarnings("ignore::oftv2.RequantizationWarning")
    def test_requantized_where_accelerate_dispatched(self, kind: str) -> None:
        """The forward of each layer is replaced on the object, by one that calls that of the quantized original."""
        x = torch.randn(3, 24)
        plain, hooked = Block(kind), Block(kind)
        for name in ("up", "down"):
            add_hook_to_module(getattr(hooked, name), AlignDevicesHook(execution_device="cpu"))
        answers = []
        for model in (plain, hooked):
            wrap_model(model, block_size=B, target_modules=["up", "down"])
            randomize(model)
            answers.append(merge(model, requantize=True)(x))
        assert torch.equal(*answers)

    def test_requantizing_a_replaced_forward_is_refused(self) -> None:
        model = wrapped("nf4")
        forward = model.up.base_layer.forward
        model.up.base_layer.forward = lambda x: forward(x)
        with pytest.raises(AdapterError, match=r"^up: the forward of its Linear4bit was replaced"):
            merge(model, requantize=True)
        assert not model.up.merged

    def test_requantizing_nothing_is_refused(self) -> None:
        model = wrap_model(nn.Sequential(nn.Linear(64, 64)), target_modules=["0"])
        with pytest.raises(AdapterError, match="no adapted layer of this model is quantized"):
            merge(model, requantize=True)
        assert not model[0].merged

    @each_kind
    @pytest.mark.parametrize("requantize", [False, True], ids=["dequantized", "requantized"])
    @pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
    @pytest.mark.filterwarnings("ignore::oftv2.RequantizationWarning")
    def test_unmerging_restores_every_bit(self, kind: str, requantize: bool, used: bool) -> None:
        """Also of an int8 layer that moved its scales from the weight to its state in a first forward pass, or not."""
        layer, x = adapted(kind), torch.randn(7, 128)
        if used:
            layer(x)
        before, base = packed_weight(layer.base_layer), layer.base_layer
        for _ in range(3):
            merge(layer, unload=False, requantize=requantize)
            assert layer.base_layer is not base
            layer(x)
            assert_same_bits(base, before)
            unmerge(layer)
            assert layer.base_layer is base
        assert_same_bits(layer.base_layer, before)
        assert relative(layer(x).detach(), expected(layer, x)) < 1e-6
        layer(x).sum().backward()
        assert layer.generators["default"].grad.any()

    @each_kind
    def test_a_quantized_original_cannot_be_given_up(self, kind: str) -> None:
        layer = adapted(kind)
        with pytest.raises(AdapterError, match="keep_original=True"):
            layer.merge(keep_original=False)
        assert not layer.merged

    @each_kind
    def test_nan_is_not_merged(self, kind: str) -> None:
        model = wrapped(kind)
        before = packed_weight(model.up.base_layer)
        model.down.generators["default"].data[0, 0] = float("nan")
        with pytest.raises(AdapterError, match=r"^down: .*NaN"):
            merge(model)
        assert not model.up.merged
        assert_same_bits(model.up.base_layer, before)

    @each_kind
    def test_unwrapping_a_merged_model_gives_the_quantized_one_back(self, kind: str) -> None:
        model, plain, x = wrapped(kind), Block(kind), torch.randn(4, 24)
        merge(model, unload=False)
        unwrap_model(model)
        assert torch.equal(model.train()(x), plain.train()(x))

    @each_kind
    def test_disabled_it_is_the_base_model(self, kind: str) -> None:
        model, plain, x = wrapped(kind), Block(kind), torch.randn(4, 24)
        with oftv2.disable_adapter(model):
            assert torch.equal(model.train()(x), plain.train()(x))
        assert not torch.equal(model(x), plain(x))


# ------------------------------------------------------------------------------------------------- a language model


class FrozenDict(OrderedDict):
    """As diffusers': entries that are attributes too, and that stay."""

    def __init__(self, entries) -> None:
        super().__init__(entries)
        vars(self).update(entries)

    def pop(self, *_: Any) -> None:
        raise AttributeError("a FrozenDict")


def test_a_model_of_diffusers_forgets_that_it_was_quantized() -> None:
    class Denoiser(Block):
        is_quantized = True
        config = property(lambda self: self._internal_dict)

    model = Denoiser("nf4")
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    model._internal_dict = FrozenDict({"width": 24, "quantization_config": {"load_in_4bit": True}})
    merge(wrap_model(model, block_size=B, target_modules=["up", "down"]))
    assert not model.is_quantized
    assert dict(model.config) == {"width": 24}
    assert vars(model.config).keys() & {"width", "quantization_config"} == {"width"}
