"""Δ of all layers made together as a forward pass begins: what layers get, for how long, and when they do not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oftv2
from conftest import assert_close, graph_nodes, randomize, record_calls
from oftv2 import OFTLayer, together


class Block(nn.Module):
    """Layers of different sizes, one of which is not always used, in a checkpoint or not."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.sometimes = nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 24)
        self.reentrant: bool | None = None
        self.skip = True
        self.seen: list[bool] = []

    def part(self, x):
        self.seen.append(isinstance(self.first, OFTLayer) and self.first._in_hand() is not None)
        return self.second(self.first(x).tanh())

    def forward(self, x):
        x = self.part(x) if self.reentrant is None else checkpoint(self.part, x, use_reentrant=self.reentrant)
        return x if self.skip else self.sometimes(x)


def wrapped(**fields):
    torch.manual_seed(0)
    model = oftv2.wrap_model(Block(), **{"block_size": 8, **fields}).train()
    randomize(model, 0.1)
    return model


def passed(model, call=None, *, seed=1):
    """Output, and gradients by name, of a pass."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = (call or model)(torch.randn(5, 24, generator=torch.Generator().manual_seed(3)))
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def alone(model, **options):
    """The same, each layer for itself."""
    apart = copy.deepcopy(model)
    together.remove_pass_hooks(apart)
    assert not apart._forward_hooks
    return passed(apart, **options)


def assert_same(one, other):
    assert_close("output", one[0], other[0], 1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert (gradient is None) == (other[1][name] is None), name
        if gradient is not None:
            assert_close(name, gradient, other[1][name], 1e-6)


def transforms(out):
    """The nodes of the graph that made Δ."""
    return [name for name in graph_nodes(out) if name == "TransformBackward"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_size_pattern": {"first": 4}},
        {"block_share": True},
        {"scale_generators": True, "constraint": 0.5},
        {"parametrization": "cayley"},
        {"dropout": 0.5},
        {"neumann_terms": 3},
    ],
    ids=str,
)
def test_it_is_what_each_layer_would_make(fields):
    model = wrapped(**fields)
    for model.skip in (True, False):
        assert_same(passed(model), alone(model))


def test_one_node_for_each_block_size():
    model = wrapped(block_size_pattern={"second": 4})
    model.skip = False
    assert len(transforms(model(torch.randn(5, 24)))) == 2
    together.remove_pass_hooks(model)
    assert len(transforms(model(torch.randn(5, 24)))) == 3


def test_layers_that_are_not_used_have_no_gradient():
    model = wrapped()
    _, gradients = passed(model)
    assert gradients.pop("sometimes.generators.default") is None
    assert all(gradient.any() for gradient in gradients.values())


def test_nothing_is_left_after_a_pass_or_a_failure():
    model = wrapped()
    passed(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 23))
    assert model.seen == [True, True]
    assert all(layer.handed is None for layer in model.modules() if isinstance(layer, OFTLayer))
    assert not together._SERVED


def test_values_written_past_the_version_counter_are_seen():
    model = wrapped()
    passed(model)
    for name, parameter in model.named_parameters():
        if "generators" in name:
            parameter.data.mul_(-2)
    assert_same(passed(model), alone(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_make_their_own(reentrant):
    model = wrapped()
    expected = passed(model)
    model.reentrant = reentrant
    assert_same(passed(model), expected)
    model.reentrant = None
    assert_same(passed(model, lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)), expected)
    assert model.seen == [True, False, False, False, False]


def test_transformers_says_when_it_checkpoints(tiny_llama, monkeypatch):
    model = oftv2.wrap_model(tiny_llama(), block_size=16).train()
    served = record_calls(monkeypatch, {together.Transform: ["apply"]})
    ids = torch.randint(128, (2, 8))
    model(ids, labels=ids).loss.backward()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert len(served) == 1 + 14 * 2  # a pass; then each layer, and again in the recomputation


def test_not_where_nothing_trains():
    model = wrapped()
    with torch.no_grad():
        model(torch.randn(5, 24))
    model.eval()
    model.requires_grad_(False)
    model(torch.randn(5, 24))
    oftv2.merge(model, unload=False)
    model.train()(torch.randn(5, 24))
    assert model.seen == [False] * 3


def test_several_adapters_disabled_ones_and_rows():
    model = wrapped()
    oftv2.add_adapter(model, "other", block_size=4)
    randomize(model, 0.1)
    x = torch.randn(5, 24)
    oftv2.set_adapter(model, ["default", "other"])
    model(x).sum().backward()
    with oftv2.disable_adapter(model):
        model(x)
    with oftv2.adapters_per_row(model, ["default", "other", None, "other", "default"]):
        model(x)
    oftv2.set_adapter(model, "other")
    model(x).sum().backward()
    assert model.seen == [False, False, False, True]


def test_copies_pickles_and_plain_models():
    model = wrapped()
    expected = passed(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.seen.clear()
        assert_same(passed(other), expected)
        assert other.seen == [True]
    oftv2.unwrap_model(model)
    assert not [*model._forward_hooks, *model._forward_pre_hooks, *model._forward_hooks_always_called]


def test_other_processes_exchange_gradients_layer_by_layer(monkeypatch):
    model = wrapped()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    passed(model)
    assert model.seen == [False]
