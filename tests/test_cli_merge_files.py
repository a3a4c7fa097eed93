"""``python -m oftv2 merge``: dtypes, quantized bases, and the other files of a model."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM

import oftv2
from conftest import perturb
from merged_checkpoints import answer, assert_same_state, llama_model, make_adapter, make_base, merged_in_memory, run
from oftv2 import load_adapter, save_adapter, wrap_model
from peers import relative
from trainer_runs import load


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
def test_a_base_that_bitsandbytes_quantized_becomes_a_16_bit_model(quantization, size, tmp_path, capsys, monkeypatch):
    if size == "20KB":
        monkeypatch.setattr(oftv2.merging, "_VALUES", 1000)  # no multiple of a quantized block
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


def test_an_adapter_of_a_quantized_base_says_what_that_means(on_disk, capsys):
    """Sketches of quantized weights are compared loosely: merging into the 16-bit original is common."""
    model = load(on_disk / "base", nf4=True)
    save_adapter(perturb(wrap_model(model, block_size=16)), on_disk / "quantized")
    assert run(on_disk / "base", on_disk / "quantized", on_disk / "out") == 0
    assert "trained on a quantized base" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(on_disk / "out")
    assert_same_state(merged, merged_in_memory(AutoModelForCausalLM, on_disk / "base", on_disk / "quantized"))


def test_everything_else_in_the_base_comes_along(on_disk, capsys):
    base = on_disk / "base"
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
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": None}))  # as some say of plain ones
    assert run(base, on_disk / "adapter", on_disk / "out") == 0
    said = capsys.readouterr()
    assert f"written to {on_disk / 'out'}" in said.out
    assert "merging: 100%" in said.err
    assert "not copied" in said.err
    assert all(name.split("/")[0] in said.err for name in left)
    found = {str(path.relative_to(on_disk / "out")) for path in (on_disk / "out").rglob("*") if path.is_file()}
    weights = {path.name for path in base.glob("model*")}
    assert found == {*kept, *weights, "config.json", "README.md"}
    assert all((on_disk / "out" / name).read_text() == text for name, text in kept.items())
    card = (on_disk / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "14 layers" in card
    assert list(on_disk.glob(".*")) == []


def test_a_model_of_the_hub_from_the_cache(on_disk, monkeypatch):
    repo = on_disk / "cache" / "models--someone--model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (on_disk / "base").rename(repo / "blobs")
    snapshot.mkdir()
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(on_disk / "cache"))
    assert run("someone/model", on_disk / "adapter", on_disk / "out") == 0
    assert "base_model: someone/model" in (on_disk / "out" / "README.md").read_text()
    assert not any(path.is_symlink() for path in (on_disk / "out").iterdir())
    expected = merged_in_memory(AutoModelForCausalLM, snapshot, on_disk / "adapter")
    assert_same_state(AutoModelForCausalLM.from_pretrained(on_disk / "out"), expected)
