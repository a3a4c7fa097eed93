"""How operators are called: what autograd, modes, transforms and captured graphs make of their results."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp
from torch.utils.flop_counter import FlopCounterMode

from conftest import OperatorCounter, assert_close
from oftv2 import OFTConfig, OFTEmbedding, OFTLinear
from oftv2 import functional as F
from oftv2._cayley_ops import _skew_entries, _triangles
from oftv2._ops import identity

X = torch.linspace(-1, 1, 5 * 24).view(5, 24)


def linear(block_size: int = 8, **fields) -> OFTLinear:
    return OFTLinear(nn.Linear(24, 7), OFTConfig(block_size=block_size, init="normal", **fields)).train()


class TestResultsMayBeWrittenTo:
    """As those of ``nn.Linear`` and ``nn.Embedding``: ``ReLU(inplace=True)``, images that are put among embeddings."""

    @pytest.mark.parametrize("tokens", [3, 1100])
    @pytest.mark.parametrize("form", ["input", "weight"])
    def test_of_a_linear_layer(self, form, tokens):
        layer, x = linear(), torch.randn(2, tokens, 24, requires_grad=True)
        layer.form = form
        found = []
        for activation in (torch.relu, torch.relu_):
            for recorder in (OperatorCounter(), torch.enable_grad()):
                with recorder:
                    y = activation(layer(x))
                found.append(torch.autograd.grad(y.square().sum(), [x, layer.generators["default"]]))
        for name, *all_of_it in zip(("x", "generators"), *found, strict=True):
            for other in all_of_it[1:]:
                assert_close(name, other, all_of_it[0], 1e-5)

    @pytest.mark.parametrize("tokens", [3, 1100])
    @pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
    def test_of_an_embedding(self, recorded, tokens):
        layer, offset = OFTEmbedding(nn.Embedding(9, 24), OFTConfig(block_size=8)), nn.Parameter(torch.ones(24))
        with torch.set_grad_enabled(recorded):
            vectors = layer(torch.zeros(2, tokens, dtype=torch.long))
        vectors += offset
        vectors.sum().backward()
        assert torch.equal(offset.grad, torch.full((24,), 2.0 * tokens))


def test_input_gradients_through_frozen_rotations_of_one_input():
    x = X.clone().requires_grad_()
    deltas = [0.1 * torch.randn(3, 8, 8) for _ in range(2)]
    (actual,) = torch.autograd.grad(sum(y.square().sum() for y in F.rotate_group(x, deltas)), x)
    (expected,) = torch.autograd.grad(sum(F.rotate(x, delta).square().sum() for delta in deltas), x)
    assert_close("∂x", actual, expected, 1e-5)


@pytest.mark.parametrize("form", ["input", "weight"])
def test_second_derivatives_where_a_mode_looks_at_operators(form):
    layer, x = linear(parametrization="cayley"), X.clone().requires_grad_()
    layer.form, wanted = form, [x, layer.generators["default"]]

    def penalties():
        gradients = torch.autograd.grad(layer(x).tanh().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)

    with OperatorCounter():
        observed = penalties()
    for actual, expected in zip(observed, penalties(), strict=True):
        assert_close("second derivative", actual, expected, 1e-4)


@pytest.mark.parametrize("form", ["input", "weight"])
def test_gradients_of_several_upstream_gradients_at_once(form):
    layer, x = linear(), X.clone().requires_grad_()
    layer.form, wanted = form, [x, layer.generators["default"]]
    y, upstream = layer(x), torch.randn(3, 5, 7)
    batched = torch.autograd.grad(y, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for i, own in enumerate(upstream):
        for actual, expected in zip(batched, torch.autograd.grad(y, wanted, own, retain_graph=True), strict=True):
            assert_close("gradient", actual[i], expected, 1e-5)


class TestConstants:
    """What is kept of a first call is right for all later ones. Block sizes are those of no other test."""

    def second_derivative(self, block_size: int) -> None:
        x, packed = torch.randn(5, 2 * block_size), torch.zeros(2, block_size * (block_size - 1) // 2)
        y = F.rotate(x, F.cayley(packed.requires_grad_(), block_size)) + F.neumann_rotate(x, packed, block_size)
        (gradient,) = torch.autograd.grad(y.square().sum(), packed, create_graph=True)
        gradient.square().sum().backward()

    def test_made_in_inference_mode(self):
        with torch.inference_mode():
            linear(12)(X)
            F.rotate(torch.randn(1100, 24), F.cayley(torch.zeros(2, 66), 12))
        self.second_derivative(12)

    def test_made_in_a_transform(self):
        packed, x = torch.zeros(2, 91), torch.randn(1100, 28)

        def along(packed):
            return grad(lambda packed: F.neumann_rotate(x, packed, 14).square().sum())(packed)

        jvp(along, (packed,), (packed,))
        for constant in (
            *_triangles(14, x.device),
            *_skew_entries(14, x.dtype, x.device),
            identity(14, x.dtype, x.device),
        ):
            assert not torch._C._functorch.is_functorch_wrapped_tensor(constant)
        along(packed)
        self.second_derivative(14)

    def test_made_without_values(self):
        with FakeTensorMode():
            F._cayley_ops._triangles(18, torch.device("cpu"))
        assert type(F.cayley_neumann(torch.zeros(1, 153), 18)) is torch.Tensor
        assert type(_triangles(18, torch.device("cpu"))[0]) is torch.Tensor


class TestWithoutValues:
    @pytest.mark.parametrize("training", [True, False])
    def test_fake_tensors(self, training):
        with FakeTensorMode():
            layer = linear().train(training)
            for tokens in (1, 5, 1100):
                for _ in range(2):
                    layer(torch.randn(tokens, 24)).sum().backward()
                    with torch.no_grad():
                        assert layer(torch.randn(tokens, 24)).shape == (tokens, 7)

    def test_transforms_on_the_meta_device(self):
        layer = linear().to("meta")
        loss = lambda packed: functional_call(layer, {"generators.default": packed}, (X.to("meta"),)).sum()  # noqa: E731
        assert grad(loss)(layer.generators["default"].detach()).shape == (3, 28)


def test_nothing_is_kept_that_a_captured_graph_has_yet_to_compute(monkeypatch):
    """Eager calls before its first replay would read it."""
    layer = linear().eval()
    with torch.no_grad():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        first, cast = layer.delta(), layer.delta(torch.bfloat16)
        assert layer.delta() is not first
        assert _triangles(20, X.device)[0] is not _triangles(20, X.device)[0]
        monkeypatch.undo()
        kept = layer.delta()
        assert layer.delta() is kept
        assert torch.equal(kept, first)
        assert torch.equal(layer.delta(torch.bfloat16), cast)
        assert _triangles(20, X.device)[0] is _triangles(20, X.device)[0]


@pytest.mark.parametrize(("strict", "training"), [(True, True), (False, True), (False, False)])
def test_an_exported_layer_takes_any_number_of_tokens(strict, training):
    layer = linear().train(training)
    exported = torch.export.export(layer, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    for tokens in (2, 5, 40, 1100):  # fewer and more than outputs, and than are rotated as a few
        x = torch.randn(tokens, 24)
        assert_close("y", exported.module()(x), layer(x), 1e-5)


def test_hooks_of_all_modules_see_the_base_layer():
    """Such as those of torch's FLOP counter, which counts operators that it knows: products, and no rotations."""
    layer, x = OFTLinear(nn.Linear(256, 8)), torch.randn(4000, 256)
    assert layer.choose_form(x) == "weight"
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 4000 * 256 * 8
