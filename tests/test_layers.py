"""Layers against the float64 reference: outputs and gradients over shapes, dtypes, options; merging and unmerging."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import assert_close, randomize
from oftv2 import OFTConfig, OFTConv2d, OFTEmbedding, OFTLinear, StabilityWarning, diagnostics, reference
from oftv2.base import OFTLayer
from oftv2.stability import DivergenceCheck

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rounding x̂ to 16 bit, and then the product of the base layer.
LAYER_ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def reference_rotation(layer: OFTLayer) -> torch.Tensor:
    """R in float64, differentiable in the layer's generators as float64 leaf ``generators64``."""
    rotation = layer.rotation
    generators = layer.generators[layer.active].detach().double().requires_grad_()
    Q = reference.skew(generators, rotation.block_size)
    if rotation.scale:
        Q = Q / (2 * (rotation.block_size - 1) ** 0.5)
    if rotation.constraint is not None:
        limit = rotation.constraint / len(Q) ** 0.5
        norm = torch.linalg.matrix_norm(Q, keepdim=True)
        Q = torch.where(norm > limit, Q * limit / norm, Q)
    exact = rotation.parametrization == "cayley"
    R = reference.cayley(Q) if exact else reference.cayley_neumann(Q, rotation.terms)
    R = R.expand(rotation.num_blocks, -1, -1)
    R.generators64 = generators
    return R


def check_against_reference(layer: OFTLayer, x: torch.Tensor, function, relative: float) -> None:
    """Output and every gradient of ``layer`` beside ``function(x, R)`` in float64."""
    x_in = x.clone().requires_grad_(x.is_floating_point())
    out = layer(x_in)
    R = reference_rotation(layer)
    x_ref = x.double().requires_grad_() if x.is_floating_point() else x
    expected = function(x_ref, R)
    assert out.shape == expected.shape
    assert_close("output", out, expected, relative)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert_close("∂generators", layer.generators[layer.active].grad, R.generators64.grad, 3 * relative)
    if x.is_floating_point():
        assert x_in.grad.dtype == x.dtype
        assert_close("∂x", x_in.grad, x_ref.grad, relative)


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 5), (2, 1, 3), (2, 2, 2, 70)], ids=str)
    def test_any_leading_dimensions_and_dtype(self, leading, dtype):
        base = nn.Linear(60, 33).to(dtype)
        layer = OFTLinear(base, OFTConfig(block_size=12))
        randomize(layer)
        weight, bias = base.weight.double(), base.bias.double()
        check_against_reference(
            layer,
            torch.randn(*leading, 60).to(dtype),
            lambda x, R: reference.oft_linear(x, R, weight, bias),
            LAYER_ROUNDING[dtype],
        )

    @pytest.mark.parametrize("shape", [(0, 60), (3, 0, 60)], ids=str)
    def test_empty_batch(self, shape):
        layer = OFTLinear(nn.Linear(60, 33), OFTConfig(block_size=12))
        x = torch.randn(shape, requires_grad=True)
        out = layer(x)
        assert out.shape == (*shape[:-1], 33)
        out.sum().backward()
        assert not layer.generators["default"].grad.any()

    @pytest.mark.parametrize(
        "fields",
        [
            {"neumann_terms": 2},
            {"neumann_terms": 5},
            {"parametrization": "cayley"},
            {"block_share": True},
            {"scale_generators": True},
            {"constraint": 0.3},
            {"constraint": 0.3, "block_share": True, "scale_generators": True},
            {"block_size": None, "num_blocks": 5},
        ],
        ids=str,
    )
    def test_options(self, fields):
        layer = OFTLinear(nn.Linear(60, 33).double(), OFTConfig(**{"block_size": 12, **fields}))
        randomize(layer, std=0.1)
        weight, bias = layer.weight, layer.bias
        check_against_reference(
            layer,
            torch.randn(9, 60, dtype=torch.float64),
            lambda x, R: reference.oft_linear(x, R, weight, bias),
            1e-12,
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_conv1d(self, dtype):
        base = Conv1D(20, 48).to(dtype)
        layer = OFTLinear(base, OFTConfig(block_size=16))
        randomize(layer)
        weight, bias = base.weight.double().mT, base.bias.double()
        check_against_reference(
            layer,
            torch.randn(2, 5, 48).to(dtype),
            lambda x, R: reference.oft_linear(x, R, weight, bias),
            LAYER_ROUNDING[dtype],
        )

    def test_fresh_adapter_changes_no_bit(self):
        for dtype in DTYPES:
            base, x = nn.Linear(64, 32).to(dtype), torch.randn(5, 64).to(dtype)
            assert torch.equal(OFTLinear(copy.deepcopy(base))(x), base(x))

    def test_gradcheck(self):
        layer = OFTLinear(nn.Linear(8, 3).double(), OFTConfig(block_size=4))
        x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
        generators = (torch.randn(2, 6, dtype=torch.float64) * 0.1).requires_grad_()

        def function(x, generators):
            return torch.func.functional_call(layer, {"generators.default": generators}, (x,))

        assert torch.autograd.gradcheck(function, (x, generators))

    def test_dropout_makes_whole_blocks_the_identity_and_only_in_training(self):
        layer = OFTLinear(nn.Linear(64, 64, bias=False), OFTConfig(block_size=8, dropout=0.5))
        nn.init.eye_(layer.base_layer.weight)
        randomize(layer, std=0.2)
        x = torch.randn(3, 64)
        full = layer.eval()(x)
        assert torch.equal(layer(x), full)
        layer.train()
        seen = set()
        for _ in range(20):
            out = layer(x).view(3, 8, 8)
            dropped = (out == x.view(3, 8, 8)).all(dim=2).all(dim=0)
            kept = torch.isclose(out, full.view(3, 8, 8), atol=1e-6).all(dim=2).all(dim=0)
            assert (dropped ^ kept).all()
            seen.add(tuple(dropped.tolist()))
        assert len(seen) > 10

    def test_constraint_never_writes_to_the_parameters(self):
        layer = OFTLinear(nn.Linear(64, 8), OFTConfig(block_size=8, constraint=1e-3))
        randomize(layer, std=0.5)
        before = layer.generators["default"].clone()
        layer.train()(torch.randn(2, 64)).sum().backward()
        layer.eval()(torch.randn(2, 64))
        assert torch.equal(layer.generators["default"], before)
        effective = layer.rotation.effective(before)
        norms = torch.linalg.matrix_norm(reference.skew(effective, 8))
        assert norms.max() <= 1e-3 / 8**0.5 * (1 + 1e-5)

    def test_initialisation(self):
        assert not OFTLinear(nn.Linear(64, 8)).generators["default"].any()
        normal = OFTLinear(nn.Linear(512, 8), OFTConfig(init="normal")).generators["default"]
        assert 0.015 < normal.std() < 0.025

    def test_warns_once_before_the_series_diverges(self):
        layer = OFTLinear(nn.Linear(64, 8), OFTConfig(block_size=8), name="decoder.fc")
        randomize(layer, std=0.5)
        with pytest.warns(StabilityWarning, match=r"decoder\.fc: the generators reached ‖Q‖₂ = \d"):
            layer(torch.randn(2, 64))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(torch.randn(2, 64))

    def test_nothing_is_read_while_a_cuda_graph_is_captured(self, monkeypatch):
        layer = OFTLinear(nn.Linear(64, 8), OFTConfig(block_size=8))
        randomize(layer, std=0.5)
        adapters = [(layer.rotation, layer.generators["default"])]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        for capturing in (True, False):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
            with contextlib.nullcontext() if capturing else pytest.warns(StabilityWarning):
                DivergenceCheck()(adapters, "proj")

    def test_exact_cayley_neither_warns_nor_diverges(self, recwarn):
        layer = OFTLinear(nn.Linear(64, 8), OFTConfig(block_size=8, parametrization="cayley"))
        randomize(layer, std=5.0)
        layer(torch.randn(2, 64))
        assert not [w for w in recwarn if issubclass(w.category, StabilityWarning)]
        (figures,) = diagnostics(layer).values()
        assert figures.orthogonality_error < 1e-4
        assert figures.generator_norm > 5


class TestEmbedding:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
    def test_against_reference(self, shape, dtype):
        base = nn.Embedding(10, 24, padding_idx=0).to(dtype)
        layer = OFTEmbedding(base, OFTConfig(block_size=8))
        randomize(layer)
        ids, table = torch.randint(0, 10, shape), base.weight.double()
        check_against_reference(layer, ids, lambda ids, R: reference.rotate(table[ids], R), LAYER_ROUNDING[dtype])


CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x2-stride-dilation": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 2, "groups": 4},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same-no-bias": {"kernel_size": 3, "padding": "same", "bias": False},
}


def unfold_convolution(base: nn.Conv2d, x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """A convolution by patches: unfold, rotate each group's patch, multiply."""
    weight = base.weight.double()
    groups, (kh, _kw) = base.groups, base.kernel_size
    pad = [1, 1, 1, 1] if base.padding == "same" else [base.padding[1]] * 2 + [base.padding[0]] * 2
    padded = nn.functional.pad(x, pad, mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
    patches = nn.functional.unfold(padded, base.kernel_size, base.dilation, 0, base.stride).mT
    rotated = reference.rotate(patches, R)
    parts = rotated.unflatten(2, (groups, -1))
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1)
    out = torch.einsum("nlgp,gop->ngol", parts, kernels).flatten(1, 2)
    height = (padded.shape[2] - (kh - 1) * base.dilation[0] - 1) // base.stride[0] + 1
    out = out.unflatten(2, (height, -1))
    return out if base.bias is None else out + base.bias.double()[:, None, None]


class TestConv2d:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("fields", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
    def test_against_unfolded_reference(self, fields, dtype):
        base = nn.Conv2d(4, 8, **fields).to(dtype)
        patch = base.weight[0].numel()
        layer = OFTConv2d(base, OFTConfig(block_size=min(patch, 6) if patch % 6 == 0 else patch))
        randomize(layer)
        x = torch.randn(2, 4, 9, 7).to(dtype)
        check_against_reference(layer, x, lambda x, R: unfold_convolution(base, x, R), LAYER_ROUNDING[dtype])

    @pytest.mark.parametrize("fields", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
    def test_merged(self, fields):
        base = nn.Conv2d(4, 8, **fields)
        layer = OFTConv2d(base, OFTConfig(block_size=base.weight[0].numel()))
        randomize(layer)
        x = torch.randn(2, 4, 9, 7)
        expected = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)

    def test_unbatched_input(self):
        layer = OFTConv2d(nn.Conv2d(4, 8, 3), OFTConfig(block_size=12))
        assert layer(torch.randn(4, 9, 7)).shape == (8, 7, 5)

    @pytest.mark.parametrize("kind", ["standardized", "padded", "hooked"])
    def test_layers_that_do_more_than_convolve(self, kind):
        """timm's ``StdConv2d`` and ``Conv2dSame`` have a forward of their own; hooks may change what goes in or out."""

        class Own(nn.Conv2d):
            def forward(self, x):
                if kind == "padded":
                    return self._conv_forward(nn.functional.pad(x, (0, 1, 0, 2)), self.weight, self.bias)
                return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

        base, x = (nn.Conv2d if kind == "hooked" else Own)(4, 8, 3), torch.randn(2, 4, 9, 7)
        if kind == "hooked":
            base.register_forward_hook(lambda module, args, output: 2 * output)
        expected = base(x)
        layer = OFTConv2d(base, OFTConfig(block_size=12))
        torch.testing.assert_close(layer(x), expected)
        randomize(layer)
        expected = layer(x)
        expected.sum().backward()
        assert layer.generators["default"].grad.all()
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    @pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "own"])
    def test_weights_that_are_computed_in_each_pass(self, norm):
        layer = OFTConv2d(norm(nn.Conv2d(4, 8, 3)), OFTConfig(block_size=12))
        randomize(layer)
        x = torch.randn(2, 4, 9, 7)
        bias, before = layer.bias[:, None, None], layer(x)
        for name, parameter in layer.base_layer.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter.data.mul_(2)
        torch.testing.assert_close(layer(x) - bias, 2 * (before - bias))
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
