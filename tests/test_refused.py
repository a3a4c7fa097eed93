"""Methods of other libraries that would lose an adapter in silence: diffusers', sentence-transformers', the Hub's."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

import oftv2
from oftv2 import AdapterError, TargetWarning
from small_models import bert, linear


class Denoiser(nn.Module):
    """As a model of diffusers'."""

    def __init__(self):
        super().__init__()
        self.to_q, self.saved, self.fused = nn.Linear(8, 8), [], False

    def save_pretrained(self, folder):
        self.saved.append(folder)

    def fuse_qkv_projections(self):
        self.fused = True


class Container(nn.Module):
    """As a SentenceTransformer: it saves its parts, each by the part's own method."""

    def __init__(self):
        super().__init__()
        self.encoder = bert().bert
        self.dense = linear()

    def save_pretrained(self, folder):
        self.encoder.save_pretrained(folder)


@pytest.mark.parametrize(
    "duplicate", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_methods_that_would_lose_the_adapter_are_refused_until_it_is_off(duplicate):
    model = duplicate(oftv2.wrap_model(Denoiser(), block_size=4))
    with pytest.raises(
        AdapterError, match=r"save_pretrained of this Denoiser is refused .* call oftv2.save_adapter\(model"
    ):
        model.save_pretrained("folder")
    with pytest.raises(AdapterError, match=r"without their rotations: call oftv2.merge\(model\) first$"):
        model.fuse_qkv_projections()
    oftv2.merge(model)
    model.save_pretrained("folder")
    model.fuse_qkv_projections()
    assert model.saved == ["folder"]
    assert model.fused
    assert not [name for name, value in vars(model).items() if callable(value)]


def test_parts_of_a_model_are_not_saved_under_names_that_nothing_finds(tmp_path):
    with pytest.warns(TargetWarning, match=r"its first checkpoint: .*; or wrap model.get_submodule\(\"encoder\"\)"):
        model = oftv2.wrap_model(Container(), block_size=4)
    for part in (model, model.encoder):
        with pytest.raises(AdapterError, match=r'refused .*; or wrap model.get_submodule\("encoder"\), whose save_'):
            part.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    oftv2.unwrap_model(model).save_pretrained(tmp_path)
    oftv2.wrap_model(model.encoder, block_size=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r'the model inside it here: model.get_submodule\("encoder"\)'):
        oftv2.save_adapter(model, tmp_path)
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "adapter_config.json").is_file()


def test_an_adapter_that_comes_later_and_the_inner_model_of_a_transformers_model(tmp_path):
    model = oftv2.wrap_model(Container(), block_size=4, target_modules=["dense.0", "dense.2"])
    model.encoder.save_pretrained(tmp_path / "plain")  # it holds no adapted layer yet
    oftv2.add_adapter(model, "second", block_size=4, target_modules=["query"])
    with pytest.raises(AdapterError, match="of this BertModel is refused"):
        model.encoder.save_pretrained(tmp_path)
    classifier = oftv2.wrap_model(bert(), block_size=4)
    classifier.save_pretrained(tmp_path / "whole")
    with pytest.raises(AdapterError, match=r"of this BertModel is refused .* oftv2.merge\(model\) first$"):
        classifier.bert.save_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["disable_adapters", "load_adapter"])
def test_what_transformers_has_for_pefts_layers_is_refused(method):
    model = oftv2.wrap_model(bert(), block_size=4)
    for part in (model, model.bert):
        with pytest.raises(AdapterError, match=rf"^{method} of this Bert\w+ is refused .*oftv2\.\w+_adapter\(model"):
            getattr(part, method)("folder")
    assert method not in vars(oftv2.unwrap_model(model))
