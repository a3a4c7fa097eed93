"""Adapters on layers of torchao and optimum-quanto: recognised, trained through, merged, quantized again."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from adapted import trained
from torch import nn

from conftest import randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    QuantOFTLinear,
    RequantizationWarning,
    explain,
    functional,
    load_adapter,
    merge,
    reference,
    save_adapter,
    unmerge,
    unwrap_model,
    wrap_model,
)
from oftv2.backends import find_backend
from other_backends import (
    DYNAMIC,
    REQUANTIZED,
    B,
    adapted,
    assert_same_bits,
    dense,
    each_maker,
    quantized,
    quanto_library,
    rotation_of,
    stored,
    weight_of,
)
from quantized import relative, train_step


class Model(nn.Module):
    """A dense layer, two quantized ones, a dense head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(24, 128), nn.Linear(128, 5)
        self.up, self.down = quantized(kind, 128, 192), quantized(kind, 192, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(self.stem(x)))))


def wrapped(kind: str) -> Model:
    model = wrap_model(Model(kind), block_size=B, target_modules=["up", "down"])
    randomize(model)
    return model


@each_maker
class TestLayers:
    def test_is_recognised(self, kind: str) -> None:
        """torchao's layers are nn.Linear with a weight that looks like float32: their weight must never be rotated."""
        base = quantized(kind)
        assert find_backend(base).name.startswith(kind.split("-")[0].replace("quanto", "optimum-quanto"))
        model = wrap_model(nn.Sequential(nn.Linear(32, 128), base), block_size=B)
        assert type(model[1]) is QuantOFTLinear
        for gradient in (True, False):
            assert model[1].forms(torch.float32, gradient=gradient) == ("input",)
        assert explain(model[1], 8192).form == "input"

    def test_a_fresh_adapter_changes_nothing(self, kind: str) -> None:
        base, x = quantized(kind), torch.randn(7, 128)
        assert torch.equal(QuantOFTLinear(base, OFTConfig(block_size=B))(x), base(x))

    @pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5)], ids=str)
    def test_against_float64(self, kind: str, shape: tuple[int, ...]) -> None:
        layer, x, g = adapted(quantized(kind)), torch.randn(*shape, 128), torch.randn(*shape, 96)
        assert torch.equal(layer(x), layer.base_layer(functional.rotate(x, layer.delta())))
        weight, bias = weight_of(layer.base_layer), layer.bias.detach().double()
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        packed = layer.generators["default"].detach().double().requires_grad_()
        y, wanted = layer(mine), reference.oft_linear(exact, rotation_of(layer, packed), weight, bias)
        y += 0  # the result may be written to
        (y * g).sum().backward()
        (wanted * g).sum().backward()
        assert relative(y.detach(), wanted.detach()) < 1e-6
        assert relative(mine.grad, exact.grad) < 1e-6
        assert relative(layer.generators["default"].grad, packed.grad) < 2e-6

    def test_merges_to_a_plain_layer_and_back(self, kind: str) -> None:
        layer, x = adapted(quantized(kind)), torch.randn(7, 128)
        before, bits, base = layer(x).detach(), stored(layer.base_layer), layer.base_layer
        wanted = reference.merge_weight(weight_of(base), rotation_of(layer))
        for dtype, rounding in [(torch.float32, 1e-6), (torch.bfloat16, 2**-9)]:
            layer.merge(dtype=dtype)
            assert type(layer.base_layer) is nn.Linear
            assert layer.base_layer.weight.dtype == layer.base_layer.bias.dtype == dtype
            assert relative(layer.base_layer.weight.detach(), wanted) < rounding + 1e-6
            if dtype == torch.float32:
                assert relative(layer(x).detach(), before) < 2e-6
            unmerge(layer)
            assert layer.base_layer is base
            assert_same_bits(base, bits)
        assert torch.equal(layer(x), before)

    def test_is_quantized_again(self, kind: str) -> None:
        layer, x = adapted(quantized(kind)), torch.randn(7, 128)
        before, bits, base = layer(x).detach(), stored(layer.base_layer), layer.base_layer
        wanted = reference.merge_weight(weight_of(base), rotation_of(layer))
        layer.merge(requantize=True)
        merged = layer.base_layer
        assert merged is not base
        assert type(merged) is type(base)
        assert type(merged.weight) is type(base.weight)
        assert {name: (t.dtype, t.shape) for name, t in stored(merged).items()} == {
            name: (t.dtype, t.shape) for name, t in bits.items()
        }
        low, high = REQUANTIZED[kind]
        error = relative(weight_of(merged), wanted)
        assert low < error < high
        assert layer.requantization_error == pytest.approx(error, rel=1e-3)
        assert relative(layer(x).detach(), before) < 3 * high
        layer(x.requires_grad_()).sum().backward()
        assert x.grad.any()
        layer.unmerge()
        assert layer.requantization_error is None
        assert_same_bits(base, bits)
        assert torch.equal(layer(x).detach(), before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_quantizes_again_as_the_library_did(self, kind: str, dtype: torch.dtype) -> None:
        """The weight that the layer was made from gives the same layer, bit for bit."""
        base = quantized(kind, dtype=dtype)
        assert_same_bits(find_backend(base).requantize(base, dense(dtype=dtype).weight.detach().float()), stored(base))

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    def test_16_bit_activations(self, kind: str, bias: bool) -> None:
        """Rotated input, weight, output and both gradients are each rounded by a root mean square of 2⁻⁹."""
        layer = adapted(quantized(kind, bias=bias, dtype=torch.bfloat16))
        x, g = torch.randn(7, 128).bfloat16(), torch.randn(7, 96).bfloat16()
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        packed = layer.generators["default"].detach().double().requires_grad_()
        weight = find_backend(layer.base_layer).dequantize(layer.base_layer).double()
        bias_64 = None if layer.bias is None else layer.bias.detach().double()
        y, wanted = layer(mine), reference.oft_linear(exact, rotation_of(layer, packed), weight, bias_64)
        (y * g).sum().backward()
        (wanted * g.double()).sum().backward()
        assert y.dtype == mine.grad.dtype == torch.bfloat16
        assert layer.generators["default"].grad.dtype == torch.float32
        assert relative(y.detach(), wanted.detach()) < 4 * 2**-9
        assert relative(mine.grad, exact.grad) < 4 * 2**-9
        assert relative(layer.generators["default"].grad, packed.grad) < 4 * 2**-9


@each_maker
class TestModels:
    def test_trains_and_keeps_the_base(self, kind: str) -> None:
        model = wrapped(kind)
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
            "up.generators.default",
            "down.generators.default",
        ]
        before = {name: stored(getattr(model, name).base_layer) for name in ("up", "down")}
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        x, y = torch.randn(16, 24), torch.randn(16, 5)
        losses = [train_step(model, optimizer, x, y) for _ in range(8)]
        assert losses[-1] < losses[0]
        for name, bits in before.items():
            assert_same_bits(getattr(model, name).base_layer, bits)

    def test_saves_loads_copies_and_unwraps(self, kind: str, tmp_path: Path) -> None:
        model, x = wrapped(kind), torch.randn(4, 24)
        y = model.train()(x)
        save_adapter(model, tmp_path)
        assert torch.equal(load_adapter(Model(kind), tmp_path).train()(x), y)
        if "torchao" in kind:  # quanto's tensors refuse to be copied
            assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(unwrap_model(model).train()(x), Model(kind).train()(x))

    def test_merges_as_a_whole(self, kind: str) -> None:
        model, x = wrapped(kind), torch.randn(16, 24)
        before = model(x).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RequantizationWarning)
            merge(model)
        assert type(model.up) is type(model.down) is nn.Linear
        assert model.up.weight.dtype == torch.float32
        assert relative(model(x).detach(), before) < 2e-6
        again = wrapped(kind)
        with pytest.warns(RequantizationWarning, match=r"requantizing changed the merged weights by \d"):
            merge(again, requantize=True)
        assert find_backend(again.up) is not None
        assert relative(again(x).detach(), before) < 5 * REQUANTIZED[kind][1]


class TestLlama:
    @pytest.mark.parametrize("library", ["torchao", "quanto"])
    def test_a_whole_language_model(self, library: str, tiny_llama) -> None:
        """Every layer but the head is quantized with the library's own function and adapted by default."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quanto, model = quanto_library(), tiny_llama()
        if library == "torchao":
            quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
        else:
            quanto.quantize(model, weights=quanto.qint4, exclude="lm_head")
            quanto.freeze(model)
        wrap_model(model, block_size=B)
        adapters = [name for name, module in model.named_modules() if isinstance(module, QuantOFTLinear)]
        assert len(adapters) == 14
        ids = torch.randint(3, 128, (2, 12))
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        losses = []
        for _ in range(4):
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        logits = model.eval()(input_ids=ids).logits.detach()
        merge(model)
        assert not any(find_backend(module) for module in model.modules())
        assert relative(model(input_ids=ids).logits.detach(), logits) < 1e-5


class RoundedActivations(nn.Linear):
    """Rounds its input to 8 bits: the scale has a gradient, by way of one input, and nothing else has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return super().forward((x / scale).round() * scale)


class NoBackward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.register_hook(lambda gradient: (_ for _ in ()).throw(RuntimeError("derivative not implemented")))
        return super().forward(x)


class DoesNotRun(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this kernel needs a GPU")


class TestGradientsThatAreCut:
    @pytest.mark.parametrize("kind", DYNAMIC)
    def test_torchao_with_dynamic_activations(self, kind: str, tmp_path: Path) -> None:
        def model() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(32, 128), quantized(kind), quantized(kind, 96, 8))

        before = model()
        message = r"^1 \(and 1 other layers\): this Linear lets no gradient through.*torchao rounds its activations"
        with pytest.raises(AdapterError, match=message):
            wrap_model(before, block_size=B)
        assert [type(module) for module in before] == [nn.Linear] * 3
        assert all(module.bias.requires_grad for module in before)  # nothing was frozen, nothing changed
        x = torch.randn(5, 32)
        plain = wrap_model(nn.Sequential(*(nn.Linear(*size) for size in [(32, 128), (128, 96), (96, 8)])), block_size=8)
        randomize(plain)
        save_adapter(plain, tmp_path)
        loaded = load_adapter(model(), tmp_path, check_base=False)  # to answer with it needs no gradient
        with torch.no_grad():
            assert loaded(x).isfinite().all()
        for target in (before, loaded):  # to train it on does: from the plain model, and from one wrapped alike
            with pytest.raises(AdapterError, match=r"^1 \(and 1 other layers\): this Linear lets no gradient through"):
                load_adapter(target, tmp_path, trainable=True, check_base=False)
        assert [type(module) for module in before] == [nn.Linear] * 3
        assert type(wrap_model(before, block_size=8, exclude_modules=["1", "2"])[1]) is nn.Linear

    def test_rounding_that_only_a_trial_finds(self) -> None:
        model = nn.Sequential(nn.Linear(32, 64), RoundedActivations(64, 8)).eval()
        state = torch.get_rng_state()
        with pytest.raises(AdapterError, match=r"^1: this RoundedActivations lets .*carries no gradient to its input"):
            wrap_model(model, block_size=B)
        assert torch.equal(torch.get_rng_state(), state)
        assert not model[1].training
        assert model[1].weight.grad is None

    def test_a_backward_pass_that_fails(self) -> None:
        with pytest.raises(AdapterError, match=re.escape("its backward pass fails (derivative not implemented)")):
            wrap_model(nn.Sequential(NoBackward(64, 8)), block_size=B)

    def test_what_cannot_be_tried_out_is_taken(self) -> None:
        """A kernel for another device, a weight of zeros, no weights yet."""
        zero = type("ZeroLinear", (nn.Linear,), {})(64, 8)
        nn.init.zeros_(zero.weight)
        meta = type("MetaLinear", (nn.Linear,), {})(64, 8, device="meta")
        for layer in (DoesNotRun(64, 8), zero, meta):
            assert wrap_model(nn.Sequential(layer), block_size=B)[0].base_layer is layer
