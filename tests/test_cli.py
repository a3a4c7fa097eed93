"""``python -m oftv2``: what ``inspect`` prints, the help, and the command line itself."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import peft
import pytest
from torch import nn

from conftest import randomize
from oftv2 import save_adapter, wrap_model
from oftv2.__main__ import main


def test_inspect_reports_what_it_is_and_how_healthy(tiny_llama, tmp_path, capsys, monkeypatch):
    model = wrap_model(tiny_llama(), block_size=16)
    randomize(model)
    save_adapter(model, tmp_path)
    with monkeypatch.context() as patch:  # of a terminal without ×
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(["inspect", str(tmp_path)]) == 0
    for source in ("", "adapter_model.safetensors"):
        assert main(["inspect", str(tmp_path / source)]) == 0
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


@pytest.mark.parametrize("command", ["inspect", "convert", "merge"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"examples:\n  python -m oftv2 {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code", "words"), [(["--help"], 0, "inspect"), ([], 2, "usage")])
def test_how_it_is_used(arguments, code, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err


def test_the_command_line_itself(tmp_path):
    command = [sys.executable, "-m", "oftv2", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_ends_it_without_a_word(tmp_path):
    save_adapter(wrap_model(nn.Sequential(nn.Linear(64, 16))), tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as pipe:
        command = [sys.executable, "-m", "oftv2", "inspect", str(tmp_path)]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
