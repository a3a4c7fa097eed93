"""The operators against the float64 reference: values, every gradient, schemas, odd shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from conftest import assert_close
from oftv2 import functional as F
from oftv2 import reference
from oftv2._ops import FEW_TOKENS

ops = torch.ops.oftv2


def packed(r: int, b: int, std: float = 0.1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(r, b * (b - 1) // 2, dtype=dtype) * std


# What rounding alone costs, with room for the order of summation: a few units of the dtype's precision.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


class TestReference:
    def test_skew_is_packed_row_by_row(self):
        Q = reference.skew(torch.arange(1.0, 4.0)[None], 3)
        assert Q.tolist() == [[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]]

    @given(b=st.integers(2, 12), r=st.integers(1, 4))
    def test_pack_inverts_skew(self, b, r):
        generators = packed(r, b)
        Q = reference.skew(generators, b)
        assert torch.equal(Q, -Q.mT)
        assert torch.equal(reference.pack(Q), generators)

    def test_series_approaches_the_exact_transform_from_the_same_side(self):
        Q = reference.skew(packed(3, 8, std=0.05), 8)
        exact = reference.cayley(Q)
        errors = [torch.dist(reference.cayley_neumann(Q, k), exact).item() for k in range(1, 9)]
        assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
    def test_distance_from_orthogonal_is_as_derived(self, k):
        Q = reference.skew(packed(2, 6, std=0.2), 6)
        R = reference.cayley_neumann(Q, k)
        identity = torch.eye(6, dtype=Q.dtype)
        power = torch.linalg.matrix_power
        if k % 2 == 0:
            expected = identity - power(Q, 2 * k + 2)
        else:
            expected = identity - 2 * power(Q, k + 1) + power(Q, 2 * k + 2)
        torch.testing.assert_close(R.mT @ R, expected, rtol=0, atol=1e-12)

    def test_merged_weight_is_the_same_function(self):
        x, W, R = (
            torch.randn(5, 12).double(),
            torch.randn(7, 12).double(),
            reference.cayley(reference.skew(packed(3, 4), 4)),
        )
        torch.testing.assert_close(reference.oft_linear(x, R, W), x @ reference.merge_weight(W, R).mT)

    def test_rotation_keeps_norms_block_by_block(self):
        x, R = torch.randn(5, 12).double(), reference.cayley(reference.skew(packed(3, 4, std=1.0), 4))
        torch.testing.assert_close(reference.rotate(x, R).view(5, 3, 4).norm(dim=2), x.view(5, 3, 4).norm(dim=2))


class TestCayley:
    @pytest.mark.parametrize("b", [2, 3, 8, 13, 32, 64])
    @pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8])
    def test_neumann_value_and_gradient(self, b, k):
        generators = packed(3, b, std=0.3 / b).requires_grad_()
        delta = F.cayley_neumann(generators, b, k)
        expected = reference.cayley_neumann(reference.skew(generators, b), k) - torch.eye(b, dtype=torch.float64)
        upstream = torch.randn_like(delta)
        assert_close("Δ", delta, expected, 1e-13)
        grads = [torch.autograd.grad(value, generators, upstream)[0] for value in (delta, expected)]
        assert_close("gradient", *grads, 1e-13)

    @pytest.mark.parametrize("b", [2, 5, 32])
    def test_exact_value_and_gradient(self, b):
        generators = packed(3, b, std=0.5).requires_grad_()
        delta = F.cayley(generators, b)
        expected = reference.cayley(reference.skew(generators, b)) - torch.eye(b, dtype=torch.float64)
        upstream = torch.randn_like(delta)
        assert_close("Δ", delta, expected, 1e-12)
        grads = [torch.autograd.grad(value, generators, upstream)[0] for value in (delta, expected)]
        assert_close("gradient", *grads, 1e-11)

    def test_the_exact_transform_does_not_wait_for_the_device(self):
        """No check for singular matrices, which reads a result."""
        with profile(activities=[ProfilerActivity.CPU]) as done:
            F.cayley(packed(3, 8), 8)
        names = {event.name for event in done.events()}
        assert "aten::linalg_solve_ex" in names
        assert "aten::_linalg_check_errors" not in names

    def test_zero_generators_are_exactly_the_identity(self):
        zero = torch.zeros(3, 28)
        assert not F.cayley_neumann(zero, 8).any()
        assert not F.cayley(zero, 8).any()

    @pytest.mark.parametrize("b", [2, 7, 32, 128])
    def test_float32_keeps_relative_precision_near_the_identity(self, b):
        generators = packed(2, b, std=1e-4)
        expected = F.cayley_neumann(generators, b)
        assert_close("Δ", F.cayley_neumann(generators.float(), b), expected, 1e-6)

    def test_gradcheck(self):
        generators = packed(2, 4, std=0.2).requires_grad_()
        assert torch.autograd.gradcheck(lambda g: F.cayley(g, 4), (generators,))
        for k in (1, 2, 3, 4):
            assert torch.autograd.gradcheck(lambda g, k=k: F.cayley_neumann(g, 4, k), (generators,))

    def test_wrong_shape_and_dtype_are_refused(self):
        with pytest.raises(ValueError, match=r"block_size=8 have the shape \(r, 28\), not \(3, 27\)"):
            F.cayley_neumann(torch.zeros(3, 27), 8)
        with pytest.raises(TypeError, match=r"float32 or float64, not torch\.bfloat16"):
            F.cayley(torch.zeros(3, 28, dtype=torch.bfloat16), 8)


class TestRotate:
    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    @pytest.mark.parametrize(
        ("shape", "b"),
        [
            ((24,), 8),
            ((1, 24), 8),
            ((5, 24), 3),
            ((63, 60), 30),
            ((2, 3, 64), 64),
            ((2, 2, 2, 33, 32), 16),
            ((FEW_TOKENS + 44, 8), 2),
        ],
        ids=str,
    )
    def test_value_and_gradients(self, shape, b, dtype):
        r = shape[-1] // b
        x = torch.randn(shape).to(dtype)
        delta = F.cayley_neumann(packed(r, b, std=0.5 / b), b)
        grad = torch.randn(shape).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x_in, delta_in = x.clone().requires_grad_(), delta.to(wide).requires_grad_()
        out = F.rotate(x_in, delta_in)
        assert out.dtype == dtype
        assert out.is_contiguous()
        x_ref, delta_ref = x.double().requires_grad_(), delta.requires_grad_()
        expected = reference.rotate(x_ref, delta_ref + torch.eye(b, dtype=torch.float64))
        assert_close("x̂", out, expected, ROUNDING[dtype])
        out.backward(grad)
        expected.backward(grad.double())
        assert x_in.grad.dtype == dtype
        assert delta_in.grad.dtype == wide
        assert_close("∂x", x_in.grad, x_ref.grad, ROUNDING[dtype])
        assert_close("∂Δ", delta_in.grad, delta_ref.grad, 1e-13 if dtype == torch.float64 else 2e-6)

    @settings(max_examples=40)
    @given(
        b=st.integers(2, 40),
        r=st.integers(1, 5),
        leading=st.lists(st.integers(0, 4), max_size=3),
        layout=st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
        dtype=st.sampled_from(list(ROUNDING)),
    )
    def test_any_shape_layout_and_dtype(self, b, r, leading, layout, dtype):
        d = b * r
        x = torch.randn(*leading, d).to(dtype)
        if layout == "transposed" and x.dim() > 1:
            x = x.movedim(0, -1).contiguous().movedim(-1, 0)
        elif layout == "sliced":
            x = torch.randn(*leading, 2 * d + 1).to(dtype)[..., 1 : 2 * d : 2]
        elif layout == "expanded" and x.dim() > 1:
            x = x[:1].expand(x.shape)
        x = x.detach().requires_grad_()
        delta = torch.randn(r, b, b, dtype=torch.promote_types(dtype, torch.float32)) * 0.1
        delta.requires_grad_()
        x_ref, delta_ref = (t.detach().double().requires_grad_() for t in (x, delta))
        out = F.rotate(x, delta)
        expected = reference.rotate(x_ref, delta_ref + torch.eye(b, dtype=torch.float64))
        assert out.shape == expected.shape
        assert_close("x̂", out, expected, ROUNDING[dtype])
        upstream = torch.randn(out.shape).to(dtype)
        actual = torch.autograd.grad(out, (x, delta), upstream)
        wanted = torch.autograd.grad(expected, (x_ref, delta_ref), upstream.double())
        assert_close("∂x", actual[0], wanted[0], ROUNDING[dtype])
        assert_close("∂Δ", actual[1], wanted[1], 1e-13 if dtype == torch.float64 else 2e-6)

    @pytest.mark.parametrize("tokens", [0, 1, FEW_TOKENS - 1, FEW_TOKENS, 4000])
    @pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
    def test_token_counts_around_the_thresholds(self, tokens, layout):
        x, delta = torch.randn(tokens, 300), torch.randn(10, 30, 30) * 0.1
        if layout == "transposed":
            x = x.t().contiguous().t()
        elif layout == "sliced":
            x = torch.randn(tokens, 601)[:, 1::2]
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            R = (delta.double() + torch.eye(30)).requires_grad_()
            wide = x.to(dtype).double().requires_grad_()
            out = ops.rotate(x.to(dtype), delta)
            expected = reference.rotate(wide, R)
            assert out.is_contiguous()
            assert_close("x̂", out, expected, ROUNDING[dtype])
            dx, ddelta = ops.rotate_backward(out, x.to(dtype), delta)
            expected.backward(out.double())
            assert dx.is_contiguous()
            assert_close("∂x", dx, wide.grad, ROUNDING[dtype])
            assert_close("∂Δ", ddelta, R.grad, 2e-6)

    def test_without_onednn(self):
        x, delta = torch.randn(FEW_TOKENS + 44, 60), torch.randn(5, 12, 12) * 0.1
        with torch.backends.mkldnn.flags(enabled=False):
            without = F.rotate(x, delta)
        assert_close("x̂", without, F.rotate(x, delta), ROUNDING[torch.float32])

    def test_zero_generators_are_the_identity_bit_for_bit(self):
        for dtype, tokens in itertools.product(ROUNDING, (1, FEW_TOKENS - 1, FEW_TOKENS, 4000)):
            x = torch.randn(tokens, 96).to(dtype)
            assert torch.equal(F.rotate(x, F.cayley_neumann(torch.zeros(3, 496), 32)), x)
            with torch.no_grad():
                assert torch.equal(F.rotate(x, F.cayley_neumann(torch.zeros(3, 496), 32)), x)

    def test_without_gradients_autocast_and_wrong_shapes_are_handled_alike(self):
        x, delta = torch.randn(4, 12), torch.randn(3, 4, 4)
        expected = F.rotate(x, delta)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(F.rotate(x, delta), expected)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="x has 13 features"):
                F.rotate(torch.randn(13), delta)
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"takes x of \(\.\.\., d\)"):
                F.rotate(torch.tensor(1.0), delta)

    @pytest.mark.parametrize("std", [0.001, 0.005, 0.02])
    def test_16_bit_keeps_small_rotations(self, std):
        """Cast to bf16, R near the identity loses the rotation; Δ keeps it: 0.3% of its effect, before rounding x̂."""
        delta = F.cayley(packed(4, 32, std=std), 32)
        x = torch.randn(256, 128, dtype=torch.float64).bfloat16()
        exact = reference.rotate(x.double(), delta)
        effect = ops.rotate(x, delta.float()).double() - x.double()
        rounding = (torch.finfo(torch.bfloat16).eps / 2) * x.double().abs().mul(1.2)
        inside = (effect - exact).abs() <= 3e-3 * exact.abs() + rounding
        assert inside.double().mean() > 0.999

    def test_zero_delta_changes_no_bit(self):
        for dtype in ROUNDING:
            x = torch.randn(70, 64).to(dtype)
            assert torch.equal(ops.rotate(x, torch.zeros(2, 32, 32)), x)

    @pytest.mark.parametrize(("wants_x", "wants_delta"), [(True, False), (False, True)])
    def test_only_the_wanted_gradient(self, wants_x, wants_delta):
        x = torch.randn(70, 12, dtype=torch.float64, requires_grad=wants_x)
        delta = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=wants_delta)
        F.rotate(x, delta).square().sum().backward()
        assert (x.grad is not None) == wants_x
        assert (delta.grad is not None) == wants_delta
        both = [t.detach().requires_grad_() for t in (x, delta)]
        F.rotate(*both).square().sum().backward()
        torch.testing.assert_close(x.grad if wants_x else delta.grad, both[0 if wants_x else 1].grad)

    @pytest.mark.usefixtures("two_threads")
    def test_two_runs_give_equal_bits(self):
        x, g, delta = torch.randn(777, 96), torch.randn(777, 96), torch.randn(3, 32, 32) * 0.1
        first, second = ops.rotate_backward(g, x, delta), ops.rotate_backward(g, x, delta)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_sizes_that_do_not_fit_are_refused(self):
        with pytest.raises(RuntimeError, match=r"x has 13 features, and Δ of \(3, 4, 4\) rotates 12"):
            F.rotate(torch.zeros(2, 13), torch.zeros(3, 4, 4))


class TestRegistration:
    def test_opcheck(self):
        generators = packed(3, 4, dtype=torch.float32).requires_grad_()
        delta = torch.randn(3, 4, 4)
        x = torch.randn(2, 5, 12)
        cases = {
            ops.cayley_neumann: (generators, 4, 4),
            ops.cayley_neumann_backward: (delta, generators.detach(), 4, 4),
            ops.cayley: (generators, 4),
            ops.cayley_backward: (delta, delta),
            ops.rotate: (x.clone().requires_grad_(), delta.clone().requires_grad_()),
            ops.rotate_backward: (x, x, delta),
            ops.rotate_delta_grad: (x, x, delta),
        }
        for op, args in cases.items():
            torch.library.opcheck(op.default, args)

    def test_autocast_leaves_the_blocks_in_float32(self):
        generators, x = packed(3, 8, dtype=torch.float32), torch.randn(70, 24)
        expected = F.rotate(x, F.cayley_neumann(generators, 8))
        with torch.autocast("cpu", torch.bfloat16):
            out = F.rotate(x, F.cayley_neumann(generators, 8))
        assert torch.equal(out, expected)
