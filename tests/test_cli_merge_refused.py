"""``python -m oftv2 merge``: what is refused before anything is written."""

from __future__ import annotations

import copy
import json
import shutil

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from merged_checkpoints import fails, llama_model, make_adapter, make_base, run


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def bitten(path):
    path.write_bytes(path.read_bytes()[:-4])


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def renamed_weight(folder):
    """A base whose first projection is under a name that the model does not have."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    state = model.state_dict()
    state["model.layers.0.self_attn.odd.weight"] = state.pop("model.layers.0.self_attn.q_proj.weight")
    replace_weights(folder / "base", state)


def replace_weights(base, state):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    safetensors.torch.save_file(dict(state), base / "model.safetensors", metadata={"format": "pt"})


def only_bin(folder):
    for path in (folder / "base").glob("*.safetensors*"):
        path.unlink()
    (folder / "base" / "pytorch_model.bin").write_bytes(b"x")


def other_base(folder):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder / "base").config)
    shutil.rmtree(folder / "base")
    model.save_pretrained(folder / "base")


def nan(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def shards(folder):
    return sorted((folder / "base").glob("*.safetensors"))


def config_with(**fields):
    return lambda folder: edit(folder / "base" / "config.json", lambda config: {**config, **fields})


REFUSED = {
    "no base": (lambda folder: shutil.rmtree(folder / "base"), "base is not a folder"),
    "base is an adapter": (
        lambda folder: (shutil.rmtree(folder / "base"), shutil.copytree(folder / "adapter", folder / "base")),
        "an adapter's folder",
    ),
    "no adapter": (lambda folder: shutil.rmtree(folder / "adapter"), "adapter is not a folder"),
    "bin": (only_bin, "Convert it once"),
    "truncated": (lambda folder: bitten(shards(folder)[0]), "truncated"),
    "no header": (lambda folder: shards(folder)[1].write_bytes(b"123"), "truncated"),
    "shard missing": (lambda folder: shards(folder)[1].unlink(), "lacks model-00002"),
    "index": (
        lambda folder: edit(
            folder / "base" / "model.safetensors.index.json",
            lambda index: {**index, "weight_map": without(index["weight_map"], "lm_head.weight")},
        ),
        "disagree",
    ),
    "config": (lambda folder: (folder / "base" / "config.json").write_text("{"), "cannot be read"),
    "quantized": (config_with(quantization_config={"quant_method": "gptq"}), "quantized (gptq)"),
    "own code": (config_with(model_type="odd", auto_map={"AutoConfig": "odd.Odd"}), "none of transformers' own"),
    "another model": (
        config_with(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "trained on a LlamaForCausalLM",
    ),
    "smaller": (config_with(hidden_size=32), "does not fit"),
    "shape": (config_with(num_key_value_heads=4), "has shape (32, 64) in the checkpoint"),
    "name": (renamed_weight, "q_proj.weight is not in the checkpoint"),
    "weights": (other_base, "--no-check-base"),
    "nan": (nan, "NaN or Inf"),
}


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_written(damage, words, on_disk, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    damage(on_disk)
    error = fails(capsys, on_disk / "base", on_disk / "adapter", on_disk / "out")
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error
    assert {path.name for path in on_disk.iterdir()} <= {"base", "adapter"}


def test_other_base_weights_on_request(on_disk):
    other_base(on_disk)
    assert run(on_disk / "base", on_disk / "adapter", on_disk / "out", "--no-check-base") == 0


def test_weights_that_transformers_converts_are_refused(on_disk, monkeypatch, capsys):
    """As if the checkpoint held transposed matrices under the names that the model has too."""
    converter = WeightConverter(r"self_attn\.o_proj\.weight", r"self_attn.o_proj.weight", operations=[Transpose(0, 1)])
    original = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: [copy.deepcopy(converter)] if kind == "llama" else original(kind),
    )
    error = fails(capsys, on_disk / "base", on_disk / "adapter", on_disk / "out")
    assert "layers.1.self_attn.o_proj.weight is not in the checkpoint under a name of its own" in error
    assert "q_proj" not in error
    assert not (on_disk / "out").exists()


def test_a_tied_weight_stored_twice_with_different_values(tmp_path, capsys):
    base = tmp_path / "base"
    cls = make_base(llama_model(tie_word_embeddings=True), torch.float32, base)
    make_adapter(cls, base, tmp_path / "adapter", {"block_size": 16, "target_modules": ("lm_head",)})
    state = cls.from_pretrained(base).state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    replace_weights(base, state)
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    state["lm_head.weight"] += 1
    replace_weights(base, state)
    assert "differ in the checkpoint" in fails(capsys, base, tmp_path / "adapter", tmp_path / "other")


def test_weights_that_cannot_be_untied(tmp_path, capsys):
    """T5 scales what goes into its head by whether the configuration says that the head is tied."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "base")
    for name, target in (("head", "lm_head"), ("body", "q")):
        fields = {"block_size": 8, "target_modules": (target,)}
        make_adapter(T5ForConditionalGeneration, tmp_path / "base", tmp_path / name, fields)
    assert "Leave the adapter unmerged" in fails(capsys, tmp_path / "base", tmp_path / "head", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "base", tmp_path / "body", tmp_path / "out") == 0


FOLDERS = {
    "the base": ("base", "which is needed"),
    "around the base": (".", "which is needed"),
    "no model": ("notes", "is no model's folder"),
    "a file": ("base/config.json", "is a file or a link"),
}


@pytest.mark.parametrize(("out", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_force_replaces_nothing_but_models(out, words, on_disk, capsys):
    (on_disk / "notes").mkdir()
    (on_disk / "notes" / "mine.txt").write_text("mine")
    before = sorted(on_disk.rglob("*"))
    assert words in fails(capsys, on_disk / "base", on_disk / "adapter", on_disk / out, "--force")
    assert sorted(on_disk.rglob("*")) == before


def test_a_full_disk_is_found_before_writing(on_disk, capsys, monkeypatch):
    usage = shutil.disk_usage(on_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "are needed" in fails(capsys, on_disk / "base", on_disk / "adapter", on_disk / "out")
    assert not (on_disk / "out").exists()
