"""The GPU benchmark on tiny shapes: what it prints, writes and refuses; its figures mean nothing here."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
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


SUITES = """
import os, sys, time
from measure import MissingError

def figures(settings): return [{"what": str(settings.device), "goal": "", "figure": "1", "met": None}]
def missing(settings): raise MissingError("no such package")
def wrong(settings): raise SystemExit("rotate: wrong result")
def crashes(settings): os.abort()
def hangs(settings):
    if os.fork() == 0: time.sleep(600)
    print("so far", file=sys.stderr, flush=True)
    time.sleep(600)
"""


def test_a_suite_that_goes_wrong_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_check

    (tmp_path / "trials.py").write_text(SUITES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {
        name: gpu_check.run_suite(f"trials:{name}", 60, device="cpu", quick=True, isolated=True)
        for name in ("figures", "missing", "wrong", "crashes")
    }
    assert found["figures"] == [{"what": "cpu", "goal": "", "figure": "1", "met": None}]
    assert [(row["what"], row["figure"]) for row in found["missing"]] == [("missing: no such package", "missing")]
    assert [(row["what"], row["figure"]) for row in found["wrong"]] == [("wrong: rotate: wrong result", "FAIL")]
    assert [row["figure"] for row in found["crashes"]] == ["FAIL"]
    before = time.perf_counter()
    (row,) = gpu_check.run_suite("trials:hangs", 5, device="cpu", quick=True, isolated=True)
    assert time.perf_counter() - before < 15
    assert row["what"].endswith("took more than 5 s")
    assert row["figure"] == "FAIL"


TESTS = """
import time, pytest
@pytest.mark.gpu
@pytest.mark.parametrize('i', [0, {}])
def test(i): time.sleep(60 * i)
"""


def test_the_tests_are_cut_off_and_what_they_printed_is_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_check

    files = [tmp_path / "test_hanging.py", tmp_path / "test_quick.py"]
    for path, last in zip(files, (1, 0), strict=True):
        path.write_text(TESTS.format(last))
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--quick')")
    monkeypatch.setattr(gpu_check, "test_files", lambda: [str(path) for path in files])
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts in a third of the time
    row = gpu_check.run_tests(str(tmp_path), tmp_path / "log.txt", 12, quick=False)
    assert row["figure"] == "FAIL"
    assert row["what"].startswith("tests on the device: 2 passed; stopped after 12 s at ")
    assert (tmp_path / "log.txt").read_text().count("PASSED") == 3
    assert not (tmp_path / "log").exists()


def test_quick_tests_are_one_of_each_kind(tmp_path):
    """On a machine with a GPU those marked ``gpu``, and here the same ones in the interpreter."""
    marker, place = ("gpu", "cuda") if torch.cuda.is_available() else ("interpreter", "interpreter")
    found = {}
    for options in ((), ("--quick",)):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marker, *options]
        files = sorted(path for path in Path(__file__).parent.glob("test_kernels*.py"))
        done = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
        found[options] = {line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line}
    every, quick = found.values()
    assert quick < every
    assert len(quick) < len(every) / 3
    assert {name.partition("[")[0] for name in quick} == {name.partition("[")[0] for name in every}
    rotations = {name for name in quick if name.startswith("TestRotate::test_value_and_gradients")}
    dtypes = ("float32", "bfloat16", "float16")
    assert rotations == {
        f"TestRotate::test_value_and_gradients[{place}-(2, 35)-32-96-torch.{dtype}]" for dtype in dtypes
    }


def test_no_suite_starts_when_the_time_is_up(tmp_path):
    import gpu_check

    finished = run("--device", "cpu", "--minutes", "0", "--out", tmp_path / "out", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["figure"] for row in rows} == {"not run"}
    assert len(rows) == len(gpu_check.SUITES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path):
    finished = run(cwd=tmp_path)
    assert finished.returncode != 0
    assert "no CUDA device here" in finished.stderr
