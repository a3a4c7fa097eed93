"""Kernels that are started again: the same ones, with the same arguments, as Triton would choose itself.

Nothing runs: the driver that Triton is given compiles for a GPU, and notes what is launched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json
import torch, triton
from kernel_resources import CompileOnlyDriver
from oftv2.kernels import cayley, launch, nf4_matmul, rotate, rotate_matmul

class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *arguments):
        return ("module", "function", 32, 0, 1024)

    def unload_module(self, module):
        pass

def plain(value):
    if isinstance(value, torch.Tensor):  # where in its storage, so that copies of a tensor differ by nothing else
        return [str(value.dtype), list(value.shape), list(value.stride()), value.storage_offset()]
    return [plain(part) for part in value] if isinstance(value, (tuple, list)) else value

class NotingDriver(CompileOnlyDriver):
    utils = Utilities()

    def launcher_cls(self, source, metadata):
        def note(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            noted.append([metadata.name, metadata.hash, [x, y, z], list(plain(arguments))])

        return note

triton.runtime.driver.set_active(NotingDriver(90))
b, d, n = 16, 64, 48
code, absmax, packed = torch.zeros(16), torch.zeros(n), torch.zeros(n * d // 2, 1, dtype=torch.uint8)

def launches(tokens, dtype, offset):
    x = torch.zeros(tokens * d + offset, dtype=dtype)[offset:].view(tokens, d)
    generators, delta = torch.zeros(d // b, b * (b - 1) // 2), torch.zeros(d // b, b, b)
    rotate.rotate(x, [generators], b, 4)
    rotate.rotate(x, [delta], b)
    rotate.rotate(x, [delta.mT], b)
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


@pytest.fixture(scope="module")
def launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.join(os.path.dirname(__file__), os.pardir, "benchmarks")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_kernels_get_the_same_arguments(launches):
    assert len(launches["found"]) == 4 * 9
    assert launches["again"] == launches["found"]


def test_only_what_is_not_aligned_is_searched_for(launches):
    """Half of the launches begin in the middle of 16 bytes of activations; the transform's gradient reads none."""
    assert launches["searches"] == 2 * 8


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
