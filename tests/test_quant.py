"""Forward, backward and training of adapters on bitsandbytes NF4, FP4 and LLM.int8 layers."""

from __future__ import annotations

import copy
from itertools import pairwise

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from adapted import trained
from torch import nn

from conftest import randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    OFTLinear,
    QuantOFTLinear,
    functional,
    merge,
    unmerge,
    wrap_model,
)
from quantized import (
    FOUR_BIT,
    B,
    Block,
    adapted,
    assert_same_bits,
    dequantized,
    each_kind,
    expected,
    int8_bound,
    packed_weight,
    quantize,
    quantized,
    relative,
    train_step,
    wrapped,
)

repacks = pytest.mark.skipif(
    not hasattr(bnb_functional, "_convert_weight_packed_for_cpu"), reason="bitsandbytes repacks from 0.49 on"
)


class TestForwardAndBackward:
    @each_kind
    def test_is_the_base_layer_on_the_rotated_input(self, kind: str) -> None:
        layer, x = adapted(kind), torch.randn(7, 128)
        for mode in (True, False):
            layer.train(mode)
            assert torch.equal(layer(x), layer.base_layer(functional.rotate(x, layer.delta())))

    @each_kind
    def test_a_fresh_adapter_changes_nothing(self, kind: str) -> None:
        base, x = quantized(kind), torch.randn(7, 128)
        y = base(x)
        layer = QuantOFTLinear(base, OFTConfig(block_size=B))
        assert isinstance(layer, OFTLinear)
        assert torch.equal(layer(x), y)

    @each_kind
    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_against_float64(self, kind: str, mode: bool) -> None:
        """Gradients of an int8 layer are exact in evaluation too: bitsandbytes rounds the input of the product only."""
        layer, x, g = adapted(kind).train(mode), torch.randn(3, 7, 128), torch.randn(3, 7, 96)
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        packed = layer.generators["default"].detach().double().requires_grad_()
        y, wanted = layer(mine), expected(layer, exact, packed)
        (y * g).sum().backward()
        (wanted * g).sum().backward()
        if kind == "int8" and not mode:
            assert ((y - wanted).abs() <= int8_bound(layer, x)).all()
        else:
            assert relative(y.detach(), wanted.detach()) < 1e-6
        assert relative(mine.grad, exact.grad) < 1e-6
        assert relative(layer.generators["default"].grad, packed.grad) < 2e-6  # through Q², Q⁴: a few roundings more

    @pytest.mark.parametrize("kind", FOUR_BIT)
    def test_16_bit_activations(self, kind: str) -> None:
        """bfloat16 keeps 8 bits: rotated input, weight, output and both gradients are each rounded by a root mean
        square of 2⁻⁹."""
        torch.manual_seed(0)
        layer = QuantOFTLinear(quantize(nn.Linear(128, 96).bfloat16(), kind, torch.bfloat16), OFTConfig(block_size=B))
        randomize(layer)
        x, g = torch.randn(7, 128).bfloat16(), torch.randn(7, 96)
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        packed = layer.generators["default"].detach().double().requires_grad_()
        y, wanted = layer(mine), expected(layer, exact, packed)
        (y * g.bfloat16()).sum().backward()
        (wanted * g.bfloat16()).sum().backward()
        assert y.dtype == mine.grad.dtype == torch.bfloat16
        assert layer.generators["default"].grad.dtype == torch.float32
        for actual, value in [
            (y.detach(), wanted.detach()),
            (mine.grad, exact.grad),
            (layer.generators["default"].grad, packed.grad),
        ]:
            assert relative(actual, value) < 3 * 2**-9

    @each_kind
    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "shape",
        [(128,), (5, 128), (2, 5, 128), (2, 3, 5, 128), (0, 128), (2, 0, 128), (1, 1, 1, 128)],
        ids=lambda shape: "x".join(map(str, shape)),
    )
    def test_input_dimensions(self, kind: str, mode: bool, shape: tuple[int, ...]) -> None:
        layer, x = adapted(kind).train(mode), torch.randn(shape).requires_grad_()
        y = layer(x)
        assert y.shape == (*shape[:-1], 96)
        assert y.dtype == x.dtype
        torch.testing.assert_close(y, layer(x.view(-1, 128)).view(*shape[:-1], 96), atol=1e-5, rtol=1e-5)
        y.sum().backward()
        assert x.grad.shape == shape
        assert x.grad.isfinite().all()
        # each output sums 96 rows of W′, whatever the shape
        gradient = (torch.ones(1, 96).double() @ dequantized(layer.base_layer)).float()
        wanted = functional.rotate(gradient, layer.delta().detach().mT).expand(x.numel() // 128, 128).view(shape)
        torch.testing.assert_close(x.grad, wanted, atol=1e-5, rtol=1e-5)
        grad = layer.generators["default"].grad
        assert grad.isfinite().all()
        assert bool(grad.any()) == (x.numel() > 0)

    @each_kind
    def test_without_bias_and_with_frozen_input(self, kind: str) -> None:
        layer, x = adapted(kind, bias=False), torch.randn(7, 128)
        y = layer(x)
        assert relative(y.detach(), expected(layer, x)) < 1e-6
        y.sum().backward()
        assert layer.generators["default"].grad.any()

    @each_kind
    def test_only_generators_train(self, kind: str) -> None:
        model = wrapped(kind)
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
            "up.generators.default",
            "down.generators.default",
        ]
        assert all(type(layer) is QuantOFTLinear for layer in (model.up, model.down))

    @each_kind
    def test_no_layer_is_taken_for_another_size(self, kind: str) -> None:
        """Packed 4-bit weights are (n·d/2, 1): sizes come from in_features."""
        with pytest.raises(AdapterError, match=r"up: block_size=48 does not divide its 128 input features.*32 and 64"):
            wrap_model(Block(kind), block_size=48, target_modules=["up"])


class TestTraining:
    @each_kind
    def test_evaluations_between_steps(self, kind: str) -> None:
        """On CPUs with bf16 instructions bitsandbytes repacks a 4-bit weight in its first evaluation, rounds its scales
        to bf16 for good and returns no gradient from then on."""
        model = wrap_model(Block(kind), block_size=B, target_modules=["up", "down"])
        before = {name: packed_weight(getattr(model, name).base_layer) for name in ("up", "down")}
        x, y = torch.randn(16, 24), torch.randn(16, 5)
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        losses = []
        for _ in range(8):
            model.eval()
            with torch.no_grad():
                model(x)
            with torch.inference_mode():
                model(x)
            losses.append(train_step(model, optimizer, x, y))
        assert all(later < earlier for earlier, later in pairwise(losses))
        for name, weight in before.items():
            assert_same_bits(getattr(model, name).base_layer, weight)
        assert relative(model.train().up(torch.eye(128)), expected(model.up, torch.eye(128))) < 1e-6

    @repacks
    @pytest.mark.parametrize("kind", FOUR_BIT)
    def test_bitsandbytes_repacks_a_bare_layer(self, kind: str) -> None:
        """The hazard itself, so that this file notices when it is gone."""
        layer = quantized(kind)
        layer.weight.data, state = bnb_functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        assert state is layer.weight.quant_state
        assert state.packing_format_for_cpu
        assert state.absmax.dtype == torch.bfloat16

    @repacks
    @pytest.mark.parametrize("kind", FOUR_BIT)
    @pytest.mark.parametrize("d", [64, 192], ids=["one-scale-a-row", "three-scales-a-row"])
    def test_a_layer_that_was_evaluated_before(self, kind: str, d: int) -> None:
        """Unpacking keeps the 4-bit codes. Scales come back rounded to bf16, which is 2⁻⁸ relative at most; with double
        quantization they are rounded to 8 bit once more, which measured as much again."""
        plain = quantized(kind, d)
        weight, codes = dequantized(plain), plain.weight.data.clone()
        repacked = bnb_functional._convert_weight_packed_for_cpu(codes, plain.weight.quant_state)
        plain.weight.data, plain.weight.quant_state = repacked
        model = nn.Sequential(plain)
        with pytest.warns(UserWarning, match="^an evaluation before wrapping .* rounded their scales") as caught:
            wrap_model(model, block_size=B, target_modules=["0"])
        assert len(caught) == 1
        base = model[0].base_layer
        assert torch.equal(base.weight.data.view(-1), codes.view(-1))
        assert relative(dequantized(base), weight) < (2**-7 if "double" in kind else 2**-8)
        x = torch.randn(9, d).requires_grad_()
        for _ in range(2):
            y = model.train()(x)
            assert relative(y.detach(), expected(model[0], x.detach())) < 1e-6
            y.sum().backward()
            assert model[0].generators["default"].grad.any()
            with torch.no_grad():
                model.eval()(x)
        merge(model)
        assert relative(model(x).detach(), y.detach()) < 1e-6

    @each_kind
    def test_deepcopy_is_independent(self, kind: str) -> None:
        model, x, y = wrapped(kind), torch.randn(16, 24), torch.randn(16, 5)
        twin = copy.deepcopy(model)
        for mode in (True, False):
            assert torch.equal(model.train(mode)(x), twin.train(mode)(x))
        before, weight = model(x).detach(), packed_weight(model.up.base_layer)
        optimizer = torch.optim.AdamW(trained(twin), lr=5e-3)
        assert train_step(twin, optimizer, x, y) > train_step(twin, optimizer, x, y)
        merge(twin)
        assert torch.equal(model(x), before)
        assert_same_bits(model.up.base_layer, weight)

    @each_kind
    def test_deepcopy_of_a_merged_model_can_be_unmerged(self, kind: str) -> None:
        model, x = wrapped(kind), torch.randn(4, 24)
        before = model.train()(x).detach()
        twin = copy.deepcopy(merge(model, unload=False))
        unmerge(twin)
        assert torch.equal(twin.train()(x), before)
        assert twin.up.base_layer is not model.up.base_layer

    @each_kind
    def test_state_dict_round_trip(self, kind: str) -> None:
        model, other, x = wrapped(kind), wrapped(kind, std=0.1), torch.randn(4, 24)
        other(x)  # an int8 layer moves its scales in its first forward pass
        own = {key: value for key, value in model.state_dict().items() if ".generators." in key}
        missing, unexpected = other.load_state_dict(own, strict=False)
        assert not unexpected
        assert not [key for key in missing if "generators" in key]
        assert torch.equal(other(x), model(x))
