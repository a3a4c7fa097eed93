"""Named adapters in one model: merged, unwrapped and deleted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oftv2
from conftest import build, snapshot
from named_adapters import FIRST, alone, output, three, trainable
from oftv2 import AdapterError
from oftv2.base import OFTLayer
from small_models import linear


@pytest.mark.parametrize("names", ["a", "b", ["a", "b"], ["b", "a"], ["c", "a"], None], ids=str)
@pytest.mark.parametrize("unload", [True, False])
def test_merging_some_of_them(names, unload):
    model, wanted = three(), three()
    wanted = output(oftv2.set_adapter(wanted, names or "a"))
    oftv2.merge(model, names, unload=unload)
    torch.testing.assert_close(output(model), wanted, rtol=1e-5, atol=1e-6)
    if unload:
        assert model.state_dict().keys() == linear().state_dict().keys()
        return
    with pytest.raises(AdapterError, match="merged"):
        oftv2.set_adapter(model, "a")
    oftv2.unmerge(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-5, atol=1e-6)
    for name in "abc":
        oftv2.set_adapter(model, name)
        torch.testing.assert_close(output(model), output(alone(name)), rtol=1e-5, atol=1e-6)


def test_merging_what_cannot_be_merged_changes_nothing():
    model = three()
    model[2].generators["b"].data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"2: the generators of 'b' hold NaN"):
        oftv2.merge(model, ["a", "b"])
    with pytest.raises(AdapterError, match="no adapter 'd' in this model; it has 'a', 'b', 'c'"):
        oftv2.merge(model, ["a", "d"])
    assert snapshot(model) == before
    assert oftv2.active_adapters(model) == ["a"]
    oftv2.merge(model, ["a", "c"])  # of which b is no part


@pytest.mark.parametrize("names", ["a", "b", ["a", "b"], ["a", "c"]], ids=str)
def test_unwrapping_restores_the_base(names):
    model, plain = three(), build(linear)
    trained = trainable(plain)
    oftv2.set_adapter(model, names)
    oftv2.unwrap_model(model)
    assert torch.equal(output(model), output(plain))
    assert trainable(model) == trained
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_deleting():
    model = three()
    oftv2.set_adapter(model, "b")
    oftv2.delete_adapter(model, "c")
    assert oftv2.adapter_names(model) == ["a", "b"]
    assert torch.equal(output(model), output(alone("b")))
    oftv2.delete_adapter(model, "a")
    assert type(model[0]) is nn.Linear  # none of the rest adapts it
    assert torch.equal(output(model), output(alone("b")))
    assert trainable(model) == trainable(alone("b"))
    assert not any("_oftv2." in key for key in model.state_dict())
    with pytest.raises(AdapterError, match=r"only adapter of this model: unwrap_model\(model\)"):
        oftv2.delete_adapter(model, "b")
    oftv2.add_adapter(model, "a", **FIRST)
    assert isinstance(model[0], OFTLayer)
    oftv2.unwrap_model(model)
    assert torch.equal(output(model), output(build(linear)))
