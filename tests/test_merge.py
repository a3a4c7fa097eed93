"""Merging into the weight and out again: values, drift, bits, dtypes."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from conftest import assert_close, randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    OFTConv2d,
    OFTEmbedding,
    OFTLinear,
    adapter_names,
    add_adapter,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
    wrap_model,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYERS = {
    "linear": lambda: OFTLinear(nn.Linear(64, 33), OFTConfig(block_size=16)),
    "conv1d": lambda: OFTLinear(Conv1D(33, 64), OFTConfig(block_size=16)),
    "embedding": lambda: OFTEmbedding(nn.Embedding(100, 64), OFTConfig(block_size=16)),
    "conv2d": lambda: OFTConv2d(nn.Conv2d(8, 6, (2, 3), groups=2), OFTConfig(block_size=12)),
    "shared": lambda: OFTLinear(nn.Linear(64, 33), OFTConfig(block_size=16, block_share=True)),
    "exact": lambda: OFTLinear(nn.Linear(64, 33), OFTConfig(block_size=16, parametrization="cayley")),
}


COMPUTED = {
    "weight-norm": (nn.utils.parametrizations.weight_norm, parametrize.remove_parametrizations),
    "spectral-norm": (nn.utils.parametrizations.spectral_norm, parametrize.remove_parametrizations),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), prune.remove),
}


@pytest.mark.parametrize(("compute", "remove"), COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed(compute, remove):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), compute(nn.Linear(32, 8))).eval()
    x = torch.randn(4, 32)
    plain, buffers = model(x), [buffer.clone() for buffer in model.buffers()]
    wrap_model(model, block_size=8)
    assert torch.equal(model(x), plain)
    assert all(map(torch.equal, model.buffers(), buffers))
    randomize(model, 0.1)
    expected = model.eval()(x)
    with pytest.raises(AdapterError, match=r"^1: the weight of its (Parametrized)?Linear is computed"):
        merge(model)
    assert isinstance(model[0], OFTLinear)
    assert torch.equal(model(x), expected)
    remove(model[1].base_layer, "weight")
    assert_close("merged", merge(model)(x), expected, 1e-6)


@pytest.mark.parametrize("unload", [True, False], ids=["unloaded", "kept"])
def test_models_that_accelerate_dispatched(tiny_llama, tmp_path, unload):
    """As device_map does with several devices: the forward of each layer is replaced on the object."""
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = dispatch_model(tiny_llama().eval(), device_map, main_device="cpu", offload_dir=tmp_path)
    ids = torch.arange(10)[None]
    wrap_model(model, block_size=16)
    randomize(model, 0.1)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        merge(model, unload=unload)
        assert_close("merged", model(ids).logits, expected, 1e-5)
        if not unload:
            assert_close("unmerged", unmerge(model)(ids).logits, expected, 1e-5)
        else:
            projection = model.model.layers[0].mlp.up_proj
            assert type(projection) is nn.Linear
            assert projection.forward.args[0] is projection._old_forward.__self__ is projection


def test_weights_that_are_offloaded_are_refused(tiny_llama, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = dispatch_model(tiny_llama().eval(), device_map, main_device="cpu", offload_dir=tmp_path)
    wrap_model(model, block_size=16)
    with pytest.raises(AdapterError, match=r"^model\.layers\.1\.self_attn\.q_proj: the weight is on the meta device"):
        merge(model)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, OFTLinear))


def test_what_trains_in_full_is_not_offloaded(tiny_llama, tmp_path):
    """What is written to an offloaded weight would be lost, and the layer go on with the base model's."""
    adapted = wrap_model(tiny_llama(), block_size=16, modules_to_save=["lm_head"])
    save_adapter(adapted, tmp_path / "adapter")
    model = dispatch_model(
        tiny_llama().eval(), {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path / "disk"
    )
    for act in (
        lambda: wrap_model(model, block_size=16, modules_to_save=["lm_head"]),
        lambda: load_adapter(model, tmp_path / "adapter"),
        lambda: add_adapter(wrap_model(model, block_size=16), "head", block_size=16, modules_to_save=["lm_head"]),
        lambda: load_adapter(model, tmp_path / "adapter", adapter_name="head"),
    ):
        with pytest.raises(AdapterError, match=r"^lm_head\.weight is offloaded, and an adapter that trains it in full"):
            act()
    assert adapter_names(model) == ["default"]


def test_merged_models_that_were_read_from_gguf_are_saved_as_any(tiny_llama, tmp_path):
    """transformers dequantizes them and marks them as quantized, and refuses to save them so."""
    model = tiny_llama()
    model.is_quantized, model.hf_quantizer = True, types.SimpleNamespace(is_serializable=lambda *_, **__: False)
    model.config.quantization_config = types.SimpleNamespace(quant_method="gguf", to_dict=dict)
    wrap_model(model, block_size=16)
    randomize(model, 0.1)
    merge(model).save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_forward_that_was_replaced_is_refused_unless_it_is_the_layers_own():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].forward = types.MethodType(lambda layer, x: 2 * F.linear(x, layer.weight), model[0])
    wrap_model(model, block_size=8)
    randomize(model, 0.1)
    x = torch.randn(3, 16)
    expected = model.eval()(x)
    assert_close("merged", merge(copy.deepcopy(model))(x), expected, 1e-5)
    plain = model[1].base_layer.forward
    model[1].base_layer.forward = lambda x: 2 * plain(x)
    with pytest.raises(AdapterError, match=r"^1: the forward of its Linear was replaced by a function"):
        merge(model)
    assert not model[0].merged


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
class TestMerge:
    def input_for(self, layer, dtype=torch.float32):
        if isinstance(layer, OFTEmbedding):
            return torch.arange(100)
        shape = (3, 8, 5, 6) if isinstance(layer, OFTConv2d) else (7, 64)
        return torch.randn(shape, dtype=dtype)

    def test_merged_weight_does_the_same(self, make):
        layer = make()
        randomize(layer, std=0.1)
        x = self.input_for(layer)
        expected = layer(x)
        layer.merge()
        assert_close("output", layer(x), expected, 2e-6)
        with pytest.raises(AdapterError, match="already merged"):
            layer.merge()

    def test_ten_round_trips_drift_less_than_1e_6(self, make):
        layer = make()
        randomize(layer, std=0.1)
        original = layer.weight.clone()
        for _ in range(10):
            layer.merge()
            layer.unmerge()
        assert_close("weight", layer.weight, original, 1e-6)
        with pytest.raises(AdapterError, match="not merged"):
            layer.unmerge()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kept_original_comes_back_bit_for_bit(self, make, dtype):
        layer = make().to(dtype)
        randomize(layer, std=0.1)
        original, parameter = layer.weight.clone(), layer.weight
        layer.merge(keep_original=True)
        assert not torch.equal(layer.weight, original)
        assert layer.weight.dtype == dtype
        layer.unmerge()
        assert layer.weight is parameter
        assert torch.equal(layer.weight, original)

    def test_16_bit_weights_are_merged_in_float32_and_rounded_once(self, make):
        layer = make().bfloat16()
        randomize(layer, std=0.1)
        wide = copy.deepcopy(layer).float()
        layer.merge()
        wide.merge()
        assert torch.equal(layer.weight, wide.weight.bfloat16())

    def test_unmerge_uses_what_was_merged_not_what_is_there_now(self, make):
        layer = make()
        randomize(layer, std=0.1)
        original = layer.weight.clone()
        layer.merge()
        randomize(layer, std=0.1, seed=9)
        layer.unmerge()
        assert_close("weight", layer.weight, original, 1e-6)

    def test_generators_with_nan_are_refused_and_nothing_changes(self, make):
        layer = make()
        layer.generators["default"].data[0, 0] = float("nan")
        original = layer.weight.clone()
        with pytest.raises(AdapterError, match="NaN or Inf"):
            layer.merge()
        assert torch.equal(layer.weight, original)
        assert not layer.merged


def test_what_was_trainable_is_so_again_where_tied_weights_became_two(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    merge(wrap_model(model, block_size=16, target_modules=["embed_tokens"]))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("target", ["decoder", "word_embeddings"])
def test_a_bias_that_is_tied_with_the_weights_is_saved_too(target, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    randomize(wrap_model(model, block_size=8, target_modules=[target]))
    ids = torch.arange(4, 16)[None]
    merge(model).save_pretrained(tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_tied_head_of_an_encoder_decoder_is_refused():
    """T5 scales what goes into its head by whether the configuration says that the head is tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = wrap_model(T5ForConditionalGeneration(T5Config(**sizes)), block_size=8, target_modules=["lm_head", "q"])
    randomize(model)
    ids = torch.arange(6)[None]
    expected = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
    with pytest.raises(AdapterError, match="lm_head: its weight is tied, and this T5ForConditionalGeneration scales"):
        merge(model)
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, expected)
    merged = merge(model, unload=False)(input_ids=ids, decoder_input_ids=ids).logits
    assert_close("logits", merged, expected, 1e-5)


def test_states_of_merged_and_unmerged_models_are_not_mixed_up(tmp_path):
    models = [wrap_model(nn.Sequential(nn.Linear(16, 8)), block_size=8) for _ in range(2)]
    randomize(models[0], 0.1)
    unmerged = models[0].state_dict()
    torch.save(merge(models[0], unload=False).state_dict(), tmp_path / "merged.pt")
    merged, before = torch.load(tmp_path / "merged.pt"), copy.deepcopy(models[1].state_dict())
    with pytest.raises(AdapterError, match=r"0: .* was merged, and here not: merge\(model, unload=False\) first"):
        models[1].load_state_dict(merged)
    for key, value in models[1].state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(AdapterError, match=r"0: .* was not merged, and here it is: unmerge\(model\) first"):
        models[0].load_state_dict(unmerged)
    x = torch.randn(4, 16)
    merge(models[1], unload=False).load_state_dict(merged)
    assert torch.equal(models[1](x), models[0](x))
    unmerge(models[1]).load_state_dict(unmerged)
    assert_close("y", models[1](x), models[0](x), 1e-5)
