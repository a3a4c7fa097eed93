"""Adapted layers on the kernels: which operators a pass runs, and that the result is the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import OperatorCounter, assert_close, randomize
from oftv2 import OFTConfig, OFTEmbedding, OFTLinear, reference
from oftv2 import functional as F


def make(device, *, d=96, n=40, dtype=torch.float32, form="input", **fields):
    layer = OFTLinear(nn.Linear(d, n).to(device, dtype), OFTConfig(**{"block_size": 32, **fields}))
    randomize(layer)
    layer.form = form
    return layer


def expected(layer, x, upstream):
    """Output and gradients in float64."""
    x = x.detach().double().cpu().requires_grad_()
    generators = layer.generators["default"].detach().double().cpu().requires_grad_()
    R = reference.cayley_neumann(reference.skew(generators, layer.rotation.block_size), layer.rotation.terms)
    R = R.expand(layer.rotation.num_blocks, -1, -1)
    y = reference.oft_linear(x, R, layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu())
    y.backward(upstream.double().cpu())
    return y.detach(), x.grad, generators.grad


@pytest.mark.parametrize("form", ["input", "weight"])
@pytest.mark.parametrize("fields", [{}, {"block_size": 12}, {"block_share": True}, {"block_size": 48}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 5e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str
)
def test_training(device, form, fields, dtype, relative):
    layer = make(
        device, form=form if device.type == "cuda" or dtype == torch.float32 else "input", dtype=dtype, **fields
    )
    x = torch.randn(3, 20, 96, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(3, 20, 40, device=device).to(dtype)
    y = layer(x)
    y.backward(upstream)
    wanted = expected(layer, x, upstream)
    actual = y.detach(), x.grad, layer.generators["default"].grad
    for name, a, w in zip(("y", "∂x", "∂generators"), actual, wanted, strict=True):
        assert_close(name, a.cpu(), w, 3 * relative if name == "∂generators" else relative)


def test_one_operator_forward_and_one_backward_in_training(device):
    layer, x = make(device).train(), torch.randn(20, 96, device=device, requires_grad=True)
    with OperatorCounter() as counter:
        y = layer(x)
    assert counter.names == ["neumann_rotate"]
    with OperatorCounter() as counter:
        y.sum().backward()
    assert counter.names == ["neumann_rotate_backward"]


def test_in_eval_without_gradients_the_rotation_is_made_once(device):
    layer, x = make(device).eval(), torch.randn(20, 96, device=device)
    with torch.no_grad(), OperatorCounter() as counter:
        first, second = layer(x), layer(x)
    assert counter.names.count("cayley_neumann") == 1
    assert "neumann_rotate" not in counter.names
    assert torch.equal(first, second)


@pytest.mark.parametrize("fields", [{"dropout": 0.5}, {"parametrization": "cayley"}, {"block_size": 48}], ids=str)
def test_what_no_kernel_makes_on_the_way_takes_two_steps(device, fields):
    layer, x = make(device, **fields).train(), torch.randn(20, 96, device=device, requires_grad=True)
    with OperatorCounter() as counter:
        layer(x)
    made = "cayley" if fields.get("parametrization") else "cayley_neumann"
    assert counter.names == [made, "rotate"]


def test_scale_and_constraint_reach_the_kernel(device):
    layer = make(device, scale_generators=True, constraint=0.5)
    x = torch.randn(20, 96, device=device)
    expected = nn.functional.linear(F.rotate(x, layer.delta()), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_fused_form(device):
    layer, x = make(device).eval(), torch.randn(5, 96, device=device)
    layer.form = "fused" if device.type == "cuda" else None
    with torch.no_grad():
        y = F.oft_linear(x, layer.delta(), layer.weight, layer.bias, form="fused")
        torch.testing.assert_close(layer(x), y)
    assert_close("y", y.cpu(), expected(layer, x, torch.zeros(5, 40))[0], 3e-6)


def test_embedding(device):
    layer = OFTEmbedding(nn.Embedding(11, 64).to(device), OFTConfig(block_size=32))
    randomize(layer)
    ids = torch.arange(11, device=device).view(1, 11)
    R = reference.cayley_neumann(reference.skew(layer.generators["default"].detach().double().cpu(), 32), 4)
    expected = reference.rotate(layer.weight.detach().double().cpu(), R)[None]
    with OperatorCounter() as counter:
        out = layer(ids)
    assert counter.names == ["neumann_rotate"]
    assert_close("vectors", out.detach().cpu(), expected, 3e-6)


def test_compiles_without_graph_breaks(device):
    torch._dynamo.reset()
    layer, x = make(device, form=None).train(), torch.randn(20, 96, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    out.sum().backward()
    gradient = layer.generators["default"].grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(gradient, layer.generators["default"].grad)


def test_autocast(device):
    layer, x = make(device).train(), torch.randn(20, 96, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    wanted = expected(layer, x, torch.ones(20, 40))
    assert_close("y", y.detach().cpu(), wanted[0], 1.5e-2)
    assert_close("∂generators", layer.generators["default"].grad.cpu(), wanted[2], 5e-2)
