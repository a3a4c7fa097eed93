"""Every Triton kernel compiles for three GPU generations as users launch it, without spills, and fits."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
import types
from importlib.metadata import version

import pytest

import kernel_binaries
import kernel_resources
from conftest import ROOT

TOOL = ROOT / "benchmarks" / "kernel_resources.py"
COMMITTED = ROOT / "benchmarks" / "results" / "kernel-resources.csv"
# What must hold with every version of Triton; registers and the like may differ between versions.
LASTING = ("case", "target", "kernel", "num_warps")
TARGETS = [80, 90, 100]
USUAL = re.compile(r"^(cayley|.* bf16) .*b=32\b|^nf4 dequantize bf16")

# Kernels that are not as they should be, each in its own way, and one that is.
BAD_CASES = """
import torch, triton, triton.language as tl
from kernel_cases import Case

@triton.jit
def product(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tl.dot(tile, tile))

@triton.jit
def pipelined(x, out, steps, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        tile = x + step * SIZE * SIZE + at
        total = tl.dot(tl.load(tile), tl.load(tile + SIZE), total)
    tl.store(out + at, total)

@triton.jit
def copy(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i))

def launch(kernel, size, dtype, **options):
    def run(device):
        x = torch.empty(size, size, dtype=dtype, device=device)
        kernel[(1,)](x, torch.empty_like(x), SIZE=size, **options)
    return run

def refuse(device):
    raise ValueError("no such block size")

CASES = [
    Case("good", launch(product, 64, torch.bfloat16)),
    Case("spilling", launch(product, 128, torch.bfloat16, num_warps=1)),
    Case("spilling in a loop", launch(pipelined, 128, torch.bfloat16, steps=100, num_stages=2, num_warps=2)),
    Case("large", launch(pipelined, 64, torch.bfloat16, steps=100, num_stages=24)),
    Case("plain", launch(copy, 128, torch.float32)),
    Case("plain by design", launch(copy, 128, torch.float32), plain=("copy",)),
    Case("idle", lambda device: None),
    Case("refused", refuse),
]
"""


def run_tool(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **environment})


def run_program(program: str) -> str:
    """What Python code prints in a process where Triton compiles, and not the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(TOOL.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def committed():
    return read(COMMITTED)


@pytest.fixture(scope="module")
def fresh(committed, tmp_path_factory):
    """Of each kernel one case, as most use it: compiled now, and checked."""
    cases = {row["kernel"]: row["case"] for row in reversed(committed) if USUAL.match(row["case"])}
    out = tmp_path_factory.mktemp("resources") / "fresh"
    done = run_tool("--check", "--only", "^({})$".format("|".join(map(re.escape, cases.values()))), "--out", out)
    assert done.returncode == 0, done.stderr
    return read(out.with_suffix(".csv"))


def test_every_case_fits_and_does_not_spill(fresh, committed):
    for row in fresh + committed:
        assert row["spilled_bytes"] == "0", row
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["shared_bytes"]) <= 1024 * (163 if row["target"] == "sm_80" else 227), row


def test_every_kernel_is_compiled_for_every_target(fresh):
    launched = set()
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        kernels = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
        }
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "run" and call.args}
        launched |= {f"{path.stem}.{name}" for name in names & kernels}
    assert launched
    for target in TARGETS:
        assert {row["kernel"] for row in fresh if row["target"] == f"sm_{target}"} == launched


def test_committed_table_is_this_one(fresh, committed):
    """All of it is about these kernels, and what was compiled now has its figures."""
    listed = run_program(f"""
import kernel_cases, kernel_launches
for case in kernel_cases.CASES:
    for target in {TARGETS}:
        for function, source in kernel_launches.launch_sources(case.launch, target):
            print(case.name, f"sm_{{target}}", kernel_launches.kernel_name(function), source, sep="\t")
""")
    launches = {tuple(line.split("\t")) for line in listed.splitlines()}
    compiled = {(row["case"], row["target"]) for row in fresh}
    rows = [row for row in committed if (row["case"], row["target"]) in compiled]
    made_with = json.loads(COMMITTED.with_suffix(".json").read_text())["versions"]["triton"]
    again = f"python benchmarks/kernel_resources.py --out {COMMITTED.relative_to(ROOT).with_suffix('')}"
    if made_with == version("triton"):
        assert {tuple(row[key] for key in ("case", "target", "kernel", "source")) for row in committed} == launches, (
            again
        )
        assert sorted(rows, key=str) == sorted(fresh, key=str), again

    def lasting(rows):
        return {(*(row[key] for key in LASTING), row["tensor_cores"] == "none") for row in rows}

    assert {(row["case"], row["target"], row["kernel"]) for row in committed} == {launch[:3] for launch in launches}, (
        again
    )
    assert lasting(rows) == lasting(fresh), again


def test_bad_kernels_are_found(tmp_path):
    cases = tmp_path / "bad_cases.py"
    cases.write_text(BAD_CASES)
    # The interpreter would compile nothing: the tool is not to be misled by the variable that turns it on.
    done = run_tool("--cases", cases, "--check", "--targets", 80, "--out", tmp_path / "bad", TRITON_INTERPRET="1")
    assert done.returncode == 1
    found = {line.partition(", sm_")[0].strip() for line in done.stderr.splitlines() if ", sm_" in line}
    assert found == {"spilling", "spilling in a loop", "large", "plain", "idle", "refused"}, done.stderr
    for line in [
        "plain, sm_80, bad_cases.copy: no tensor-core instructions",
        "idle, sm_80: launches no kernel",
        "refused, sm_80: ValueError: no such block size",
    ]:
        assert f"  {line}\n" in done.stderr
    rows = {(row["case"], row["target"]): row for row in read(tmp_path / "bad.csv")}
    assert int(rows["spilling", "sm_80"]["spilled_bytes"]) > 100
    assert int(rows["spilling in a loop", "sm_80"]["spills_in_loops"]) > 10
    assert int(rows["large", "sm_80"]["shared_bytes"]) > 163 * 1024
    assert rows["plain by design", "sm_80"]["tensor_cores"] == "none"


def test_no_product_reads_what_is_overwritten():
    """In the gradient of wide blocks on Hopper, a tile of tokens is read by two products, and Triton's pipeline does
    not wait for the asynchronous one before it loads others into its place: every product is to be waited for."""
    program = """
import re, kernel_cases, kernel_launches
names = [f"rotate backward bf16 b={b}" for b in (64, 128, 256)] + ["rotate backward bf16 b=64 group=3"]
for case in kernel_cases.CASES:
    if case.name in names:
        (_, kernel), = kernel_launches.compile_launches(case.launch, 90)
        waits = re.findall(r"wgmma.wait_group.sync.aligned ([0-9]+)", kernel.asm["ptx"])
        assert waits and set(waits) == {"0"}, (case.name, waits)
        names.remove(case.name)
assert not names
"""
    run_program(program)


def test_tiles_are_loaded_ahead():
    """No step of a loop waits for memory: every load in it is asynchronous, into shared memory, for a later step."""
    run_program("""
import kernel_cases, kernel_launches
names = [f"rotate {what} bf16 b=32" for what in ("forward", "backward", "rows forward", "rows gradient of Δ")]
names += ["rotate segments gradient of Δ bf16 b=32", "rotate backward bf16 b=16", "rotate backward bf16 b=32 group=3"]
names += ["rotate backward bf16 b=32 terms=4", "rotate backward bf16 b=32 without ∂x", "rotate_matmul bf16 b=32 T=64"]
names += ["nf4 dequantize and rotate bf16 b=32 nested", "nf4 product bf16 b=32 T=16 nested"]
for case in kernel_cases.CASES:
    if case.name in names:
        for function, kernel in kernel_launches.compile_launches(case.launch, 90):
            _, loop, steps = kernel.asm["ttgir"].rpartition("scf.for")
            assert not loop or "async_copy_global_to_local" in steps and "tt.load" not in steps, case.name
        names.remove(case.name)
assert not names, names
""")


def test_batches_of_other_lengths_run_the_same_kernels():
    run_program("""
import kernel_launches, torch
from oftv2.kernels import rotate, rotate_rows, rotate_segments

def launch(tokens):
    def run(device):
        x, delta = torch.empty(tokens, 64, device=device).bfloat16(), torch.empty(2, 32, 32, device=device)
        rotate.rotate(x, [delta], 32)
        rotate.rotate_backward([x], x, [delta], 32)
        batch, owners = x.unflatten(0, (-1, tokens)), torch.empty(1, dtype=torch.int64, device=device)
        rotate_rows.rotate_rows(batch, delta[None], owners)
        rotate_rows.rotate_rows_delta_grad(batch, batch, delta[None], owners)
        ends = torch.empty(1, dtype=torch.int32, device=device)
        rotate_segments.rotate_segments(x, delta[None], ends)
        rotate_segments.rotate_segments_delta_grad(x, x, delta[None], ends)
    return run

compiled = [kernel_launches.compile_launches(launch(tokens), 90) for tokens in (512, 333)]
even, odd = ([kernel.hash for _, kernel in launches] for launches in compiled)
assert len(even) == 6 and even == odd
""")


def test_launchers_see_what_they_would_on_the_target():
    """Its multiprocessors; and from tensors without memory comes the same kernel as from ordinary ones."""
    program = """
import kernel_cases, kernel_launches
from oftv2.kernels import rotate

asked = []
kernel_launches.compile_launches(lambda device: asked.append(rotate.multiprocessors(device)), 80)
assert asked == [108], "launchers are to see the target's multiprocessors, not a default"
for name in ("rotate forward bf16 b=32", "cayley backward b=16"):
    case = next(case for case in kernel_cases.CASES if case.name == name)
    meta, real = (kernel_launches.compile_launches(case.launch, 90, device) for device in ("meta", "cpu"))
    assert [kernel.hash for _, kernel in meta] == [kernel.hash for _, kernel in real] != []
"""
    run_program(program)


def test_wrong_arguments_are_refused():
    with pytest.raises(SystemExit, match="'no such case' matches no case"):
        kernel_resources.examine_all(kernel_resources.CASES, "no such case", [90], 1)
    done = run_tool("--targets", 75)
    assert done.returncode != 0
    assert "invalid choice: 75" in done.stderr


def test_without_the_option_it_only_reports(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # put back afterwards
    monkeypatch.setattr(kernel_resources, "examine_all", lambda *_: ([], ["it spills"]))
    monkeypatch.setattr(sys, "argv", [str(TOOL)])
    kernel_resources.main()
    assert "1 problems:\n  it spills" in capsys.readouterr().err


def test_missing_disassembler_is_said(monkeypatch):
    monkeypatch.setattr(kernel_binaries.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace())
    with pytest.raises(SystemExit, match="cuobjdump is neither"):
        kernel_binaries.find_disassemblers()
