"""Models that a file does not fit: one error that lists all that is wrong, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

import conftest
from loading_faults import FIELDS, KEY, build, plain, read, refused, saved_adapter, wrapped
from oftv2 import load_adapter, merge, unwrap_model, wrap_model
from peers import relative
from small_models import answer, bert


@pytest.fixture
def folder(tmp_path):
    return saved_adapter(tmp_path / "adapter")


OTHER = {
    "widths": (plain(sizes=(16, 40, 16)), ["0: ", "(4, 28)", "(2, 28)", "2: ", "(3, 28)", "(5, 28)"]),
    "no-divisor": (plain(sizes=(36, 24, 16)), ["0: saved with block size 8, which does not divide 36 features here"]),
    "fewer-layers": (lambda: build()[:1], ["2: this Sequential has no such module", "4.weight", "4.bias"]),
    "other-kind": (lambda: nn.Sequential(nn.ReLU(), *build()[1:]), ["0: this Sequential has a ReLU there"]),
    "wrapped-sizes": (wrapped(block_size=4), ["0: block_size is 8 in the file, 4 here", "2: block_size is 8"]),
    "wrapped-terms": (wrapped(neumann_terms=2), ["0: terms is 4 in the file, 2 here"]),
    "wrapped-kind": (wrapped(parametrization="cayley"), ["parametrization is 'cayley_neumann' in the file, 'cayley'"]),
    "wrapped-fewer": (wrapped(target_modules=("0",)), ["2: in the file, not adapted in this model"]),
    "wrapped-more": (wrapped(modules_to_save=()), ["4: adapted in this model, not in the file", "4.weight", "4.bias"]),
    "wrapped-name": (wrapped(adapter_name="french"), ["has no adapter 'default'"]),
    "merged": (lambda: merge(wrapped()(), unload=False), ["is merged: call unmerge first"]),
    "layer": (lambda: nn.Linear(32, 24), ["itself a Linear"]),
    "nested": (lambda: nn.Sequential(wrapped()()), ["adapted layers already"]),
    "embedding": (lambda: nn.Sequential(nn.Embedding(24, 32), *build()[1:]), ["0: the base weights differ"]),
}


@pytest.mark.parametrize(("make", "messages"), OTHER.values(), ids=OTHER.keys())
def test_models_that_do_not_fit(make, messages, folder):
    refused(make, folder, *messages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
def test_other_base_weights(wrap, dtype, folder):
    def make():
        model = build(seed=12).to(dtype)
        return wrap_model(model, **FIELDS) if wrap else model

    refused(make, folder, "0: the base weights differ by 1", "2: the base weights differ", "check_base=False")
    model = load_adapter(make(), folder, check_base=False)
    tensors, _ = read(folder)
    assert torch.equal(model[0].generators["default"], tensors[KEY.format(0)])
    load_adapter(wrap_model(build(), **FIELDS).to(dtype), folder)  # the right weights, also rounded


def test_weights_that_were_finetuned_are_other_weights(folder):
    def make():
        model = build()
        with torch.no_grad():
            model[2].weight.mul_(1 + 0.2 * torch.randn_like(model[2].weight))
        return model

    error = refused(make, folder, "2: the base weights differ by ")
    assert "0: " not in error


@pytest.mark.parametrize("fields", [{}, {"parametrization": "cayley"}, {"scale_generators": True}])
def test_the_state_dictionary_of_a_saved_model_that_transformers_read_with_peft(fields, tmp_path):
    """As sentence-transformers' trainers resume, and restore the best checkpoint."""
    ids = torch.arange(6)[None]
    conftest.build(bert).save_pretrained(tmp_path / "base")
    from_pretrained = BertForSequenceClassification.from_pretrained
    model = wrap_model(from_pretrained(tmp_path / "base").eval(), block_size=8, **fields)
    conftest.randomize(model)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "saved")
    saved = nn.Sequential(from_pretrained(tmp_path / "saved")).state_dict()
    assert any(".oft_R." in key for key in saved)  # peft is installed
    again = wrap_model(from_pretrained(tmp_path / "base").eval(), block_size=8, **fields)
    nn.Sequential(again).load_state_dict(saved)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=1e-6, atol=0)
    assert relative(answer(again, ids), answer(model, ids)) < 1e-6
    with pytest.raises(RuntimeError, match=r"Missing key.*generators.default"):
        again.load_state_dict({key: value for key, value in saved.items() if ".oft_R." not in key})
    assert not unwrap_model(again)._load_state_dict_pre_hooks
