"""An adapter that is in the weights already is not put into them twice, however little it changes them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import oftv2
from conftest import randomize
from merged_checkpoints import assert_same_state, fails, merged_in_memory, run
from oftv2 import AdapterError, load_adapter, save_adapter, wrap_model

FIELD = "oftv2_merged"


def small_adapter(base, folder, seed=3, **options):
    """One that changes the weights by less than any check of them could tell."""
    model = wrap_model(AutoModelForCausalLM.from_pretrained(base), block_size=16, **options)
    randomize(model, std=1e-4, seed=seed)
    save_adapter(model, folder)
    return model


@pytest.fixture
def small(on_disk):
    """A base with a small adapter merged into it on disk."""
    small_adapter(on_disk / "base", on_disk / "small")
    assert run(on_disk / "base", on_disk / "small", on_disk / "merged") == 0
    return on_disk


def noted(folder):
    return json.loads((folder / "config.json").read_text())[FIELD]


def test_a_second_merge_on_disk_is_refused(small, capsys):
    error = fails(capsys, small / "merged", small / "small", small / "twice")
    assert "this very adapter is merged into these weights already" in error
    assert "--no-check-base merges it all the same" in error
    assert not (small / "twice").exists()
    assert run(small / "merged", small / "small", small / "twice", "--no-check-base") == 0
    assert noted(small / "twice") == 2 * noted(small / "merged")


def test_loading_into_the_merged_model_is_refused(small):
    model = AutoModelForCausalLM.from_pretrained(small / "merged")
    with pytest.raises(AdapterError, match="check_base=False loads it all the same"):
        load_adapter(model, small / "small")
    load_adapter(model, small / "small", check_base=False)


def test_merged_in_memory_is_noted_alike(small):
    model = merged_in_memory(AutoModelForCausalLM, small / "base", small / "small")
    with pytest.raises(AdapterError, match="merged into these weights already"):
        load_adapter(model, small / "small")
    model.save_pretrained(small / "saved")
    assert noted(small / "saved") == noted(small / "merged")
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(small / "merged"))


@pytest.mark.parametrize("fields", [{}, {"scale_generators": True}, {"block_share": True}], ids=str)
def test_merged_right_after_training_and_as_peft_reads_it(on_disk, fields, capsys):
    oftv2.merge(small_adapter(on_disk / "base", on_disk / "small", **fields)).save_pretrained(on_disk / "merged")
    assert "merged into these weights" in fails(capsys, on_disk / "merged", on_disk / "small", on_disk / "twice")


def test_other_adapters_go_on_top_and_survive_other_saves(small, capsys):
    small_adapter(small / "merged", small / "next", seed=4)
    assert run(small / "merged", small / "next", small / "both") == 0
    AutoModelForCausalLM.from_pretrained(small / "both", dtype=torch.bfloat16).save_pretrained(small / "again")
    assert len(set(noted(small / "again"))) == 2
    for name in ("small", "next"):
        assert "merged into these weights" in fails(capsys, small / "again", small / name, small / "twice")


def test_several_adapters_in_one_merge(on_disk):
    for seed, name in enumerate(("one", "two")):
        small_adapter(on_disk / "base", on_disk / name, seed)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(on_disk / "base"), on_disk / "one", adapter_name="one")
    load_adapter(model, on_disk / "two", adapter_name="two")
    oftv2.merge(model, ["one", "two"])
    for name in ("one", "two"):
        with pytest.raises(AdapterError, match="merged into these weights already"):
            load_adapter(model, on_disk / name)


def test_what_is_taken_out_again_is_not_noted(on_disk):
    model = small_adapter(on_disk / "base", on_disk / "small")
    oftv2.unmerge(oftv2.merge(model, unload=False))
    oftv2.unwrap_model(model)
    assert not hasattr(model.config, FIELD)
    load_adapter(model, on_disk / "small")


def test_an_untrained_adapter_and_a_plain_model(on_disk, tmp_path):
    untrained = wrap_model(AutoModelForCausalLM.from_pretrained(on_disk / "base"), block_size=16)
    save_adapter(untrained, on_disk / "untrained")
    load_adapter(oftv2.merge(untrained), on_disk / "untrained")
    plain = wrap_model(nn.Sequential(nn.Linear(8, 8)), block_size=4)
    save_adapter(plain, tmp_path / "plain")
    load_adapter(oftv2.merge(plain), tmp_path / "plain")
