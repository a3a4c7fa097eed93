"""Generators to activations in one autograd node on a CPU: the operators' results, and when it stands aside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conftest import OperatorCounter, assert_close, graph_nodes
from oftv2 import OFTConfig, OFTLinear, reference
from oftv2 import functional as F

SIZES = [(1, 4, 4), (7, 24, 8), (5, 15, 5), (0, 8, 4), (1100, 64, 32)]


def operands(tokens, d, b, dtype=torch.float32):
    generators = 0.05 * torch.randn(d // b, b * (b - 1) // 2)
    return torch.randn(2, tokens, d).to(dtype).requires_grad_(), generators.requires_grad_()


def is_direct(y):
    return not any("oftv2" in name for name in graph_nodes(y))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("tokens", "d", "b"), SIZES)
def test_forward_and_gradients_are_the_references(tokens, d, b, terms):
    x, generators = operands(tokens, d, b)
    upstream = torch.randn(x.shape)
    y = F.neumann_rotate(x, generators, b, terms)
    y.backward(upstream)
    wide_x, wide = x.detach().double().requires_grad_(), generators.detach().double().requires_grad_()
    expected = reference.rotate(wide_x, reference.cayley_neumann(reference.skew(wide, b), terms))
    expected.backward(upstream.double())
    assert_close("y", y.detach(), expected.detach(), 5e-6)
    assert_close("∂x", x.grad, wide_x.grad, 5e-6)
    assert_close("∂generators", generators.grad, wide.grad, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
def test_bit_for_bit_as_the_operators(dtype, trains):
    x, generators = operands(9, 24, 8, dtype)
    found = []
    for rotate in (F.neumann_rotate, lambda x, packed, b: F.rotate(x, F.cayley_neumann(packed, b))):
        inputs = [t.detach().clone().requires_grad_(needs) for t, needs in zip((x, generators), trains, strict=True)]
        y = rotate(*inputs, 8)
        y.sum().backward()
        found.append([y, *(tensor.grad for tensor in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("n", [7, 50_000], ids=["small", "large"])
def test_weight_form_bit_for_bit_as_the_operators(n, bias, trains, dtype):
    x, generators = operands(9, 24, 8, dtype)
    weight, offset = torch.randn(n, 24, dtype=dtype), torch.randn(n, dtype=dtype) if bias else None
    found = []
    for form in (F.neumann_weight_form, torch.ops.oftv2.neumann_weight_form):
        inputs = [t.detach().clone().requires_grad_(needs) for t, needs in zip((x, generators), trains, strict=True)]
        y = form(*inputs, weight, offset, 8, 4)
        y.square().sum().backward()
        found.append([y, *(tensor.grad for tensor in inputs)])
    assert "WeightFormBackward" in type(F.neumann_weight_form(x, generators, weight, offset, 8).grad_fn).__name__
    for ours, theirs, needs in zip(*found, (True, *trains), strict=True):
        assert (ours is not None) == needs
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_autocast_leaves_the_rotation_in_float32():
    x, generators = operands(9, 24, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.neumann_rotate(x, generators, 8)
    assert torch.equal(y, F.neumann_rotate(x, generators, 8))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    x, generators = operands(9, 24, 8)
    plain = torch.autograd.grad(F.neumann_rotate(x, generators, 8).square().sum(), (x, generators))
    checkpoint(lambda x: F.neumann_rotate(x, generators, 8), x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(generators.grad, plain[1])


@pytest.mark.parametrize(("tokens", "node"), [(9, "BaddbmmBackward0"), (1100, "RotateBackward")])
def test_few_tokens_leave_the_rotation_to_autograd(tokens, node):
    y = F.neumann_rotate(*operands(tokens, 24, 8), 8)
    assert is_direct(y)
    assert node in graph_nodes(y)


def test_operators_are_called_where_something_looks_at_them():
    x, generators = operands(9, 24, 8)
    y = F.neumann_rotate(x, generators, 8)
    assert is_direct(y)
    with OperatorCounter() as counter:
        torch.testing.assert_close(F.neumann_rotate(x, generators, 8), y)
    assert "neumann_rotate" in counter.names

    class Tagged(torch.Tensor): ...

    assert not is_direct(F.neumann_rotate(x.as_subclass(Tagged), generators, 8))
    compiled = torch.compile(lambda x, packed: F.neumann_rotate(x, packed, 8), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, generators), y)

    weight = torch.randn(7, 24)
    with OperatorCounter() as counter:
        y = F.neumann_weight_form(x, generators, weight, None, 8)
    assert "neumann_weight_form" in counter.names
    torch.testing.assert_close(F.neumann_weight_form(x, generators, weight.as_subclass(Tagged), None, 8), Tagged(y))


@pytest.mark.parametrize("form", ["input", "weight"])
@pytest.mark.parametrize("tokens", [9, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_beside_another_path(tokens, dtype, form):
    """What differentiates once alone is passed over by ``autograd.grad`` where a residual leads to the same inputs."""
    x, generators = operands(tokens // 2, 24, 8, dtype)
    x, weight = x.detach().requires_grad_(), torch.randn(24, 24, dtype=dtype)

    def ours(x, packed):
        if form == "weight":
            return F.neumann_weight_form(x, packed, weight, None, 8)
        return F.neumann_rotate(x, packed, 8) @ weight.mT

    def theirs(x, packed):
        return reference.rotate(x, reference.cayley_neumann(reference.skew(packed, 8), 4)) @ weight.mT.double()

    def penalties(layer, x, packed):
        loss = (x + torch.tanh(layer(x, packed))).square().sum()
        gradients = torch.autograd.grad(loss, [x, packed], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, packed])

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, generators)]
    for actual, expected in zip(penalties(ours, x, generators), penalties(theirs, *wide), strict=True):
        assert_close("second derivative", actual, expected, 2e-5)


def test_layers_use_it_and_wrong_features_are_refused():
    layer = OFTLinear(nn.Linear(24, 7), OFTConfig(block_size=8)).train()
    y = layer(torch.randn(5, 24))
    assert is_direct(y)
    with pytest.raises(RuntimeError, match="x has 16 features"):
        F.neumann_rotate(torch.randn(5, 16), layer.generators["default"], 8)
    layer.form = "weight"
    assert type(layer(torch.randn(5, 24)).grad_fn).__name__ == "WeightFormBackward"
    with pytest.raises(RuntimeError, match="x has 16 features"):
        F.neumann_weight_form(torch.randn(5, 16), layer.generators["default"], layer.weight, None, 8)


@pytest.mark.parametrize("shape", [(0, 24), (24,), (1, 24), (2, 8, 24), (17, 24)], ids=str)
def test_generating_takes_the_kept_rotation_as_long_as_it_holds(shape):
    layer = OFTLinear(nn.Linear(24, 7), OFTConfig(block_size=8, init="normal")).eval()
    x = torch.randn(shape)

    def expected():
        R = torch.block_diag(*(torch.eye(8) + layer.delta().detach()))
        return nn.functional.linear(x @ R, layer.weight, layer.bias)

    with torch.no_grad():
        for _ in range(2):  # made, kept
            assert_close("y", layer(x), expected(), 1e-5)
        layer.generators["default"].mul_(-3)
        assert_close("y of other generators", layer(x), expected(), 1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="x has 16 features"):
            layer(torch.randn(1, 16))
        layer.form = "fused"
        with pytest.raises(ValueError, match="not possible here"):
            layer(x)
        layer.form, layer.enabled = None, False
        assert torch.equal(layer(x), layer.base_layer(x))
    layer.enabled = True
    assert layer(x).requires_grad
