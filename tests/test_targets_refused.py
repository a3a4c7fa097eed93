"""A model that cannot be adapted is refused with a message that helps, and left exactly as it was."""

from __future__ import annotations

import re
from types import SimpleNamespace

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

from conftest import snapshot
from oftv2 import AdapterError, OFTConfig, OFTLinear, unwrap_model, wrap_model
from small_models import mlp


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 32, batch_first=True), 2).eval()


class Wide(nn.Module):
    """Has nothing to adapt."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)


REFUSED = {
    "typo": ({"target_modules": ("q_prj",)}, r"target_modules: 'q_prj' .* did you mean .*'q_proj'"),
    "no-substring": ({"target_modules": ("proj",)}, r"target_modules: 'proj' .*'o_proj'"),
    "regex-of-a-part": ({"target_modules": "q_proj"}, r"='q_proj' matches no module path .*into a list: \['q_proj'\]"),
    "regex-misspelled": ({"target_modules": "all_linear"}, r"='all_linear' matches no .*did you mean 'all-linear'\?"),
    "exclude-typo": ({"exclude_modules": ("dwn_proj",)}, r"exclude_modules: 'dwn_proj' .*'down_proj'"),
    "saved-typo": ({"modules_to_save": ("lm_hed",)}, r"modules_to_save: 'lm_hed' .*'lm_head'"),
    "pattern-typo": ({"block_size_pattern": {"q_prj": 8}}, r"block_size_pattern: 'q_prj' .*'q_proj'"),
    "layer": ({"layers": (0, 7, 9)}, r"layers: .* layer 7, 9"),
    "list-of-layers": ({"layers": (0,), "layers_pattern": ("h",)}, r"layers: .* layer 0 of layers_pattern=\['h'\]"),
    "container": ({"target_modules": ("mlp",)}, r"model\.layers\.0\.mlp is a LlamaMLP, which cannot be adapted.*nn\.L"),
    "norm": ({"target_modules": ("norm",)}, r"model\.norm is a LlamaRMSNorm, which cannot be adapted"),
    "sizes": ({"block_size": 32}, r"0\.mlp\.down_proj: block_size=32 does not divide its 176 .* 22 and 44\b.*adjust"),
    "num-blocks": ({"num_blocks": 24}, r"0\.self_attn\.q_proj: num_blocks=24 does not divide its 64 input"),
    "all-excluded": ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, r"nothing to adapt in .*q_proj"),
    "no-layers": ({"layers": ()}, r"nothing to adapt in this LlamaForCausalLM.*layers=\(\)"),
    "all-saved": ({"modules_to_save": ("model",)}, r"nothing to adapt in this LlamaForCausalLM"),
    "saves-nothing": ({"modules_to_save": ("act_fn",)}, r"act_fn"),
    "no-bias": ({"bias": "all"}, r"bias='all' would train nothing"),
    "own-bias": ({"bias": "oft_only"}, r"bias='oft_only' would train nothing"),
    "adapter-name": ({"adapter_name": "my.adapter"}, r"adapter_name='my.adapter' is not allowed"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_llama_is_left_as_it_was(tiny_llama, fields, message):
    model = tiny_llama(intermediate_size=176)
    model.model.layers[0].requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=re.compile(message, re.DOTALL)):
        wrap_model(model, **{"block_size": None if "num_blocks" in fields else 8, **fields})
    assert snapshot(model) == before


BAD_MODELS = {
    "sizes-of-two-layers": (lambda: mlp(64, 27, 9), {}, r"1: block_size=32 .* 27 input features.*: 27\."),
    "prime": (lambda: mlp(64, 37, 4), {}, r"1: block_size=32 does not divide its 37 input .* that do: 37\."),
    "far-prime": (lambda: mlp(64, 7, 4), {"adjust_block_size": True}, r"1: .* 7 input features.*: 7\..*exclude"),
    "far-prime-as-it-is": (lambda: mlp(64, 7, 4), {}, r"1: .* 7 input features.*: 7\..*out with exclude_modules$"),
    "one-input": (lambda: mlp(64, 1, 4), {"adjust_block_size": True}, r"1: .* 1 input features.*nothing to rotate"),
    "no-input": (lambda: nn.Sequential(nn.Linear(64, 4), nn.Linear(0, 4)), {}, r"1: .*\b0 input"),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)), {"target_modules": ("0",)}, r"groups of 18.*18"),
    "nothing": (Wide, {}, r"nothing to adapt in this Wide"),
    "bare-linear": (lambda: nn.Linear(64, 8), {}, r"itself a Linear.*OFTLinear\(model, config\)"),
    "bare-embedding": (lambda: nn.Embedding(9, 64), {}, r"itself a Embedding.*OFTEmbedding\(model, config\)"),
    "attention": (encoder, {"target_modules": ("out_proj",)}, r"layers\.0\.self_attn\.out_proj.*MultiheadAttent"),
    "wrapped": (lambda: wrap_model(mlp(64, 8)), {}, r"wrapped already \(adapter 'default'\).*merge.*unwrap_model"),
    "wrapped-inside": (lambda: nn.Sequential(wrap_model(mlp(64, 8))), {}, r"adapted layers already \(0\.0\)"),
    "layer-inside": (lambda: nn.Sequential(OFTLinear(nn.Linear(64, 8))), {}, r"adapted layers already \(0\)"),
    "adapted-layer": (lambda: OFTLinear(nn.Linear(64, 8)), {}, r"OFTLinear holds adapted layers already"),
    "saved-4-bit": (
        lambda: nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4"), nn.Linear(64, 8)).to("cpu"),
        {"modules_to_save": ("0",)},
        r"modules_to_save.*\b0\b",
    ),
}


@pytest.mark.parametrize(("make", "fields", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_refused_model_is_left_as_it_was(make, fields, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=re.compile(message, re.DOTALL)):
        wrap_model(model, **fields)
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.OFTConfig, peft.IA3Config], ids=["lora", "oft", "ia3"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",), ("k_proj",)], ids=["all", "same", "other"])
def test_a_model_with_pefts_adapters_is_refused_and_left_as_it_was(tiny_llama, config, targets):
    fields = {"feedforward_modules": []} if config is peft.IA3Config else {}
    model = peft.get_peft_model(tiny_llama(), config(target_modules=["q_proj"], **fields))
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"holds adapted layers already \(.*q_proj.*merge or remove"):
        wrap_model(model, block_size=8, target_modules=targets)
    assert snapshot(model) == before


def test_every_size_that_does_not_divide_is_named_up_to_five():
    model = mlp(3, 5, 7, 11, 13, 17, 19)
    with pytest.raises(AdapterError) as caught:
        wrap_model(model, block_size=8)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == ["0", "1", "2", "3", "4"]
    assert lines[5:] == ["… and 1 more"]


def test_the_error_suggests_what_then_works():
    model = mlp(48, 20, 4)
    with pytest.raises(AdapterError, match=r"0: block_size=32 .* 48 .*: 24 and 48\.") as caught:
        wrap_model(model)
    assert "1: block_size=32 does not divide its 20 input features; the nearest block sizes that do: 20." in str(
        caught.value
    )
    wrap_model(model, block_size=24, block_size_pattern={"1": 20})
    unwrap_model(model)
    wrap_model(model, OFTConfig(), num_blocks=2)  # takes the place of the configuration's block size
    assert [layer.rotation.block_size for layer in model] == [24, 10]


@pytest.mark.parametrize("what", [None, "gpt2", {"0": 1}, torch.zeros(2, 2), nn.Linear], ids=lambda w: type(w).__name__)
def test_what_is_no_model_is_refused(what):
    with pytest.raises(AdapterError, match=r"takes a torch\.nn\.Module, and this is a "):
        wrap_model(what)


def test_a_layer_goes_around_another():
    with pytest.raises(AdapterError, match=r"OFTLinear goes around a layer, .* not 1024"):
        OFTLinear(1024, 4096)


def test_of_a_pipeline_its_models_are_wanted():
    with pytest.raises(AdapterError, match=r"this is a SimpleNamespace; pass what is in it \(unet, vae\)"):
        wrap_model(SimpleNamespace(unet=mlp(64, 8), scheduler=None, vae=mlp(64, 8)))


@pytest.mark.parametrize(
    "config", [{"block_size": 8}, "all-linear", 8, peft.LoraConfig(), peft.OFTConfig()], ids=lambda c: type(c).__name__
)
def test_what_is_no_configuration_is_refused(config):
    model = mlp(64, 8)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=rf"OFTConfig.*{type(config).__name__}.*from_peft"):
        wrap_model(model, config)
    assert snapshot(model) == before


def test_a_lazy_layer_is_refused_until_it_knows_its_size():
    model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 8))
    with pytest.raises(AdapterError, match=r"^0: .*LazyLinear"):
        wrap_model(model)
    model(torch.zeros(1, 64))
    wrap_model(model)


def test_a_model_without_linear_layers_is_told_what_else_can_be_named():
    with pytest.raises(AdapterError, match=r"nothing to adapt .*target_modules=\['0'\]"):
        wrap_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), block_size=3)
