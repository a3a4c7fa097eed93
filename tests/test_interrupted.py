"""What Ctrl-C or a lack of memory leaves of a model: what it was, or a way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oftv2
from conftest import randomize, snapshot
from oftv2 import AdapterError, OFTLayer, TargetWarning
from trainer_runs import IDS


@pytest.fixture
def stop_at(monkeypatch):
    """Has the n-th call of a method of adapted layers end in a KeyboardInterrupt; later ones do not."""

    def stop(method: str, n: int) -> None:
        original, calls = getattr(OFTLayer, method), iter(range(1, 1000))

        def stopped(layer, *args, **options):
            if next(calls) == n:
                raise KeyboardInterrupt
            return original(layer, *args, **options)

        monkeypatch.setattr(OFTLayer, method, stopped)

    return stop


def with_head(make) -> nn.Module:
    model = oftv2.wrap_model(make(), block_size=16, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    randomize(model)
    return model


def test_wrapping(tiny_llama, stop_at):
    model = tiny_llama()
    before = snapshot(model)
    stop_at("reset_parameters", 3)
    with pytest.raises(KeyboardInterrupt):
        oftv2.wrap_model(model, block_size=16, modules_to_save=["lm_head"])
    assert snapshot(model) == before
    oftv2.wrap_model(model, block_size=16)


def test_adding(tiny_llama, stop_at):
    model = with_head(tiny_llama)
    before = snapshot(model)
    stop_at("reset_parameters", 5)
    with pytest.raises(KeyboardInterrupt):
        oftv2.add_adapter(model, "other", block_size=16, modules_to_save=["norm"], init="normal")
    assert snapshot(model) == before
    assert oftv2.adapter_names(model) == ["default"]
    oftv2.add_adapter(model, "other", block_size=16)


def test_merging(tiny_llama, stop_at, tmp_path):
    model = with_head(tiny_llama)
    expected = model(IDS).logits
    stop_at("merged_base", 3)
    with pytest.raises(KeyboardInterrupt):
        oftv2.merge(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match=r"2 layers .* are merged: call unmerge first"):
        oftv2.merge(model)
    oftv2.save_adapter(oftv2.unmerge(model), tmp_path)
    torch.testing.assert_close(oftv2.merge(model)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_exchanging_what_trains_in_full(tiny_llama, monkeypatch):
    model = with_head(tiny_llama)
    oftv2.add_adapter(model, "other", block_size=16, modules_to_save=["lm_head"])
    before = snapshot(model)
    monkeypatch.setattr("oftv2.trained._place", lambda *_: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="memory"):
        oftv2.set_adapter(model, "other")
    monkeypatch.undo()
    assert snapshot(model) == before
    oftv2.set_adapter(model, "other")
    oftv2.set_adapter(model, "default")
    assert snapshot(model)["values"] == before["values"]


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    before = snapshot(model)
    with pytest.raises(TargetWarning):
        oftv2.wrap_model(model, block_size=8)
    assert snapshot(model) == before
