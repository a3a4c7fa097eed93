"""``python -m oftv2``: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import peft
import pytest
import safetensors
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from conftest import randomize
from oftv2 import AdapterError, load_adapter, save_adapter, wrap_model
from oftv2.__main__ import main
from oftv2.conversion import save_as_lora
from peers import output, relative

IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
def answer(model, inputs=IDS):
    return output(model.eval()(inputs))


def from_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder)


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


# ---------------------------------------------------------------------------------------------- inspect


def test_inspect_reports_what_it_is_and_how_healthy(saved, capsys):
    folder, _ = saved
    for source in ("adapter", "adapter/adapter_model.safetensors"):
        assert main(["inspect", str(folder / source)]) == 0
        text = capsys.readouterr().out
        assert "written by oftv2" in text
        assert "layers:      14: " in text
        assert "q_proj ×2" in text
        assert "16 ×14" in text
        assert "cayley_neumann, k = 4" in text
        assert "health:      good" in text


HEALTH = {
    "untrained": (0.0, {}, "untrained"),
    "near": (0.23, {}, "near its limit"),
    "diverged": (1.0, {}, "diverged"),
    "exact": (1.0, {"parametrization": "cayley"}, "good"),
    "odd": (0.1, {"neumann_terms": 1}, "far from orthogonal"),
}


@pytest.mark.parametrize(("std", "fields", "verdict"), HEALTH.values(), ids=HEALTH.keys())
def test_inspect_judges_health(std, fields, verdict, tmp_path, capsys):
    model = wrap_model(nn.Sequential(nn.Linear(32, 8)), block_size=8, **fields)
    randomize(model, std=std)
    save_adapter(model, tmp_path, format="oftv2")
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"health:      {verdict}" in capsys.readouterr().out


def test_inspect_reads_pefts_adapters(tmp_path, capsys):
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 8)), peft.OFTConfig(oft_block_size=8, target_modules=["0"], module_dropout=0.1)
    )
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "written by PEFT" in text
    assert "k = 3" in text
    assert "module_dropout=0.1" in text


# ---------------------------------------------------------------------------------------------- convert


def test_convert_to_peft_and_back(saved, capsys):
    folder, wanted = saved
    base, out, back = (str(folder / name) for name in ("base", "peft", "back"))
    assert main(["convert", str(folder / "adapter"), back, "--to", "oftv2", "--base", base]) == 0
    assert "peft_type" not in json.loads((folder / "back" / "adapter_config.json").read_text())
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
    assert "--base" in fails(capsys, *command)
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


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config)


def embedding():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 8), nn.Linear(8, 4))


def conv2d():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, (1, 2)))


LORA = {
    "conv1d": (gpt2, IDS, {"block_size": 8}),
    "conv1d-and-linear": (gpt2, IDS, {"block_size": 8, "modules_to_save": ("lm_head",), "bias": "oft_only"}),
    "embedding": (embedding, IDS, {"block_size": 4, "target_modules": ("0", "1"), "bias": "all"}),
    "modules": (embedding, IDS, {"block_size": 4, "target_modules": ("1",), "modules_to_save": ("2",)}),
    "conv2d": (conv2d, torch.randn(2, 4, 6, 6), {"block_size": 4, "target_modules": ("0", "1")}),
}


@pytest.mark.parametrize(("make", "inputs", "fields"), LORA.values(), ids=LORA.keys())
def test_every_kind_of_layer_as_a_lora(make, inputs, fields, tmp_path):
    model = wrap_model(make(), **fields)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "generators" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    report = save_as_lora(model, tmp_path, rank=64)
    assert all(layer.exact and layer.exact_rank <= 36 for layer in report.values())
    assert relative(answer(from_peft(make(), tmp_path), inputs), answer(model, inputs)) < 1e-5


def test_the_reported_error_is_the_error(tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(32, 24)), block_size=8, target_modules=("0",))
    randomize(model)
    plain = model[0].base_layer.weight.detach().clone()
    (layer,) = save_as_lora(model, tmp_path, rank=5).values()
    loaded = from_peft(nn.Sequential(nn.Linear(32, 24)), tmp_path).base_model.model[0]
    added = (loaded.lora_B["default"].weight @ loaded.lora_A["default"].weight).detach()
    merged = plain @ torch.block_diag(*(model[0].delta().detach() + torch.eye(8))).mT
    missed = torch.linalg.norm(merged - plain - added)
    assert layer.rank == 5
    assert layer.exact_rank == 24
    assert abs(layer.error - missed / torch.linalg.norm(merged - plain)) < 1e-5
    assert abs(layer.weight_error - missed / torch.linalg.norm(plain)) < 1e-5


@pytest.mark.parametrize("sizes", [{}, {"rank": 0}, {"tolerance": 1.0}, {"rank": 2, "tolerance": 0.1}], ids=str)
def test_ranks_that_are_not_allowed(sizes, tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(32, 24)), block_size=8)
    with pytest.raises(AdapterError, match=r"rank|tolerance"):
        save_as_lora(model, tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_grouped_convolutions_have_no_lora(tmp_path):
    model = wrap_model(nn.Sequential(nn.Conv2d(8, 8, 1, groups=2)), block_size=4, target_modules=("0",))
    with pytest.raises(AdapterError, match="0 has groups"):
        save_as_lora(model, tmp_path / "out", rank=4)


# ---------------------------------------------------------------------------------------------- failures


def fails(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_errors_are_one_line_and_exit_code_1(saved, capsys):
    folder, _ = saved
    base = ("--base", folder / "base")
    assert "error: " in fails(capsys, "inspect", folder / "nowhere")
    assert "is not a folder" in fails(capsys, "convert", folder / "nowhere", folder / "out", "--to", "peft", *base)
    missing = fails(capsys, "convert", folder / "adapter", folder / "out", "--to", "peft", "--base", folder / "nowhere")
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
    assert "--force" in fails(capsys, *command)
    assert [file.name for file in (folder / "out").iterdir()] == ["notes.txt"]
    assert main([str(part) for part in (*command, "--force")]) == 0
    assert (folder / "out" / "notes.txt").read_text() == "mine"


def test_what_peft_cannot_hold_is_an_error_when_asked_for(saved, tiny_llama, capsys):
    folder, _ = saved
    model = wrap_model(base_of(folder), block_size=16, neumann_terms=1)
    save_adapter(model, folder / "odd", format="oftv2")
    error = fails(capsys, "convert", folder / "odd", folder / "out", "--to", "peft", "--base", folder / "base")
    assert "neumann_terms=1" in error


@pytest.mark.parametrize("command", ["inspect", "convert", "merge"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"examples:\n  python -m oftv2 {command}" in capsys.readouterr().out


def test_the_command_line_itself(tmp_path):
    for arguments, code, words in (
        (["--help"], 0, "inspect"),
        ([], 2, "usage"),
        (["inspect", str(tmp_path)], 1, "error: "),
    ):
        done = subprocess.run([sys.executable, "-m", "oftv2", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
