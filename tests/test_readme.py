"""The README's Python blocks run as they stand, in order, on a tiny model in place of the one they name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import plots
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def offline(tiny_llama, tmp_path, monkeypatch):
    """Puts a tiny Llama where the README names a model of the hub, and runs in an empty folder."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    original = AutoModelForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, name, **options):
        assert name == "HuggingFaceTB/SmolLM2-135M"
        return original(cls, base, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(from_pretrained))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_python_blocks(offline, capsys):
    assert len(BLOCKS) == 8
    names = {}
    for block in BLOCKS:
        exec(compile(block.replace("max_steps=100", "max_steps=2"), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "trainable params: " in printed
    assert "8192 tokens, 1024 → 4096, b = 32, forward and backward" in printed
    assert Path("adapter/adapter_model.safetensors").is_file()
    assert Path("runs/qoft").is_dir()
    assert type(names["model"].model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert names["model"].model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert names["y"].shape == (8, 128, 4096)
    assert type(names["peft_model"].base_model).__module__ == "oftv2.peft_layers"


def test_measured_section_is_what_the_committed_results_say():
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"<!-- measured -->\n{printed.rstrip()}\n<!-- /measured -->" in README


def test_plots_show_the_committed_results():
    drawn = {path: make() for path, make in plots.pictures().items()}
    shown = {path for path, picture in drawn.items() if any(panel.lines for panel in picture)}
    assert shown
    for path in shown:
        again = f"python benchmarks/report.py --write: {path.name} is not of the committed results"
        assert plots.digest(drawn[path]) in path.read_text(), again
        assert f"(benchmarks/results/{path.name})" in README, again


def test_links_and_commands_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make ([\w-]+)", README, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command
