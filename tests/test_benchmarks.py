"""The benchmarks' own machinery, and every suite on tiny sizes: what it says, not how fast anything is."""

from __future__ import annotations

import ast
import csv
import json
import re
import subprocess
import sys
import time

import pytest
import suite_rows
import torch
from torch import nn

import measure
import methods
import oftv1
import run
from conftest import ROOT, assert_close, randomize
from correctness import check
from measure import in_fresh_process
from methods import METHODS, Sizes, linear, on_layer
from oftv2 import OFTConfig, OFTLinear
from options import Options

CPU = torch.device("cpu")
ABOUT = {"device": "this one", "commit": "none"}


@pytest.mark.parametrize(("d", "n", "b"), [(12, 7, 4), (30, 18, 6), (16, 16, 16)])
def test_oftv1_is_the_layer_with_the_exact_cayley_transform(d: int, n: int, b: int) -> None:
    base = nn.Linear(d, n).double()
    x = torch.randn(3, 5, d, dtype=torch.float64)
    old = oftv1.OFTv1Linear(linear(base.weight.data, base.bias.data), b).double()
    new = OFTLinear(
        linear(base.weight.data, base.bias.data), OFTConfig(block_size=b, parametrization="cayley")
    ).double()
    assert torch.equal(old(x), base(x))
    randomize(old, 0.3)
    new.generators["default"].data.copy_(old.generators.data)
    results = []
    for layer, generators in ((old, old.generators), (new, new.generators["default"])):
        own = x.clone().requires_grad_()
        y = layer(own)
        results.append((y, *torch.autograd.grad((y**3).sum(), (own, generators))))
    for name, a, b in zip(("output", "input gradient", "generators' gradient"), *results, strict=True):
        assert_close(name, a, b, 1e-12)


def test_oftv1_refuses_a_block_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="block size 5 does not divide 12 inputs"):
        oftv1.OFTv1Linear(nn.Linear(12, 4), 5)


def test_oftv1_leaves_the_output_head(tiny_llama) -> None:
    model = oftv1.wrap(tiny_llama(), 16)
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(module, oftv1.OFTv1Linear) for module in model.modules()) == 14
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 14
    assert all(name.endswith("generators") for name in trained)


def test_rounds_are_interleaved_in_alternating_order() -> None:
    calls: list[str] = []
    runs = {name: lambda round_, name=name: calls.append(f"{name}{round_}") for name in "abc"}
    samples = measure.interleave(runs, CPU, rounds=3, warmup=1)
    assert calls == ["c0", "b0", "a0", "a1", "b1", "c1", "c2", "b2", "a2", "a3", "b3", "c3"]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}
    slow = {"slow": lambda round_: time.sleep(0.02)}
    (taken,) = measure.interleave(slow, CPU, rounds=50, seconds=0.01, least=4, warmup=0).values()
    assert len(taken) == 4
    assert all(0.02 <= seconds < 0.5 for seconds in taken)
    short = [0]
    (taken,) = measure.interleave({"": lambda _: short.append(0)}, CPU, rounds=2, warmup=1, calibrate=True).values()
    assert len(short) > 1000  # repeated within a sample
    assert max(taken) < 1e-3  # and divided by the repetitions


def test_ratios_are_paired_round_by_round() -> None:
    samples = {"oft": [2.0, 30.0, 4.0], "lora": [1.0, 10.0, 1.0]}
    row = measure.timings(samples, "oft", {"over_lora": "lora", "over_frozen": "frozen"})
    assert row == {
        **{"ms": 4000.0, "ms_q1": 3000.0, "ms_q3": 17000.0, "rounds": 3},
        **{"over_lora": 3.0, "over_lora_q1": 2.5, "over_lora_q3": 3.5},
    }


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    with measure.saved_bytes(layer) as kept:
        y = layer(x).sigmoid()  # keeps its output
        z = y * y.view(20).view(5, 4)  # and this its factors, which are it again
    assert sum(kept.values()) == y.numel() * 4
    del z
    layer.weight.requires_grad_(True)
    with measure.saved_bytes(layer) as kept:
        layer(x)
    assert sum(kept.values()) == x.numel() * 4


def allocate(mebibytes: int) -> tuple[int, int]:
    """Peak and present memory of a process that allocated and freed."""
    before = measure.memory(CPU, peak=False)
    torch.ones(mebibytes, 2**20, dtype=torch.uint8)
    return measure.memory(CPU, peak=True) - before, measure.memory(CPU, peak=False) - before


def test_peak_memory_is_of_a_fresh_process(monkeypatch) -> None:
    torch.ones(400, 2**20, dtype=torch.uint8)  # of this process, and none of the other's
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    peak, after = in_fresh_process("test_benchmarks:allocate", mebibytes=100)
    assert 100 <= peak / 2**20 < 150
    assert after / 2**20 < 50
    with pytest.raises(RuntimeError, match="no_such_function"):
        in_fresh_process("measure:no_such_function")


def layer_and_inputs(name: str, tokens: int = 40) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    weight, bias = torch.randn(24, 64) / 8, torch.randn(24)
    layer = on_layer(name, linear(weight.clone(), bias.clone()), Sizes(block_size=16, rank=4)).train()
    return layer, (weight, bias, torch.randn(tokens, 64), torch.randn(tokens, 24))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.nf4])
def test_a_wrong_layer_is_not_timed(name: str) -> None:
    layer, (weight, *rest) = layer_and_inputs(name)
    sizes = Sizes(block_size=16, rank=4)
    assert check(name, layer, weight, *rest, sizes) < 1e-6
    with pytest.raises(SystemExit, match=f"{name}: wrong result, relative error .* nothing timed"):
        check(name, layer, weight * 1.01, *rest, sizes)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_what_it_says(name: str) -> None:
    import models

    model = models.load("tiny", torch.device("cpu"), torch.float32, nf4=METHODS[name].nf4)
    model = methods.attach(name, model, Sizes(block_size=16, rank=4))
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    marks = {"frozen": None, "full": "weight", "lora": "lora_", "qlora": "lora_", "dora": "lora_"}
    mark = marks.get(
        name.removesuffix("-nf4").removesuffix("-16bit"), "oft_R" if name.startswith("peft") else "generators"
    )
    assert bool(trained) == (mark is not None)
    assert all(mark in path for path in trained)


class TestResults:
    def test_rows_are_replaced_by_group_and_method(self, tmp_path) -> None:
        results = run.Results(tmp_path / "folder" / "layer-cpu")
        results.add([{"group": "a", "method": "oft", "ms": 1.0}, {"group": "a", "method": "lora", "ms": 2.0}])
        results.add([{"group": "a", "method": "oft", "ms": 3.0, "note": "x, y"}])
        again = run.Results(tmp_path / "folder" / "layer-cpu")
        assert [(row["method"], row["ms"]) for row in again.rows] == [("lora", 2.0), ("oft", 3.0)]
        assert again.done(None) == {"a"}
        assert again.done(("oft", "dora")) == set()
        with open(tmp_path / "folder" / "layer-cpu.csv", newline="") as file:
            assert list(csv.DictReader(file))[1] == {"group": "a", "method": "oft", "ms": "3.0", "note": "x, y"}

    def test_table_states_what_is_the_same_once(self) -> None:
        rows = [{"group": g, "method": "oft", "tokens": 7, "ms": 1.5, "ms_q1": 1.0, "ms_q3": 2.0} for g in "ab"]
        stated, head, _, first, _ = run.table(rows).splitlines()
        assert stated == "tokens 7, ms 1.5"
        assert head.split() == ["group", "method"]
        rows[1]["ms"] = 2.5
        assert "1.5 [1, 2]" in run.table(rows)
        assert first.split() == ["a", "oft"]


def quick(suite: str, tmp_path, **fields) -> list[dict]:
    options = Options(quick=True, model="tiny", rounds=2, **fields)
    rows = run.run(suite, options, run.Results(tmp_path / f"{suite}-cpu"), ABOUT)
    assert json.loads((tmp_path / f"{suite}-cpu.json").read_text()) == rows
    return rows


FIGURES = {
    "layer": {"ms", "over_frozen", "trainable", "error"},
    "kernels": {"ms", "over_copy", "of_copy"},
    "step": {"ms", "tokens_per_second", "over_frozen", "over_lora", "trainable"},
    "decode": {"ms", "over_frozen", "over_lora", "merged"},
    "merge": {"ms", "over_lora", "logit_error"},
    "wrap": {"ms", "over_lora", "trainable"},
}


@pytest.mark.parametrize("suite", FIGURES)
def test_suites_run_and_give_their_figures(suite: str, tmp_path) -> None:
    rows = quick(suite, tmp_path)
    for row in rows:
        assert {"suite", "group", "method", "seed", "run", "device", "commit"} | FIGURES[suite] - {
            "over_lora"
        } <= row.keys()
        assert "missing" not in row
        assert row["ms_q1"] <= row["ms"] <= row["ms_q3"]
    named = {row["method"] for row in rows}
    if suite != "kernels":
        assert {"oft", "qoft", "lora", "qlora", "peft-oft", "peft-qoft"} <= named
        lora = [row for row in rows if row["method"] in ("lora", "qlora") and not row.get("merged")]
        assert {row["over_lora"] for row in lora} == {1}
    # All groups are there: nothing is measured twice.
    done = {row["group"] for row in rows}
    assert list(run.find(suite)(Options(quick=True, model="tiny", rounds=2, done=done))) == []


def test_memory_is_measured_in_fresh_processes(tmp_path) -> None:
    rows = quick("memory", tmp_path, methods=("oft",))
    assert [row["method"] for row in rows] == ["frozen", "oft"]
    frozen, oft = rows
    assert 0 < frozen["saved_bytes"] < oft["saved_bytes"]
    assert all(row["peak_bytes"] > 0 and row["imports_bytes"] > 2**26 for row in rows)
    assert oft["trainable"] == 15872


@pytest.mark.parametrize("suite", ["layer", "step", "decode", "merge", "wrap"])
def test_a_missing_peer_is_reported(suite: str, tmp_path, monkeypatch) -> None:
    def require(*packages: str) -> None:
        if "peft" in packages:
            raise measure.MissingError("peft is not installed")

    monkeypatch.setattr(methods, "require", require)
    rows = quick(suite, tmp_path, methods=("oft", "lora"), only="^(?!1 x)")
    missing = [row for row in rows if "missing" in row]
    assert missing
    assert {row["method"] for row in missing} == {"lora"}
    assert {row["missing"] for row in missing} == {"peft is not installed"}
    measured = [row for row in rows if "missing" not in row]
    assert {row["method"] for row in measured} - {"frozen"} == {"oft"}
    assert not any("over_lora" in row for row in measured)


def test_benchmark_on_tiny_sizes() -> None:
    """The suite ``rows``."""
    rows = list(suite_rows.measure(Options(quick=True, rounds=2, only="layer.* 8 adapters")))
    assert [row["method"] for row in rows] == ["frozen", "one adapter", "rows", "rows, anew", "one by one"] * 2
    for row in rows:
        assert row["ms_q1"] <= row["ms"] <= row["ms_q3"]
        assert row["error"] < 1e-5
        assert row["generator_bytes"] == 8 * 2 * (32 * 31 // 2) * 4
        assert row["kept_delta_bytes"] == 8 * 2 * 32 * 32 * 4
    assert in_fresh_process("suite_rows:memory_growth", count=64, told=Options(quick=True).to_json()) > 2**20


def test_experts_beside_peft(tmp_path) -> None:
    peft_oft, frozen, oft, lora = quick("experts", tmp_path)
    assert [row["method"] for row in (peft_oft, frozen, oft, lora)] == ["peft-oft", "frozen", "oft", "lora"]
    assert oft["trainable"] == 4 * (64 + 32) * 31 // 2
    assert lora["trainable"] == 4 * 16 * (64 + 64 + 32 + 64)
    assert frozen["saved_bytes"] < oft["saved_bytes"] < lora["saved_bytes"]
    assert oft["error"] < 1e-5
    assert frozen["over_frozen"] == lora["over_lora"] == 1
    assert peft_oft["missing"] == "PEFT's OFT takes no stacked weights"


def test_where_results_cannot_be_written_nothing_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "layer", "--quick", "--out", "/dev/null/results"])
    with pytest.raises(SystemExit, match=r"error: no results can be written: .*name another folder with --out"):
        run.main()


def test_the_command(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
    done = subprocess.run(
        [*command, "layer", "--quick", "--methods", "oft", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the figures mean little" in done.stdout
    rows = json.loads((tmp_path / "layer-cpu.json").read_text())
    assert {row["method"] for row in rows} == {"frozen", "oft"}
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["seed"] == 0
        assert "cores" in row["device"]
        assert row["commit"]
    done = subprocess.run([*command, "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no suite speed; there are layer, kernels, step" in done.stderr


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "oftv2"])
def test_text_is_utf8_whatever_the_locale(folder: str) -> None:
    opens = re.compile(r"\b(read_text|write_text|(?<!os\.)open)$")
    for path in sorted((ROOT / folder).glob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        for call in (call for call in calls if opens.search(ast.unparse(call.func))):
            binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in call.args)
            assert binary or any(option.arg == "encoding" for option in call.keywords), f"{path}:{call.lineno}"
