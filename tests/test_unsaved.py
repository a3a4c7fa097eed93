"""What becomes of a model beside its adapters is not saved with them, and that is said."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from oftv2 import AdapterError, TargetWarning, load_adapter, save_adapter, wrap_model

FIELDS = {"block_size": 16, "target_modules": ("q_proj",)}
IDS = torch.arange(255, 263)[None]


@pytest.fixture
def base(base_folder):
    """Loads the base model from its folder, with more token embeddings if ``rows`` says so."""

    def load(rows=None):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    return load


def test_parameters_that_train_beside_the_adapter(tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), block_size=4, bias="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    model[1].requires_grad_(True)
    with pytest.warns(TargetWarning, match=r"^not saved with the adapter: 1\.weight, which train"):
        save_adapter(model, tmp_path)


def test_resized_embeddings(base, tmp_path):
    names = ["model.embed_tokens", "lm_head"]
    said = re.escape(f"model.embed_tokens and lm_head, resized from 258 to 264 rows, so whoever loads the adapter gets "
                     f"other new rows: modules_to_save={names!r}")  # fmt: skip
    with pytest.warns(TargetWarning, match=said):
        save_adapter(wrap_model(base(264), **FIELDS), tmp_path)
    with pytest.warns(TargetWarning, match="with the adapter: lm_head, resized"):
        save_adapter(wrap_model(base(264), modules_to_save=names[:1], **FIELDS), tmp_path)
    model = wrap_model(base(264), modules_to_save=names, **FIELDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
        assert torch.equal(load_adapter(base(264), tmp_path)(IDS).logits, model.eval()(IDS).logits)
        with pytest.raises(AdapterError, match=r"lm_head.weight: shape \(264, 64\) .*resize_token_embeddings\(264\)"):
            load_adapter(base(), tmp_path)
        model.config._name_or_path = "no such folder"
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}], ids=str)
def test_embeddings_are_resized_before_an_adapter_holds_them(base, fields):
    model = wrap_model(base(), **{**FIELDS, **fields})
    with pytest.raises(AdapterError, match=r"of 258 rows: call resize_token_embeddings\(264\) before wrap"):
        model.resize_token_embeddings(260, pad_to_multiple_of=8)
    model.resize_token_embeddings(257, pad_to_multiple_of=2)
    other = wrap_model(base(), **FIELDS)
    other.resize_token_embeddings(264)
    assert other(IDS).logits.shape == (1, 8, 264)
