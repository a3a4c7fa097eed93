"""``python -m oftv2 merge``: its results, opened by plain transformers, and how it fails, stops and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import oftv2
from conftest import ROOT, perturb, randomize
from oftv2 import load_adapter, save_adapter, wrap_model
from oftv2.__main__ import main
from oftv2.checkpoint_merge import merge_checkpoint
from oftv2.safetensors_stream import TensorFile
from peers import output, relative

IDS = torch.arange(3, 15).view(2, 6)
SMALL = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@torch.no_grad()
def answer(model):
    return output(model.eval()(IDS))


def llama(tiny_llama, **fields):
    return lambda: tiny_llama(**fields)


def gpt2():
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    )


def mixtral():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **sizes, **heads))


def bert():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=128, num_labels=5, **sizes)
    return transformers.BertForSequenceClassification(config)


def resnet():
    torch.manual_seed(1)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def llama_model(**fields):
    def make():
        torch.manual_seed(1)
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**SMALL, **sizes, num_attention_heads=4, num_key_value_heads=2, **fields)
        return transformers.LlamaForCausalLM(config)

    return make


TIED = {"tie_word_embeddings": True}
# How the base is made, its dtype, and the adapter's fields.
MODELS = {
    "llama": (llama_model(), torch.float32, {"block_size": 16}),
    "llama-bf16": (llama_model(), torch.bfloat16, {"block_size": 16, "parametrization": "cayley"}),
    "llama-fp16-tied": (llama_model(**TIED), torch.float16, {"block_size": 16, "block_share": True}),
    "tied-embedding": (
        llama_model(**TIED),
        torch.bfloat16,
        {"block_size": 16, "target_modules": ("embed_tokens", "q_proj")},
    ),
    "tied-head": (llama_model(**TIED), torch.float32, {"block_size": 16, "target_modules": ("lm_head",)}),
    "tied-both": (
        llama_model(**TIED),
        torch.float32,
        {"block_size": 16, "target_modules": ("embed_tokens", "lm_head")},
    ),
    "tied-trained": (
        llama_model(**TIED),
        torch.float32,
        {"block_size": 16, "target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
    ),
    "tied-trained-and-rotated": (
        llama_model(**TIED),
        torch.float32,
        {"block_size": 16, "target_modules": ("embed_tokens",), "modules_to_save": ("lm_head",)},
    ),
    "gpt2": (gpt2, torch.float32, {"block_size": 8, "bias": "oft_only"}),
    "gpt2-bf16-embedding": (
        gpt2,
        torch.bfloat16,
        {"block_size": 8, "target_modules": ("wte", "c_attn"), "bias": "all"},
    ),
    "mixtral": (mixtral, torch.float32, {"block_size": 8, "target_modules": ("q_proj", "o_proj")}),
    "bert": (bert, torch.float32, {"block_size": 8, "modules_to_save": ("classifier", "pooler")}),
}


def make_base(make, dtype, folder, **options):
    model = make().to(dtype)
    model.save_pretrained(folder, **options)
    return type(model)


def make_adapter(cls, base, folder, fields, **options):
    model = wrap_model(cls.from_pretrained(base, dtype="auto"), **fields)
    randomize(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "generators" not in n]
    with torch.no_grad():
        for _, parameter in trained:
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    save_adapter(model, folder, format="oftv2", **options)


def merged_in_memory(cls, base, adapter):
    return oftv2.merge(load_adapter(cls.from_pretrained(base, dtype="auto"), adapter))


def run(*arguments):
    return main(["merge", *map(str, arguments)])


def assert_same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize(("make", "dtype", "fields"), MODELS.values(), ids=MODELS.keys())
def test_the_result_is_what_merging_in_memory_gives_bit_for_bit(make, dtype, fields, sharded, tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    cls = make_base(make, dtype, base, **({"max_shard_size": "30KB"} if sharded else {}))
    assert (len(list(base.glob("*.safetensors"))) > 1) == sharded
    make_adapter(cls, base, adapter, fields)
    assert run(base, adapter, out) == 0
    merged = cls.from_pretrained(out, dtype="auto")
    assert_same_state(merged, merged_in_memory(cls, base, adapter))
    assert not torch.equal(answer(merged), answer(cls.from_pretrained(base, dtype="auto")))
