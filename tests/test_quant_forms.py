"""4-bit layers in the forms that dequantize and rotate in one go: the same function as calling the base layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oftv2
from conftest import assert_close, randomize, record_calls
from oftv2 import OFTConfig, QuantOFTLinear, reference
from oftv2._bitsandbytes import weight_4bit
from oftv2._quant_ops import dequantize_4bit
from quantized import FOUR_BIT, dequantized, quantize

each_format = pytest.mark.parametrize("kind", FOUR_BIT)


@pytest.fixture
def launches(monkeypatch):
    """Names of the launchers that ran, so that no test compares plain torch with itself."""
    from oftv2.kernels import nf4, nf4_matmul

    return record_calls(monkeypatch, {nf4: ["dequantize_rotate"], nf4_matmul: ["rotate_matmul_4bit"]})


def make(kind, device, *, d=128, n=48, b=16, dtype=torch.float32, **fields):
    layer = QuantOFTLinear(
        quantize(nn.Linear(d, n).to(dtype), kind, dtype).to(device), OFTConfig(block_size=b, **fields), name="proj"
    )
    randomize(layer)
    return layer


def oracle(layer, x, upstream):
    """Output and gradients in float64, from the weight as bitsandbytes dequantizes it."""
    x = x.detach().double().cpu().requires_grad_()
    generators = layer.generators["default"].detach().double().cpu().requires_grad_()
    R = reference.cayley_neumann(reference.skew(generators, layer.rotation.block_size), 4)
    y = reference.oft_linear(x, R, dequantized(layer.base_layer).cpu(), layer.bias.detach().double().cpu())
    y.backward(upstream.double().cpu())
    return y.detach(), x.grad, generators.grad


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_dequantization_is_bitsandbytes(kind, dtype):
    base = quantize(nn.Linear(192, 40), kind, dtype)
    expected = dequantized(base).to(dtype)
    assert torch.equal(dequantize_4bit(weight_4bit(base), dtype), expected)


@each_format
@pytest.mark.parametrize("leading", [(70,), (2, 5), (1,), (0,)], ids=str)
def test_weight_form(device, launches, kind, leading):
    layer = make(kind, device)
    layer.form = "weight"
    x = torch.randn(*leading, 128, device=device, requires_grad=True)
    upstream = torch.randn(*leading, 48, device=device)
    y = layer(x)
    y.backward(upstream)
    assert launches == ["dequantize_rotate"] * 2
    expected, grad_x, grad_generators = oracle(layer, x, upstream)
    assert_close("y", y.detach().cpu(), expected, 3e-6)
    assert_close("∂x", x.grad.cpu(), grad_x, 3e-6)
    assert_close("∂generators", layer.generators["default"].grad.cpu(), grad_generators, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_form_in_16_bit(device, dtype):
    layer = make("nf4-double", device, dtype=dtype)
    layer.form = "weight"
    x = torch.randn(40, 128, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(40, 48, device=device).to(dtype)
    y = layer(x)
    y.backward(upstream)
    expected, grad_x, grad_generators = oracle(layer, x, upstream)
    for name, actual, wanted in [("y", y.detach(), expected), ("∂x", x.grad, grad_x)]:
        assert actual.dtype == dtype
        assert_close(name, actual.cpu(), wanted, 1e-2)
    assert_close("∂generators", layer.generators["default"].grad.cpu(), grad_generators, 2e-2)


@each_format
@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
def test_fused_form(device, launches, kind, tokens):
    layer = make(kind, device).eval()
    layer.form = "fused"
    x = torch.randn(tokens, 128, device=device)
    with torch.no_grad():
        y = layer(x)
    assert launches == ["rotate_matmul_4bit"]
    assert_close("y", y.cpu(), oracle(layer, x, torch.zeros(tokens, 48))[0], 3e-6)


def test_zero_generators_give_the_base_weight_bit_for_bit(device):
    layer = make("nf4", device)
    nn.init.zeros_(layer.generators["default"])
    weight = torch.ops.oftv2.dequantize_rotate_4bit(
        layer.delta().detach(), *weight_4bit(layer.base_layer), torch.float32
    )
    assert torch.equal(weight.double(), dequantized(layer.base_layer))


def test_nothing_but_the_input_is_kept(device):
    layer = make("nf4", device)
    layer.form = "weight"
    x = torch.randn(512, 128, device=device, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    weight = weight_4bit(layer.base_layer)
    stored = sum(t.untyped_storage().nbytes() for t in (weight.packed, weight.absmax, weight.code))
    assert sum(kept.values()) == x.nbytes + stored + layer.generators["default"].nbytes  # all but x is there anyway


def test_which_forms_are_possible(device):
    layer = make("nf4", device)
    assert layer.forms(torch.float32, gradient=True) == ("input", "weight")
    assert layer.forms(torch.float32, gradient=False) == ("input", "fused")
    assert layer.forms(torch.bfloat16, gradient=True) == ("input",)  # the base layer computes in float32
    layer.bias.requires_grad_()
    assert layer.forms(torch.float32, gradient=True) == ("input",)
    layer.bias.requires_grad_(False)
    layer.base_layer.register_forward_hook(lambda module, args, output: None)
    assert layer.forms(torch.float32, gradient=True) == ("input",)


def test_int8_takes_its_input_rotated(device):
    assert make("int8", "cpu").forms(torch.float16, gradient=True) == ("input",)


def test_explain_names_the_choice(device):
    explanation = oftv2.explain(make("nf4", device), 4096, dtype=torch.float32)
    assert explanation.form == "weight"
    assert explanation.problem.quantized
    assert "form 'weight': rotates the weight for this call" in str(explanation)


def test_opcheck(device):
    layer = make("nf4-double", device, d=64, n=8)
    weight, delta = weight_4bit(layer.base_layer), layer.delta().detach()
    x, upstream = torch.randn(5, 64, device=device), torch.randn(5, 8, device=device)
    ops = torch.ops.oftv2
    torch.library.opcheck(ops.dequantize_rotate_4bit.default, (delta, *weight, torch.bfloat16))
    args = (x.clone().requires_grad_(), delta.clone().requires_grad_(), None, *weight)
    torch.library.opcheck(ops.weight_form_4bit.default, args)
    torch.library.opcheck(ops.weight_form_4bit_backward.default, (upstream, x, delta, *weight))
    packed = layer.generators["default"].detach().requires_grad_()
    torch.library.opcheck(ops.neumann_weight_form_4bit.default, (args[0], packed, None, *weight, layer.block_size, 4))
    torch.library.opcheck(ops.rotate_matmul_4bit.default, (x, delta, None, *weight))


@pytest.mark.parametrize("gradient", [True, False])
def test_compiled_for_any_number_of_tokens(device, gradient):
    """No graph breaks, and none is made anew for other lengths: the first call fixes no form."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = make("nf4", device)
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    with torch.set_grad_enabled(gradient):
        for tokens in (8, 300):
            x = torch.randn(tokens, 128, device=device)
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)
            counts.append(graphs.frame_count)
    assert counts[0] == counts[1] > 0
