"""The GPU benchmark on tiny shapes: what it prints, writes and refuses; its figures mean nothing here."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


def run(*options, cwd):
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=cwd, check=False)


def test_every_suite_runs_and_is_written_down(tmp_path):
    finished = run("--device", "cpu", "--skip-tests", "--out", tmp_path / "out", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "the figures mean nothing" in finished.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert "cores" in written["machine"]["device"]
    what = "\n".join(row["what"] for row in written["rows"])
    for part in (
        "rotate: two runs, equal bits",
        "rotate forward, of a copy's speed",
        "rotate backward, of the bound of its bytes",
        "decoder layer, tiny: oft over lora",
        "decoder layer, tiny: qoft over peft-qoft",
        "decoding 16 tokens, tiny down (128 -> 64): qoft over frozen-nf4",
        "saved for backward by q, k and v",
        "step of tiny, bf16, 2 x 16: oft over lora",
        "step of tiny, NF4, 2 x 16, checkpointing: qoft over qlora",
    ):
        assert part in what
    with open(tmp_path / "out.csv", newline="") as file:
        assert [row["what"] for row in csv.DictReader(file)] == [row["what"] for row in written["rows"]]
    # What only a CUDA device can tell is reported, not left out.
    missing = [row for row in written["rows"] if row["figure"] == "missing"]
    assert [row["what"].split(":")[0] for row in missing] == ["nf4_kernels", "launches"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path):
    finished = run(cwd=tmp_path)
    assert finished.returncode != 0
    assert "no CUDA device here" in finished.stderr
