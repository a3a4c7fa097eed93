"""``python -m oftv2 convert``: to PEFT's layout, to this library's, to LoRA, and how it fails."""

from __future__ import annotations

import json

import peft
import pytest
import safetensors
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import small_models
from conftest import command_fails, randomize
from oftv2 import load_adapter, save_adapter, wrap_model
from oftv2.__main__ import main
from peers import from_peft, relative

IDS = torch.arange(3, 15).view(2, 6)


def answer(model):
    return small_models.answer(model.eval(), IDS)


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """Folders of a base model and an adapter on it, and what the two answer."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = wrap_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), block_size=16)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path, answer(model)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def test_convert_to_peft_and_back(saved, capsys):
    folder, wanted = saved
    base, out, back = (str(folder / name) for name in ("base", "peft", "back"))
    assert main(["convert", str(folder / "adapter"), back, "--to", "oftv2", "--base", base]) == 0
    assert json.loads((folder / "back" / "adapter_config.json").read_text())["library"] == "oftv2"
    assert main(["convert", back, out, "--to", "peft", "--base", base]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    assert relative(answer(from_peft(base_of(folder), out)), wanted) < 1e-6
    assert torch.equal(answer(load_adapter(base_of(folder), back)), wanted)
    first, second = (folder / name / "adapter_model.safetensors" for name in ("adapter", "peft"))
    with safetensors.safe_open(first, "pt") as one, safetensors.safe_open(second, "pt") as two:
        assert one.metadata()["oftv2"].replace(str(folder), "") == two.metadata()["oftv2"].replace(str(folder), "")
        assert sorted(one.keys()) == sorted(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in sorted(one.keys()))


def test_the_base_that_the_adapter_notes_is_taken_where_none_is_given(saved, capsys):
    folder, wanted = saved
    for kind in (("peft",), ("lora", "--rank", "64")):
        assert main(["convert", str(folder / "adapter"), str(folder / kind[0]), "--to", *kind]) == 0
        assert f"base model, as noted in the adapter: {folder / 'base'}" in capsys.readouterr().err
        assert relative(answer(from_peft(base_of(folder), folder / kind[0])), wanted) < 1e-5
    manifest = save_adapter(wrap_model(nn.Sequential(nn.Linear(32, 8)), block_size=16), folder / "unnamed")
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(manifest), str(folder / "out"), "--to", "peft"])
    assert exit.value.code == 2
    assert "does not note its base model" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_convert_to_oftv2_needs_no_base(saved):
    folder, _ = saved
    base = str(folder / "base")
    with_base, without, again = (folder / name for name in ("with", "without", "again"))
    assert main(["convert", str(folder / "adapter"), str(with_base), "--to", "oftv2", "--base", base]) == 0
    assert main(["convert", str(folder / "adapter"), str(without), "--to", "oftv2"]) == 0
    name = "adapter_model.safetensors"
    with safetensors.safe_open(with_base / name, "pt") as one, safetensors.safe_open(without / name, "pt") as two:
        first, second = (json.loads(file.metadata()["oftv2"]) for file in (one, two))
        assert (first["layout"], first["base"]["sketches"]) == ("oftv2", second["base"]["sketches"])
        assert {**first, "base": None} == {**second, "base": None}
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in sorted(one.keys()))
    theirs = peft.get_peft_model(base_of(folder), peft.OFTConfig(oft_block_size=16, target_modules=["q_proj"]))
    for key, parameter in theirs.named_parameters():
        if "oft_R" in key:
            parameter.data.normal_(std=0.05)
    theirs.save_pretrained(folder / "theirs")
    assert main(["convert", str(folder / "theirs"), str(again), "--to", "oftv2"]) == 0
    assert relative(answer(load_adapter(base_of(folder), again)), answer(theirs)) < 1e-6


def test_parameters_that_peft_saved_need_the_base(saved, capsys):
    folder, _ = saved
    config = peft.OFTConfig(oft_block_size=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(base_of(folder), config).save_pretrained(folder / "theirs")
    command = ("convert", folder / "theirs", folder / "out", "--to", "oftv2")
    assert "--base" in command_fails(capsys, *command)
    assert not (folder / "out").exists()
    assert main([str(part) for part in (*command, "--base", folder / "base")]) == 0


def test_convert_to_lora_at_full_rank_is_the_same_function(saved, capsys):
    folder, wanted = saved
    command = ["convert", str(folder / "adapter"), str(folder / "lora"), "--to", "lora", "--base", str(folder / "base")]
    assert main([*command, "--rank", "64"]) == 0
    captured = capsys.readouterr()
    assert "exact" in captured.out
    assert "14 layers" in captured.out
    assert "14/14" in captured.err  # the progress bar
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 64, 64)
    assert relative(answer(from_peft(base_of(folder), folder / "lora")), wanted) < 1e-5


def test_convert_to_lora_by_tolerance(saved):
    folder, wanted = saved
    command = ["convert", str(folder / "adapter"), str(folder / "lora"), "--to", "lora", "--base", str(folder / "base")]
    distances, ranks = [], []
    for tolerance in ("0.5", "0.1", "0.001"):
        assert main([*command, "--tolerance", tolerance, "--force"]) == 0
        ranks.append(json.loads((folder / "lora" / "adapter_config.json").read_text())["r"])
        distances.append(relative(answer(from_peft(base_of(folder), folder / "lora")), wanted))
    assert ranks == sorted(set(ranks))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


def test_errors_are_one_line_and_exit_code_1(saved, capsys):
    folder, _ = saved
    base = ("--base", folder / "base")
    assert "error: " in command_fails(capsys, "inspect", folder / "nowhere")
    assert "is not a folder" in command_fails(
        capsys, "convert", folder / "nowhere", folder / "out", "--to", "peft", *base
    )
    missing = command_fails(
        capsys, "convert", folder / "adapter", folder / "out", "--to", "peft", "--base", folder / "nowhere"
    )
    assert "cannot be loaded" in missing
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "lora", "--base", "base"), "needs --rank"),
        (("--to", "peft", "--base", "base", "--rank", "4"), "takes no --rank"),
        (("--to", "gguf"), "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_2(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_without_force(saved, capsys):
    folder, _ = saved
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    command = ("convert", folder / "adapter", folder / "out", "--to", "peft", "--base", folder / "base")
    assert "--force" in command_fails(capsys, *command)
    assert [file.name for file in (folder / "out").iterdir()] == ["notes.txt"]
    assert main([str(part) for part in (*command, "--force")]) == 0
    assert (folder / "out" / "notes.txt").read_text() == "mine"


def test_what_peft_cannot_hold_is_an_error_when_asked_for(saved, capsys):
    folder, _ = saved
    model = wrap_model(base_of(folder), block_size=16, neumann_terms=1)
    save_adapter(model, folder / "odd", format="oftv2")
    error = command_fails(capsys, "convert", folder / "odd", folder / "out", "--to", "peft", "--base", folder / "base")
    assert "neumann_terms=1" in error
