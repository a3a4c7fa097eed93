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


class Towers(nn.Module):
    """Two parts that share nothing."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24)) for _ in range(2))

    def forward(self, x):
        return self.left(x), self.right(x)


def towers(model_class=Towers, **fields):
    torch.manual_seed(0)
    model = oftv2.wrap_model(model_class(), **{"block_size": 8, **fields}).train()
    randomize(model, 0.1)
    return model


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "fields", [{}, {"block_share": True}, {"scale_generators": True}, {"constraint": 0.1}], ids=str
)
def test_parts_with_losses_of_their_own(fields):
    model, x = towers(**fields), torch.randn(5, 24)
    expected = towers(**fields)
    sum(y.square().sum() for y in expected(x)).backward()
    for y in model(x):
        y.square().sum().backward()
    for name, gradient in gradients_of(expected).items():
        assert_close(name, gradients_of(model)[name], gradient, 1e-6)


def test_a_backward_pass_within_the_forward_pass():
    class Chunks(Towers):
        def forward(self, x):
            for part in x.chunk(3):
                for y in super().forward(part):
                    y.square().sum().backward()

    model, expected, x = towers(Chunks), towers(), torch.randn(9, 24)
    model(x)
    sum(y.square().sum() for y in expected(x)).backward()
    for name, gradient in gradients_of(expected).items():
        assert_close(name, gradients_of(model)[name], gradient, 1e-5)


def test_hooks_of_generators_are_not_called_where_nothing_is_used():
    model, seen = towers(), []
    model.left[0].generators["default"].register_hook(lambda grad: seen.append("left") or grad.clamp(-1, 1))
    model.right[0].generators["default"].register_hook(lambda grad: seen.append("right") or grad.clamp(-1, 1))
    model.right[2].generators["default"].register_post_accumulate_grad_hook(lambda packed: seen.append("last"))
    model(torch.randn(5, 24))[0].sum().backward()
    assert seen == ["left"]
    assert model.right[0].generators["default"].grad is model.right[2].generators["default"].grad is None


@pytest.mark.parametrize("change", [oftv2.set_adapter, oftv2.hotswap_adapter])
def test_adapters_changed_within_a_pass(change, tmp_path):
    class Changing(Towers):
        def forward(self, x):
            y, _ = super().forward(x)
            change(self, other, **options)
            return y, super().forward(x)[0]

    model, x = towers(Changing), torch.randn(5, 24)
    oftv2.add_adapter(model, "other", block_size=8)
    randomize(model, 0.1)
    oftv2.save_adapter(model, tmp_path, adapter_name="other")
    other, options = ("other", {}) if change is oftv2.set_adapter else (tmp_path, {"adapter_name": "default"})
    first = model.left(x)
    y, changed = model(x)
    assert_close("before", y, first, 1e-6)
    assert_close("after", changed, model.left(x), 1e-6)
    assert not torch.allclose(y, changed, atol=0.01)


def interrupt(module, args):
    raise KeyboardInterrupt


def test_nothing_is_left_of_an_interrupted_pass():
    model, x = towers(), torch.randn(5, 24)
    hook = model.right.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    model.train()
    for parameter in gradients_of(model):
        model.get_parameter(parameter).data.mul_(-2)
    alone = copy.deepcopy(model)
    assert_close("y", model.left(x), alone.left(x), 1e-6)


def test_generators_written_to_before_the_backward_pass_are_refused():
    model = towers()
    loss = model(torch.randn(5, 24))[0].sum()
    with torch.no_grad():
        model.left[0].generators["default"].add_(1)
    with pytest.raises(RuntimeError, match="written to between"):
        loss.backward()


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
