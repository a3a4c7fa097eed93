"""The weight form of an adapted linear layer: the same function as the input form, chosen where it is cheaper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import assert_close, randomize
from oftv2 import OFTConfig, OFTLinear, reference
from oftv2 import functional as F
from oftv2._weight_form import _inverse


def problem(tokens, d, n, b, *, std=0.1, bias=True):
    """Random inputs of a layer in float64: x, generators, weight, bias."""
    x = torch.randn(*tokens, d, dtype=torch.float64)
    generators = torch.randn(d // b, b * (b - 1) // 2, dtype=torch.float64) * std / b**0.5
    weight = torch.randn(n, d, dtype=torch.float64)
    return x, generators, weight, torch.randn(n, dtype=torch.float64) if bias else None


def run(x, generators, weight, bias, b, form, upstream, terms=4):
    x, generators = x.clone().requires_grad_(), generators.clone().requires_grad_()
    out = F.oft_linear(x, F.cayley_neumann(generators, b, terms), weight, bias, form=form)
    out.backward(upstream.to(out.dtype))
    return out.detach(), x.grad, generators.grad


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "d", "n", "b"),
    [
        ((70,), 24, 9, 8),
        ((3, 40), 60, 33, 12),
        ((2, 2, 30), 64, 1, 32),
        ((33,), 96, 11000, 32),
        ((1,), 6, 4, 3),
        ((0,), 8, 4, 4),
        ((), 8, 4, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_value_and_gradients_against_the_reference(tokens, d, n, b, bias, dtype, relative):
    x, generators, weight, offset = problem(tokens, d, n, b, bias=bias)
    upstream = torch.randn(*tokens, n, dtype=torch.float64)
    x_ref, generators_ref = x.clone().requires_grad_(), generators.clone().requires_grad_()
    R = reference.cayley_neumann(reference.skew(generators_ref, b), 4)
    expected = reference.oft_linear(x_ref, R, weight, offset)
    expected.backward(upstream)
    arguments = [None if value is None else value.to(dtype) for value in (x, generators, weight, offset)]
    out, grad_x, grad_generators = run(*arguments, b, "weight", upstream)
    assert out.dtype == dtype
    assert_close("output", out, expected, relative)
    assert_close("∂x", grad_x, x_ref.grad, relative)
    assert_close("∂generators", grad_generators, generators_ref.grad, 3 * relative)


@settings(max_examples=30)
@given(
    b=st.integers(2, 20),
    r=st.integers(1, 4),
    n=st.integers(1, 30),
    tokens=st.integers(1, 80),
    terms=st.integers(1, 6),
    std=st.sampled_from([0.0, 0.01, 1.5]),  # the last is far from orthogonal: the inverse in the gradient is exact
    sliced=st.booleans(),
)
def test_both_forms_agree(b, r, n, tokens, terms, std, sliced):
    x, generators, weight, bias = problem((tokens,), b * r, n, b, std=std)
    if sliced:
        x = torch.stack([x, x], dim=2)[..., 0]
        weight = torch.cat([weight, weight])[::2]
    upstream = torch.randn(tokens, n, dtype=torch.float64)
    by_form = [run(x, generators, weight, bias, b, form, upstream, terms) for form in ("input", "weight")]
    for first, second in zip(*by_form, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-8)


def test_opcheck():
    x, generators, weight, bias = problem((5,), 12, 7, 4)
    delta = F.cayley_neumann(generators, 4).detach().requires_grad_()
    torch.library.opcheck(torch.ops.oftv2.weight_form.default, (x.requires_grad_(), delta, weight, bias))
    grad = torch.randn(5, 7, dtype=torch.float64)
    arguments = (grad, x.detach(), delta.detach(), weight)
    torch.library.opcheck(torch.ops.oftv2.weight_form_backward.default, arguments)
    packed = generators.detach().requires_grad_()
    torch.library.opcheck(torch.ops.oftv2.neumann_weight_form.default, (x, packed, weight, bias, 4, 4))
    with pytest.raises(RuntimeError, match="x has 12 features"):
        torch.ops.oftv2.neumann_weight_form(x, packed[:2], weight, bias, 4, 4)


def test_the_form_is_chosen_by_tokens_per_output():
    layer = OFTLinear(nn.Linear(512, 1024))

    def form(tokens, dtype=torch.float32):
        return layer.to(dtype).choose_form(torch.zeros(1, 1, dtype=dtype).expand(tokens, 512))

    assert form(1200) == "input"
    assert form(1600) == "weight"
    assert form(1600, torch.bfloat16) == "input"
    with torch.autocast("cpu", torch.bfloat16):
        assert form(1600) == "input"
    layer.bias.requires_grad_(True)
    assert form(1600) == "input"
    with pytest.raises(ValueError, match='form=\'output\' is not allowed: use "input", "weight" or "fused"'):
        F.oft_linear(torch.randn(4, 32), torch.zeros(4, 8, 8), torch.randn(16, 32), form="output")


class TestLayer:
    @pytest.fixture
    def layer(self):
        layer = OFTLinear(nn.Linear(32, 16), OFTConfig(block_size=8))
        randomize(layer)
        return layer

    @pytest.fixture
    def calls(self, monkeypatch):
        """Counts the calls of the weight form."""
        calls = []
        original = OFTLinear.call_in_form
        monkeypatch.setattr(OFTLinear, "call_in_form", lambda *args: calls.append(1) or original(*args))
        return calls

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_is_the_same_on_both_sides_of_the_threshold(self, layer, calls, mode):
        layer.train(mode == "train")
        x = torch.randn(4096, 32)
        whole = layer(x)
        assert len(calls) == 1
        parts = torch.cat([layer(x[:12]), layer(x[12:24])])
        assert len(calls) == 1
        torch.testing.assert_close(whole[:24], parts)

    def test_hooks_and_subclasses_of_the_base_layer_are_called(self, layer, calls):
        seen = []
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(1))
        layer(torch.randn(4096, 32))

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        base = Doubled(32, 16)
        x = torch.randn(4096, 32)
        assert torch.equal(OFTLinear(base, OFTConfig(block_size=8))(x), base(x))
        assert seen == [1]
        assert not calls

    def test_of_the_activations_only_the_input_is_kept(self, layer):
        layer.form = "weight"
        x = torch.randn(512, 32, requires_grad=True)
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = layer(x)
        there_anyway = layer.weight.nbytes  # and the generators, which Δ's node keeps itself
        assert sum(kept.values()) == x.nbytes + there_anyway + layer.delta().nbytes
        assert out.shape == (512, 16)

    def test_compiles_without_graph_breaks(self, layer):
        torch._dynamo.reset()
        x = torch.randn(24, 32)
        expected = layer(x)
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        wanted = layer.generators["default"].grad.clone()
        layer.zero_grad()
        expected.sum().backward()
        torch.testing.assert_close(layer.generators["default"].grad, wanted)

    @pytest.mark.usefixtures("two_threads")
    def test_two_runs_give_equal_bits(self, layer):
        x, gradients = torch.randn(500, 32), []
        for _ in range(2):
            layer.zero_grad()
            layer(x).square().sum().backward()
            gradients.append(layer.generators["default"].grad.clone())
        assert torch.equal(*gradients)


def test_the_inverse_ends_where_products_are_coarse(monkeypatch):
    """As after ``torch.set_float32_matmul_precision("medium")``, on CPUs that multiply in bfloat16."""
    R = torch.eye(8) + F.cayley(0.002 * torch.randn(4, 28), 8)
    exact, calls = torch.baddbmm, []

    def coarse(total, a, b, **factors):
        calls.append(1)
        assert len(calls) < 50
        return exact(total, a.bfloat16().float(), b.bfloat16().float(), **factors)

    monkeypatch.setattr(torch, "baddbmm", coarse)
    assert_close("R⁻¹", _inverse(R), R.double().inverse(), 1e-5)
