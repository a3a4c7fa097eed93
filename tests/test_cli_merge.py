"""``python -m oftv2 merge``: its results, opened by plain transformers, and how it fails, stops and goes on."""

from __future__ import annotations

import json

import huggingface_hub.constants
import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import oftv2
from conftest import perturb
from merged_checkpoints import (
    SMALL,
    assert_same_state,
    base_and_adapter,
    llama_model,
    make_adapter,
    make_base,
    merged_in_memory,
    run,
)
from oftv2 import load_adapter, save_adapter, wrap_model
from oftv2.safetensors_stream import TensorFile
from peers import output, relative

IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
def answer(model):
    return output(model.eval()(IDS))


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


# ---------------------------------------------------------------------------------------------- heads, classes, PEFT


@pytest.fixture
def saved(tmp_path):
    return base_and_adapter(tmp_path)


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


# ---------------------------------------------------------------------------------------------- dtypes, other files


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_dtype(stored, wanted, tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    cls = make_base(llama_model(), stored, base)
    make_adapter(cls, base, adapter, {"block_size": 16})
    assert run(base, adapter, out, "--dtype", wanted) == 0
    wide = oftv2.merge(load_adapter(cls.from_pretrained(base, dtype=torch.float32), adapter))
    merged = cls.from_pretrained(out, dtype="auto")
    assert merged.dtype == getattr(torch, wanted)
    assert_same_state(merged, wide.to(getattr(torch, wanted)))  # rounded once
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {getattr(torch, wanted)}  # noqa: SIM118
        assert file.metadata()["format"] == "pt"


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-in-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("size", ["1GB", "20KB"])
@pytest.mark.parametrize("quantization", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_base_that_bitsandbytes_quantized_becomes_a_16_bit_model(quantization, size, tmp_path, capsys):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    cls = make_base(llama_model(intermediate_size=192), torch.bfloat16, tmp_path / "original")
    config = transformers.BitsAndBytesConfig(**quantization)
    model = cls.from_pretrained(tmp_path / "original", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size=size)
    make_adapter(cls, base, adapter, {"block_size": 16})
    assert run(base, adapter, out) == 0
    assert "the base is quantized; the merged model is not" in capsys.readouterr().err
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged = cls.from_pretrained(out, dtype="auto")
    expected = oftv2.merge(load_adapter(cls.from_pretrained(base), adapter), dtype=torch.bfloat16)
    assert {value.dtype for value in merged.state_dict().values()} == {torch.bfloat16}
    assert_same_state(merged, expected)
    assert relative(answer(merged), answer(load_adapter(cls.from_pretrained(base), adapter))) < 0.05


def test_everything_else_in_the_base_comes_along(saved, capsys):
    base = saved / "base"
    kept = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "generation_config.json": '{"max_length": 7}',
        "modeling_own.py": "x = 1",
        "LICENSE": "free",
    }
    left = ["pytorch_model.bin", "optimizer.pt", "adapter_config.json", ".git/HEAD", "onnx/model.onnx", "README.md"]
    for name in (*kept, *left):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(kept.get(name, "---\nlicense: mit\ntags: [x]\n---\n# Base\n"))
    assert run(base, saved / "adapter", saved / "out") == 0
    said = capsys.readouterr()
    assert f"written to {saved / 'out'}" in said.out
    assert "merging: 100%" in said.err
    assert "not copied" in said.err
    assert all(name.split("/")[0] in said.err for name in left)
    found = {str(path.relative_to(saved / "out")) for path in (saved / "out").rglob("*") if path.is_file()}
    weights = {path.name for path in base.glob("model*")}
    assert found == {*kept, *weights, "config.json", "README.md"}
    assert all((saved / "out" / name).read_text() == text for name, text in kept.items())
    card = (saved / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "14 layers" in card
    assert list(saved.glob(".*")) == []


def test_a_model_of_the_hub_from_the_cache(saved, monkeypatch):
    repo = saved / "cache" / "models--someone--model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (saved / "base").rename(repo / "blobs")
    snapshot.mkdir()
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(saved / "cache"))
    assert run("someone/model", saved / "adapter", saved / "out") == 0
    assert "base_model: someone/model" in (saved / "out" / "README.md").read_text()
    assert not any(path.is_symlink() for path in (saved / "out").iterdir())
    expected = merged_in_memory(AutoModelForCausalLM, snapshot, saved / "adapter")
    assert_same_state(AutoModelForCausalLM.from_pretrained(saved / "out"), expected)
