"""The tuning script on tiny sizes, in Triton's interpreter: what it tries, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_tune.py"


def run(*options, **environment):
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--device", *options]
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}, check=False)


def test_settings_are_tried_and_written_down(tmp_path):
    out = tmp_path / "tuning.json"
    only = "rotate forward b=32 group|nf4 b=64|matmul b=128 T=16"
    finished = run("cpu", "--only", only, "--out", out, TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert [kernel["kernel"] for kernel in found["kernels"]] == [
        "rotate forward b=32 group=2",
        "nf4 b=64",
        "rotate_matmul b=128 T=16",
    ]
    for kernel in found["kernels"]:
        assert len(kernel["best"]) == kernel["tried"] - 1 > 0
        assert kernel["shipped_us"] > 0
        assert all(setting["us"] > 0 for setting in kernel["best"])
    # Wider tiles than a rotation of two takes are left out, and said to be.
    assert "rotate forward b=32 group=2: 1 of 4 settings left out: ValueError" in finished.stderr


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["cpu"], {}, "set TRITON_INTERPRET=1"),
        (["cpu", "--only", "nothing"], {"TRITON_INTERPRET": "1"}, "matches no kernel"),
        pytest.param(
            ["cuda"], {}, "no CUDA device here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is")
        ),
    ],
)
def test_refusals(options, environment, words):
    finished = run(*options, **environment)
    assert finished.returncode != 0
    assert words in finished.stderr


def test_candidates_compile_for_a_gpu_they_would_run_on():
    code = "import gpu_tune; print([gpu_tune.compiled(name, place, 90) for name, place in {}])"
    tried = [("rotate forward b=32", 60), ("rotate backward b=16", 200), ("nf4 b=32", 5)]
    finished = subprocess.run(
        [sys.executable, "-c", code.format(tried)],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        check=False,
    )
    assert finished.stdout.strip() == "['', '', '']", finished.stderr
