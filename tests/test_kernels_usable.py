"""Where Triton's kernels cannot be used, plain torch is, and a warning says why."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import oftv2
from oftv2 import KernelWarning
from oftv2 import functional as F
from oftv2.kernels import usable

CACHES = usable.usable, usable._rotates, usable._transforms


class Kernel:
    """Takes a launch, or fails as Triton does."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.grids = error, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self

    def __call__(self, *args) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A device of compute capability 9.0, where the first kernel is the one that this sets."""
    from oftv2.kernels import tiles

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for cache in CACHES:
        cache.cache_clear()
    yield lambda kernel: monkeypatch.setattr(tiles, "nothing", kernel)
    for cache in CACHES:
        cache.cache_clear()


def test_a_kernel_that_starts_is_started_once(on_a_gpu):
    on_a_gpu(kernel := Kernel())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable.usable(torch.device("cuda"))
        assert F.runs_kernels(torch.device("cuda"))
    assert kernel.grids == [(1,)]


def test_one_that_does_not_is_a_warning_and_plain_torch(on_a_gpu):
    on_a_gpu(kernel := Kernel(RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")))
    with pytest.warns(KernelWarning, match=r"do not start on cuda.*plain torch.*RuntimeError: Failed to find C comp"):
        assert not F.runs_kernels(torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable.usable(torch.device("cuda"))
    assert kernel.grids == [(1,)]


@pytest.mark.parametrize("reason", ["out of memory", "operation not permitted when stream is capturing"])
def test_what_passes_is_no_answer(on_a_gpu, reason):
    on_a_gpu(Kernel(RuntimeError(f"Triton Error [CUDA]: {reason}")))
    for asked in (usable.usable, lambda device: usable._rotates(device, torch.float32, 32, 1, 0)):
        with pytest.raises(RuntimeError, match=reason):
            asked(torch.device("cuda"))
    on_a_gpu(Kernel())
    assert usable.usable(torch.device("cuda"))
    assert usable._rotates(torch.device("cuda"), torch.float32, 32, 1, 0)


def test_they_can_be_turned_off(on_a_gpu, monkeypatch):
    on_a_gpu(kernel := Kernel())
    monkeypatch.setenv("OFTV2_KERNELS", "0")
    assert not usable.usable(torch.device("cuda"))
    assert kernel.grids == []


def test_other_values_are_refused(on_a_gpu, monkeypatch):
    monkeypatch.setenv("OFTV2_KERNELS", "off")
    with pytest.raises(ValueError, match="OFTV2_KERNELS='off' is not allowed: use 0"):
        usable.usable(torch.device("cuda"))


def test_older_gpus_are_not_tried(on_a_gpu, monkeypatch):
    on_a_gpu(kernel := Kernel())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not usable.usable(torch.device("cuda"))
    assert kernel.grids == []


def test_layers_work_with_kernels_turned_off(device, monkeypatch):
    """Registered or not: what is registered hands on to plain torch."""
    layer = oftv2.OFTLinear(torch.nn.Linear(64, 48).to(device), oftv2.OFTConfig(block_size=16))
    torch.nn.init.normal_(layer.generators["default"], std=0.1)
    x = torch.randn(5, 64, device=device)
    expected = layer(x)
    monkeypatch.setenv("OFTV2_KERNELS", "0")
    for cache in CACHES:
        cache.cache_clear()
    try:
        for y in (layer(x), layer.eval()(x)):
            torch.testing.assert_close(y, expected)
    finally:
        monkeypatch.undo()
        for cache in CACHES:
            cache.cache_clear()
