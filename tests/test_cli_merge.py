"""``python -m oftv2 merge``: its results, opened by plain transformers, are those of merging in memory."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import oftv2
from conftest import perturb
from merged_checkpoints import (
    SMALL,
    answer,
    assert_same_state,
    llama_model,
    make_adapter,
    make_base,
    merged_in_memory,
    run,
)
from oftv2 import save_adapter, wrap_model
from oftv2.safetensors_stream import TensorFile
from peers import relative


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


def bert_head():
    """Its decoder's bias is tied too, as long as the weights are."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=128, **sizes))
    torch.nn.init.normal_(model.cls.predictions.bias)
    return model


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
    "bert-tied-head": (bert_head, torch.float32, {"block_size": 8, "target_modules": ("decoder",)}),
    "bert-tied-embedding": (
        bert_head,
        torch.float32,
        {"block_size": 8, "target_modules": ("word_embeddings",), "bias": "all"},
    ),
    "bert": (bert, torch.float32, {"block_size": 8, "modules_to_save": ("classifier", "pooler")}),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize(("make", "dtype", "fields"), MODELS.values(), ids=MODELS.keys())
def test_the_result_is_what_merging_in_memory_gives_bit_for_bit(make, dtype, fields, sharded, tmp_path, monkeypatch):
    if sharded:
        monkeypatch.setattr(oftv2.merging, "_VALUES", 1000)  # takes weights of this size in many parts
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    cls = make_base(make, dtype, base, **({"max_shard_size": "30KB"} if sharded else {}))
    assert (len(list(base.glob("*.safetensors"))) > 1) == sharded
    make_adapter(cls, base, adapter, fields)
    assert run(base, adapter, out) == 0
    merged = cls.from_pretrained(out, dtype="auto")
    assert_same_state(merged, merged_in_memory(cls, base, adapter))
    assert not torch.equal(answer(merged), answer(cls.from_pretrained(base, dtype="auto")))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "block_size"), [("dwconv", 7), (r"patch_embeddings|downsampling_layer\.1", 4)])
def test_convolutions(layers, block_size, wanted, tmp_path, monkeypatch):
    """With groups, whose rows are rotated together, and without."""
    monkeypatch.setattr(oftv2.merging, "_VALUES", 1000)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    config = transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[16, 24], num_stages=2, patch_size=2)
    cls = make_base(lambda: transformers.ConvNextModel(config), torch.float32, base)
    make_adapter(cls, base, adapter, {"block_size": block_size, "target_modules": f".*({layers})"})
    assert run(base, adapter, out, "--dtype", wanted) == 0
    merged = cls.from_pretrained(out, dtype="auto")
    assert_same_state(merged, merged_in_memory(cls, base, adapter).to(getattr(torch, wanted)))


def classifier(base, **options):
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **options)


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_a_head_that_the_base_lacks_is_added(size, tmp_path, capsys):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_base(llama_model(), torch.bfloat16, base, max_shard_size=size)
    model = wrap_model(classifier(base, dtype="auto"), block_size=16)
    perturb(model)
    save_adapter(model, adapter)
    assert run(base, adapter, out) == 0
    said = capsys.readouterr().err
    assert "score.weight added: the merged model is a LlamaForSequenceClassification" in said
    assert "lm_head.weight left out" in said
    merged = AutoModelForSequenceClassification.from_pretrained(out, dtype="auto")
    assert merged.config.num_labels == 3
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert_same_state(merged, oftv2.merge(model))
    if size == "100KB":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = {name: TensorFile(out / name) for name in set(index["weight_map"].values())}
        assert {path.name for path in out.glob("*.safetensors")} == set(files)
        assert index["weight_map"] == {key: name for name, file in files.items() for key in file.entries}
        assert index["metadata"]["total_size"] == sum(e.size for f in files.values() for e in f.entries.values())
        assert index["metadata"]["total_parameters"] == sum(p.numel() for p in merged.parameters())


def peft_adapter(model, folder, **fields):
    """An adapter of PEFT's with random values, and what PEFT's model with it answers before and after PEFT's merge."""
    model = peft.get_peft_model(model, peft.OFTConfig(oft_block_size=16, **fields))
    perturb(model)
    model.save_pretrained(folder)
    before = answer(model)
    return before, answer(model.merge_and_unload())


PEFT = {
    "linear": (
        llama_model(),
        AutoModelForCausalLM,
        {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
    ),
    "tied-head-trained-apart": (
        llama_model(**TIED),
        AutoModelForCausalLM,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "task": (llama_model(), classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "class": (llama_model(), classifier, {"target_modules": ["q_proj"], "modules_to_save": ["score"]}),
}


@pytest.mark.parametrize(("make", "load", "fields"), PEFT.values(), ids=PEFT.keys())
def test_adapters_of_pefts(make, load, fields, tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    make_base(make, torch.float32, base)
    load = getattr(load, "from_pretrained", load)
    before, merged = peft_adapter(load(base), adapter, **fields)
    assert run(base, adapter, out) == 0
    result = answer((load if load is not classifier else AutoModelForSequenceClassification.from_pretrained)(out))
    assert relative(result, before) < 1e-5
    assert relative(result, merged) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"target_modules": ("q_proj", "lm_head")}], ids=["body", "head"])
@pytest.mark.parametrize("make", [llama_model(**TIED), gpt2], ids=["llama", "gpt2"])
def test_a_base_that_was_saved_without_its_head(make, fields, tmp_path):
    """GPT-2's own checkpoint is of this kind: its names lack the prefix that the model with a head has."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = make()
    model.base_model.save_pretrained(base)
    if fields and make is gpt2:
        fields = {"target_modules": ("c_attn", "lm_head")}
    make_adapter(type(model), base, adapter, {"block_size": 8, **fields})
    assert run(base, adapter, out) == 0
    assert_same_state(type(model).from_pretrained(out), merged_in_memory(type(model), base, adapter))


def test_an_adapter_on_the_body_alone(tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    cls = make_base(llama_model(), torch.float32, base)
    make_adapter(transformers.AutoModel, base, adapter, {"block_size": 16})
    assert run(base, adapter, out) == 0
    expected = merged_in_memory(transformers.AutoModel, base, adapter)
    assert_same_state(transformers.AutoModel.from_pretrained(out), expected)
    full = cls.from_pretrained(out)
    assert_same_state(full.model, expected)
    assert torch.equal(full.lm_head.weight, cls.from_pretrained(base).lm_head.weight)
