"""``torch.func`` over wrapped models: per-sample gradients, ensembles of adapters, forward mode, second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from conftest import assert_close
from oftv2 import OFTConfig, wrap_model

# Tokens below and above the number from which the rotation is a convolution, and outputs, from which the weight's is.
SIZES = [(5, 8), (1100, 8), (40, 1100)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=SIZES, ids=str)
def problem(request, training, dtype):
    """A model, its generators by name, a batch, and the loss of both."""
    tokens, outputs = request.param
    base = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, outputs)).to(dtype)
    model = wrap_model(base, OFTConfig(block_size=8, target_modules="all-linear", init="normal")).train(training)
    generators = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(generators, x):
        return functional_call(model, generators, (x,)).double().square().mean()

    return generators, torch.randn(tokens, 32, dtype=dtype), loss


def test_gradients_are_autograds(problem, dtype):
    generators, x, loss = problem
    expected = torch.autograd.grad(loss(generators, x), list(generators.values()))
    for name, wanted in zip(generators, expected, strict=True):
        assert_close(name, grad(loss)(generators, x)[name], wanted, TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(problem, dtype):
    generators, x, loss = problem
    x = x[:4]
    each = vmap(grad(loss), in_dims=(None, 0))(generators, x)
    for place, sample in enumerate(x):
        for name, wanted in grad(loss)(generators, sample).items():
            assert_close(name, each[name][place], wanted, TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_adapters_at_once(problem, dtype):
    generators, x, loss = problem
    several = [{name: factor * p.detach() for name, p in generators.items()} for factor in (1, 2, 3)]
    stacked = {name: torch.stack([each[name] for each in several]) for name in generators}
    expected = torch.stack([loss(each, x) for each in several])
    assert_close("losses", vmap(loss, in_dims=(0, None))(stacked, x), expected.detach(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_forward_mode_and_second_derivatives(problem):
    generators, x, loss = problem
    tangents = {name: torch.randn_like(p) for name, p in generators.items()}
    _, along = jvp(lambda g: loss(g, x), (generators,), (tangents,))
    gradients = grad(loss)(generators, x)
    assert_close("forward mode", along, sum((gradients[name] * tangents[name]).sum() for name in generators), 1e-9)

    _, hessian_times = jvp(lambda g: grad(loss)(g, x), (generators,), (tangents,))
    ahead, behind = (
        grad(loss)({name: p + step * tangents[name] for name, p in generators.items()}, x) for step in (1e-4, -1e-4)
    )
    for name in generators:
        assert_close(name, hessian_times[name], (ahead[name] - behind[name]) / 2e-4, 1e-4)


def test_nothing_of_it_stays(problem):
    """What a transform passed through a layer is not kept for later passes."""
    generators, x, loss = problem
    with torch.no_grad():
        before = loss(generators, x)
        vmap(lambda scale: loss({name: scale * p for name, p in generators.items()}, x))(torch.tensor([2.0, 3.0]))
        assert torch.equal(loss(generators, x), before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], indirect=True)
def test_several_output_gradients_at_once(problem, dtype):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` does it, by an older ``vmap`` than torch.func's."""
    generators, x, loss = problem
    value, of = loss(generators, x), list(generators.values())
    several = torch.tensor([1.0, -2.0]).double()
    together = torch.autograd.grad(value, of, several, is_grads_batched=True, retain_graph=True)
    for batched, single in zip(together, torch.autograd.grad(value, of), strict=True):
        assert_close("gradients", batched, torch.stack([single, -2 * single]), TOLERANCE[dtype])
