"""``python -m oftv2 merge``: stopped, resumed, refused, and in little memory."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
    conversion_mapping,
)
from transformers.core_model_loading import Transpose, WeightConverter

import oftv2.checkpoint_merge
from conftest import perturb
from merged_checkpoints import (
    assert_same_state,
    base_and_adapter,
    fails,
    llama_model,
    make_adapter,
    make_base,
    merged_in_memory,
    run,
)
from oftv2 import save_adapter, wrap_model
from oftv2.safetensors_stream import Entry, write_tensors
from oftv2.work_folder import WorkFolder

# ---------------------------------------------------------------------------------------------- stopping and going on


@pytest.fixture
def saved(tmp_path):
    return base_and_adapter(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(monkeypatch, files):
    """The next merge is interrupted in the middle of a file, with so many files complete."""
    original, calls = oftv2.checkpoint_merge.merged_tensor, []

    def stopping(base, adapter, piece):
        calls.append(piece)
        done = len(list((base.folder.parent / ".out.partial").glob("*.safetensors")))
        if done == files and calls:
            raise KeyboardInterrupt
        return original(base, adapter, piece)

    monkeypatch.setattr(oftv2.checkpoint_merge, "merged_tensor", stopping)


@pytest.fixture
def stopped(saved, monkeypatch):
    """A merge that was stopped with two files complete, and what it would have come to."""
    assert run(saved / "base", saved / "adapter", saved / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(saved / "base", saved / "adapter", saved / "out") == 130
    assert not (saved / "out").exists()
    partial = saved / ".out.partial"
    assert len(list(partial.glob("*.safetensors"))) == 2
    return saved, partial, contents(saved / "whole")


def merges(monkeypatch):
    """Counts the tensors that are rotated."""
    original, done = oftv2.checkpoint_merge.merged_tensor, []
    monkeypatch.setattr(
        oftv2.checkpoint_merge, "merged_tensor", lambda *parts: (done.append(parts), original(*parts))[1]
    )
    return done


def test_a_stopped_merge_goes_on_after_the_last_complete_file(stopped, monkeypatch):
    folder, partial, whole = stopped
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    done = merges(monkeypatch)
    assert run(folder / "base", folder / "adapter", folder / "out") == 0
    assert 0 < len(done) < 14
    assert all((folder / "out" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert contents(folder / "out") == whole
    assert not partial.exists()


CHANGES = {
    "adapter": lambda folder: make_adapter(
        AutoModelForCausalLM, folder / "base", folder / "adapter", {"block_size": 8}
    ),
    "dtype": lambda folder: ["--dtype", "bfloat16"],
    "base": lambda folder: os.utime(next((folder / "base").glob("*.safetensors"))),
    "config": lambda folder: (folder / "base" / "config.json").write_text(
        (folder / "base" / "config.json").read_text().replace('"pad_token_id": 0', '"pad_token_id": 1')
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_work_on_anything_else_is_not_taken_up(change, stopped, monkeypatch):
    folder, _, _ = stopped
    options = change(folder) or []
    done = merges(monkeypatch)
    assert (
        run(folder / "base", folder / "adapter", folder / "out", *(options if isinstance(options, list) else [])) == 0
    )
    assert len(done) >= 14


def test_killed_and_resumed_gives_the_same_bytes(saved):
    assert run(saved / "base", saved / "adapter", saved / "whole") == 0
    program = """
import os, signal, sys
from oftv2 import checkpoint_merge
from oftv2.__main__ import main
original, files = checkpoint_merge.write_tensors, []
def write_tensors(path, entries, metadata, pieces, progress):
    def kill(size):
        if len(files) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    original(path, entries, metadata, pieces, kill)
    files.append(path)
checkpoint_merge.write_tensors = write_tensors
main(["merge", *sys.argv[1:]])
"""
    arguments = [str(saved / name) for name in ("base", "adapter", "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=saved)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (saved / "out").exists()
    assert len(list((saved / ".out.partial").glob("*.safetensors"))) == 2
    assert len(list((saved / ".out.partial").glob("*.begun"))) == 1
    assert run(*arguments) == 0
    assert contents(saved / "out") == contents(saved / "whole")


def test_two_merges_into_one_folder(saved, capsys):
    with WorkFolder(saved / "out", {}):
        assert "another process" in fails(capsys, saved / "base", saved / "adapter", saved / "out")
    assert run(saved / "base", saved / "adapter", saved / "out") == 0


def test_force_replaces_a_model_only_when_the_new_one_is_complete(saved, capsys, monkeypatch):
    shutil.copytree(saved / "base", saved / "out")
    (saved / "out" / "old.txt").write_text("old")
    before = contents(saved / "out")
    command = (saved / "base", saved / "adapter", saved / "out")
    assert "--force" in fails(capsys, *command)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(*command, "--force") == 130
    assert contents(saved / "out") == before
    assert run(*command, "--force") == 0
    assert not (saved / "out" / "old.txt").exists()
    expected = merged_in_memory(AutoModelForCausalLM, saved / "base", saved / "adapter")
    assert_same_state(AutoModelForCausalLM.from_pretrained(saved / "out"), expected)
    assert list(saved.glob(".*")) == []


def test_an_empty_folder_needs_no_force(saved):
    (saved / "out").mkdir()
    assert run(saved / "base", saved / "adapter", saved / "out") == 0
    assert (saved / "out" / "config.json").is_file()


# ---------------------------------------------------------------------------------------------- refused


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
def test_refused_before_anything_is_written(damage, words, saved, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    damage(saved)
    error = fails(capsys, saved / "base", saved / "adapter", saved / "out")
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error
    assert {path.name for path in saved.iterdir()} <= {"base", "adapter"}


def test_other_base_weights_on_request(saved):
    other_base(saved)
    assert run(saved / "base", saved / "adapter", saved / "out", "--no-check-base") == 0


def test_weights_that_transformers_converts_are_refused(saved, monkeypatch, capsys):
    """As if the checkpoint held transposed matrices under the names that the model has too."""
    converter = WeightConverter(r"self_attn\.o_proj\.weight", r"self_attn.o_proj.weight", operations=[Transpose(0, 1)])
    original = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda kind: [copy.deepcopy(converter)] if kind == "llama" else original(kind),
    )
    error = fails(capsys, saved / "base", saved / "adapter", saved / "out")
    assert "layers.1.self_attn.o_proj.weight is not in the checkpoint under a name of its own" in error
    assert "q_proj" not in error
    assert not (saved / "out").exists()


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
def test_force_replaces_nothing_but_models(out, words, saved, capsys):
    (saved / "notes").mkdir()
    (saved / "notes" / "mine.txt").write_text("mine")
    before = sorted(saved.rglob("*"))
    assert words in fails(capsys, saved / "base", saved / "adapter", saved / out, "--force")
    assert sorted(saved.rglob("*")) == before


def test_a_full_disk_is_found_before_writing(saved, capsys, monkeypatch):
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "are needed" in fails(capsys, saved / "base", saved / "adapter", saved / "out")
    assert not (saved / "out").exists()


def test_an_adapter_of_a_quantized_base_says_what_that_means(saved, capsys):
    """Sketches of quantized weights are compared loosely: merging into the 16-bit original is common."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(saved / "base", quantization_config=quantization)
    save_adapter(perturb(wrap_model(model, block_size=16)), saved / "quantized")
    assert run(saved / "base", saved / "quantized", saved / "out") == 0
    assert "trained on a quantized base" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(saved / "out")
    assert_same_state(merged, merged_in_memory(AutoModelForCausalLM, saved / "base", saved / "quantized"))


# ---------------------------------------------------------------------------------------------- memory

MEMORY = """
import re, sys
from oftv2.__main__ import main
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
folder = sys.argv[1]
assert main(["merge", *(f"{folder}/{name}" for name in ("base", "adapter", "small"))]) == 0  # imports everything
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = status("VmRSS")
assert main(["merge", *(f"{folder}/{name}" for name in ("large", "large-adapter", "out"))]) == 0
print("peak", status("VmHWM") - before)
"""


def test_memory_is_for_the_largest_tensor_and_not_for_a_file(saved):
    """One file of 400 MB of tensors of 20 MB: beside a tensor and its rotated copy, a piece of it in float32.

    Three to four tensors' worth as measured; what the allocator and the page cache keep beside them differs by machine.
    """
    hidden, inner, layers = 1600, 6400, 5
    fields = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": inner}
    base, adapter = saved / "large", saved / "large-adapter"
    base.mkdir()
    adapter.mkdir()
    config = json.loads((saved / "base" / "config.json").read_text())
    config |= {**fields, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 100, "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    entries = {name: Entry.of(torch.bfloat16, tuple(value.shape)) for name, value in model.state_dict().items()}
    piece = bytes(1 << 20)
    write_tensors(
        base / "model.safetensors",
        entries,
        {"format": "pt"},
        lambda key: (
            piece[: min(len(piece), entries[key].size - at)] for at in range(0, entries[key].size, len(piece))
        ),
    )
    assert sum(entry.size for entry in entries.values()) > 400e6
    assert max(entry.size for entry in entries.values()) == 2 * hidden * inner
    generators = {
        f"base_model.model.{name.removesuffix('.weight')}.oft_R.weight": 0.01 * torch.randn(value.shape[1] // 32, 496)
        for name, value in model.state_dict().items()
        if "_proj" in name
    }
    safetensors.torch.save_file(generators, adapter / "adapter_model.safetensors")
    description = {"peft_type": "OFT", "peft_version": "0.21.2", "oft_block_size": 32, "r": 0}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**description, "target_modules": ["q_proj"], "num_cayley_neumann_terms": 6})
    )
    done = subprocess.run([sys.executable, "-c", MEMORY, str(saved)], capture_output=True, text=True, cwd=saved)
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout.split()[-1])
    own = sum(tensor.numel() * 4 for tensor in generators.values()) / 2**20
    largest = 2 * hidden * inner / 2**20
    assert peak < own + 6 * largest
