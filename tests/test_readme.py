"""The README's Python blocks run as they stand, in order, on a tiny model in place of the one they name; what it and
benchmarks/README.md say was measured is what the committed results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import plots
from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()
MEASUREMENTS = (ROOT / "benchmarks" / "README.md").read_text()
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
    assert len(BLOCKS) == 7
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


def test_what_was_measured_is_what_the_committed_results_say(monkeypatch, capsys):
    run_script(monkeypatch, ROOT / "benchmarks" / "report.py")
    printed = capsys.readouterr().out
    summary, *tables = (match[0] for match in re.finditer(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", printed, re.S))
    assert summary in README, "python benchmarks/report.py --write"
    assert len(tables) == 2
    assert all(table in MEASUREMENTS for table in tables), "python benchmarks/report.py --write"


def test_plots_show_the_committed_results():
    drawn = {path: make() for path, make in plots.pictures().items()}
    shown = {path for path, picture in drawn.items() if any(panel.lines for panel in picture)}
    assert shown
    for path in shown:
        again = f"python benchmarks/report.py --write: {path.name} is not of the committed results"
        assert plots.digest(drawn[path]) in path.read_text(), again
        assert f"(results/{path.name})" in MEASUREMENTS, again


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_links_and_commands_exist(name):
    document = ROOT / name
    text, makefile = document.read_text(), (ROOT / "Makefile").read_text()
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([\w-]+))?\)", text):
        found = document.parent / target if target else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), anchor
    for command in re.findall(r"^make ([\w-]+)", text, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
