"""Kernels that are started again: the same ones, with the same arguments, as Triton would choose itself.

Nothing runs: the driver that Triton is given compiles for a GPU, and notes what is launched.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"

SCRIPT = """
import json
import torch, triton
from host_time import LaunchingNothingDriver
from oftv2.kernels import cayley, launch, nf4_matmul, rotate, rotate_matmul

def plain(value):
    if isinstance(value, torch.Tensor):  # where in its storage, so that copies of a tensor differ by nothing else
        return [str(value.dtype), list(value.shape), list(value.stride()), value.storage_offset()]
    return [plain(part) for part in value] if isinstance(value, (tuple, list)) else value

def note(metadata, grid, arguments):
    noted.append([metadata.name, metadata.hash, grid, plain(arguments)])

triton.runtime.driver.set_active(LaunchingNothingDriver(90, note))
b, d, n = 16, 64, 48
code, absmax, packed = torch.zeros(16), torch.zeros(n), torch.zeros(n * d // 2, 1, dtype=torch.uint8)

def launches(tokens, dtype, offset):
    x = torch.zeros(tokens * d + offset, dtype=dtype)[offset:].view(tokens, d)
    generators, delta = torch.zeros(d // b, b * (b - 1) // 2), torch.zeros(d // b, b, b)
    rotate.rotate(x, [generators], b, 4)
    rotate.rotate(x, [delta], b)
    rotate.rotate(x, [delta.mT], b)
    if offset:
        return
    rotate.rotate_backward([x, x], x, [delta, delta], b)
    _, (partials,) = rotate.rotate_backward([x], x, [generators], b, 4)
    cayley.cayley_neumann_backward(partials, generators, b, 4)
    rotate_matmul.rotate_matmul(x, delta, torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=dtype))
    rotate_matmul.rotate_matmul(x, delta, torch.zeros(n, d, dtype=dtype))
    nf4_matmul.rotate_matmul_4bit(x, None, packed, absmax, code, (n, d), 64)

class Forgetful(dict):
    def __setitem__(self, key, value):
        pass

def noting():
    noted.clear()
    for tokens in (1, 17):
        for offset in (0, 1):
            launches(tokens, torch.bfloat16, offset)
    return list(noted)

noted, kept = [], launch._started
launch._started = Forgetful()
found = noting()
launch._started = kept
noting()
searches = []
run = triton.runtime.jit.JITFunction.run
triton.runtime.jit.JITFunction.run = lambda self, *args, **options: searches.append(1) or run(self, *args, **options)
print(json.dumps({"found": found, "again": noting(), "searches": len(searches)}))
"""


def without_interpreter(*arguments: object) -> str:
    """What a program printed that compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(BENCHMARKS)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def launches():
    return json.loads(without_interpreter("-c", SCRIPT))


def test_the_same_kernels_get_the_same_arguments(launches):
    assert len(launches["found"]) == 2 * (9 + 3)
    assert launches["again"] == launches["found"]


def test_only_what_is_not_aligned_is_searched_for(launches):
    """Activations that begin in the middle of 16 bytes."""
    assert launches["searches"] == 2 * 3


def test_what_is_kept_is_bounded(monkeypatch):
    from oftv2.kernels import launch

    class Compiled:
        module = "loaded"

    class Kernel:
        arg_names = ("x", "tokens", "WIDTH")

        def __getitem__(self, grid):
            return lambda *args, **constants: Compiled()

    monkeypatch.setattr(launch, "_started", {})
    monkeypatch.setattr(launch, "_MOST", 3)
    kernel, x = Kernel(), torch.zeros(4)
    for tokens in range(5):
        launch.run(kernel, (1,), x, tokens, WIDTH=16, num_warps=4)
        assert len(launch._started) <= 3
    assert all(rest == (16,) for _, rest in launch._started.values())


def test_host_time_is_written_down(tmp_path):
    printed = without_interpreter(BENCHMARKS / "host_time.py", "--rounds", 2, "--out", tmp_path / "host-time")
    rows = json.loads((tmp_path / "host-time.json").read_text())
    assert [row["method"] for row in rows] == ["frozen", "oft", "lora", "peft-oft"] * 4
    assert [row["launches"] for row in rows] == ["stand-in"] * 16
    beyond = {(row["what"], row["dtype"], row["method"]): row.get("beyond_frozen_over_lora") for row in rows}
    for call in itertools.product(("training step", "pass without gradients"), ("bfloat16", "float32")):
        assert beyond[(*call, "frozen")] is None
        assert beyond[(*call, "lora")] == 1
        assert beyond[(*call, "oft")] is not None  # which value depends on what else the processor does
        assert call[0] in printed
    assert (tmp_path / "host-time.csv").read_text().count("\n") == 17
