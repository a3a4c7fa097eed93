"""Whole quantized models, and quantized layers of other kinds than bitsandbytes'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from adapted import trained
from torch import Tensor, nn

from conftest import randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    QuantOFTLinear,
    load_adapter,
    merge,
    reference,
    save_adapter,
    unwrap_model,
    wrap_model,
)
from quantized import (
    B,
    assert_same_bits,
    dequantized,
    each_kind,
    packed_weight,
    quantize,
    quantized,
    relative,
)


class DetachingLinear(nn.Linear):
    """A linear layer that returns no gradient, as several quantized ones do that round their activations."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()).detach()


class OpaqueLinear(nn.Module):
    """A quantized layer of an unknown library: a forward pass that trains, and a weight nobody else can read."""

    def __init__(self, in_features: int, out_features: int, detach: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.detach = in_features, out_features, detach
        self.register_buffer("codes", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.codes.to(x.dtype) / 127).T
        return y.detach() if self.detach else y


class TestOtherQuantizations:
    def test_an_unknown_layer_trains(self) -> None:
        layer = QuantOFTLinear(OpaqueLinear(64, 24), OFTConfig(block_size=B), name="odd").train()
        randomize(layer)
        x = torch.randn(2, 5, 64).requires_grad_()
        y = layer(x)
        weight = layer.base_layer.codes.double() / 127
        R = reference.cayley_neumann(reference.skew(layer.generators["default"].detach().double(), B), 4)
        assert relative(y.detach(), reference.oft_linear(x.detach().double(), R, weight)) < 1e-6
        y.sum().backward()
        assert layer.generators["default"].grad.any()

    def test_an_unknown_layer_is_wrapped_when_it_is_named(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(32, 64), OpaqueLinear(64, 24))
        fresh = copy.deepcopy(model)
        wrap_model(model, block_size=B, target_modules=["0", "1"])
        assert isinstance(model[1], QuantOFTLinear)
        randomize(model)
        save_adapter(model, tmp_path)
        x = torch.randn(5, 32)
        assert torch.equal(load_adapter(fresh, tmp_path)(x), model(x))

    def test_what_was_changed_in_a_4_bit_layer_is_changed_back(self) -> None:
        base = quantized("nf4")
        base.support_avx512bf16_for_cpu = True
        model = wrap_model(nn.Sequential(base), block_size=B)
        assert base.support_avx512bf16_for_cpu is False
        assert unwrap_model(model)[0] is base
        assert base.support_avx512bf16_for_cpu is True

    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_a_base_that_cuts_the_gradient_is_refused(self, mode: bool) -> None:
        layer = QuantOFTLinear(OpaqueLinear(64, 24, detach=True), OFTConfig(block_size=B), name="blocks.3.odd")
        layer.train(mode)
        with pytest.raises(RuntimeError, match=r"^blocks\.3\.odd: the base layer \(OpaqueLinear\).*without a gradient"):
            layer(torch.randn(5, 64))
        with torch.no_grad():
            assert layer(torch.randn(5, 64)).shape == (5, 24)  # nothing is lost where nothing trains
        with torch.inference_mode():
            assert layer(torch.randn(2, 5, 64)).shape == (2, 5, 24)

    def test_a_linear_subclass_that_cuts_the_gradient_is_refused(self) -> None:
        """The layers behind it would train, so that nothing else would tell."""
        model = nn.Sequential(nn.Linear(32, 64), DetachingLinear(64, 64), nn.Linear(64, 8))
        with pytest.raises(AdapterError, match=r"^1: this DetachingLinear lets no gradient through"):
            wrap_model(model, block_size=B, target_modules=["0", "1", "2"])
        assert type(model[0]) is nn.Linear

    def test_an_unreadable_weight_cannot_be_merged(self) -> None:
        layer = QuantOFTLinear(OpaqueLinear(64, 24), OFTConfig(block_size=B), name="odd")
        randomize(layer)
        x = torch.randn(5, 64)
        y = layer(x)
        for requantize in (False, True):
            with pytest.raises(AdapterError, match=r"^odd: no way .* weight of a OpaqueLinear; known: bitsandbytes"):
                merge(layer, unload=False, requantize=requantize)
        assert not layer.merged
        assert isinstance(layer.base_layer, OpaqueLinear)
        assert torch.equal(layer(x), y)

    def test_one_unreadable_weight_leaves_the_whole_model_unmerged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = wrap_model(nn.Sequential(nn.Linear(64, 128), quantized("nf4")), block_size=B, target_modules=["0", "1"])
        randomize(model)
        x, bases = torch.randn(5, 64), [layer.base_layer for layer in model]
        weight, packed = bases[0].weight.detach().clone(), packed_weight(bases[1])
        y = model(x)
        monkeypatch.setattr("oftv2.backends.BACKENDS", ())
        with pytest.raises(AdapterError, match=r"^1: no way is known to read the weight of a Linear4bit"):
            merge(model)
        assert [layer.base_layer for layer in model] == bases
        assert not any(layer.merged for layer in model)
        assert torch.equal(bases[0].weight, weight)
        assert_same_bits(bases[1], packed)
        assert torch.equal(model(x), y)


def quantize_llama(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer but the head, as transformers does it."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, quantize(module, kind))
    return model


def train_llama(model: nn.Module, steps: int = 6) -> list[float]:
    """Losses on one batch, with an evaluation before every step."""
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    losses = []
    for _ in range(steps):
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


LOADED = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def loaded_llama(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> Callable[[str], nn.Module]:
    """Loads a tiny Llama through ``from_pretrained`` with a quantization, as users do."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "base"
    tiny_llama(intermediate_size=192).save_pretrained(folder)

    def load(kind: str) -> nn.Module:
        fields = dict(LOADED[kind])
        if kind != "int8":
            fields["bnb_4bit_compute_dtype"] = torch.float32
        config = BitsAndBytesConfig(**fields)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})

    return load


class TestLlama:
    @each_kind
    def test_quantized_by_hand_trains(self, kind: str, tiny_llama: Callable[..., nn.Module]) -> None:
        model = wrap_model(quantize_llama(tiny_llama(intermediate_size=192), kind), block_size=B)
        layers = [module for module in model.modules() if isinstance(module, QuantOFTLinear)]
        assert len(layers) == 2 * 7
        before = [packed_weight(layer.base_layer) for layer in layers]
        losses = train_llama(model)
        assert losses[-1] < losses[0] - 0.1
        for layer, weight in zip(layers, before, strict=True):
            assert_same_bits(layer.base_layer, weight)

    @pytest.mark.parametrize("kind", LOADED)
    def test_loaded_quantized_trains_saves_and_loads(
        self, kind: str, loaded_llama: Callable[[str], nn.Module], tmp_path: Path
    ) -> None:
        model = wrap_model(loaded_llama(kind), block_size=B)
        assert sum(isinstance(module, QuantOFTLinear) for module in model.modules()) == 2 * 7
        losses = train_llama(model)
        assert losses[-1] < losses[0] - 0.1
        save_adapter(model, tmp_path / "adapter")
        again = load_adapter(loaded_llama(kind), tmp_path / "adapter").eval()
        ids = torch.randint(3, 128, (2, 12))
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model.eval()(ids).logits)

    @pytest.mark.parametrize("kind", LOADED)
    def test_merged_is_a_plain_model(self, kind: str, loaded_llama: Callable[[str], nn.Module], tmp_path: Path) -> None:
        """Nothing in it is quantized, and nothing says so: it saves, loads and changes dtype like any other."""
        from transformers import AutoModelForCausalLM

        model = wrap_model(loaded_llama(kind), block_size=B).train()  # in training int8 computes in float32, too
        randomize(model)
        ids = torch.randint(3, 128, (2, 12))
        with torch.no_grad():
            before = model(ids).logits
            merged = merge(model).eval()(ids).logits
        assert relative(merged, before) < 1e-5  # float32 products in another order, through two layers
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
        model.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, merged)
        assert model.to(torch.bfloat16).dtype == torch.bfloat16
        assert not getattr(model, "is_quantized", False)
        assert not hasattr(model.config, "quantization_config")

    @pytest.mark.filterwarnings("ignore::oftv2.RequantizationWarning")
    @pytest.mark.parametrize("kind", LOADED)
    def test_requantized_stays_a_quantized_model(
        self, kind: str, loaded_llama: Callable[[str], nn.Module], tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        model = wrap_model(loaded_llama(kind), block_size=B)
        randomize(model)
        merge(model, requantize=True).eval()
        ids = torch.randint(3, 128, (2, 12))
        model.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": "cpu"})
        for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            mine, other = model.get_submodule(path), again.get_submodule(path)
            assert type(mine) is type(other)
            assert torch.equal(dequantized(mine), dequantized(other))
        with torch.no_grad():
            for module in (*model.modules(), *again.modules()):
                if isinstance(module, bnb.nn.Linear4bit):
                    module.support_avx512bf16_for_cpu = False  # compare the same arithmetic on every CPU
            assert relative(again.eval()(ids).logits, model(ids).logits) < 1e-6
