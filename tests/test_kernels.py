"""The Triton kernels behind the operators, against the float64 reference: in the interpreter, or on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close, record_calls
from oftv2 import functional as F
from oftv2 import reference

ops = torch.ops.oftv2


# What rounding alone costs, with room for the order of summation; Δ is rounded to 16 bit as well.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
pytestmark = pytest.mark.timeout(300)


def packed(r, b, std=0.3):
    """Packed generators in float64, with blocks of spectral norm about 2·std."""
    return torch.randn(r, b * (b - 1) // 2, dtype=torch.float64) * std / b**0.5


def rounded(*shape, dtype):
    """Random numbers that ``dtype`` holds exactly, in float64."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).double()


def on(device, dtype, *tensors):
    return [tensor.to(device, dtype) for tensor in tensors]


@pytest.fixture
def launches(monkeypatch, device):
    """Names of the kernel launchers that were called, so that no test compares plain torch with itself."""
    from oftv2.kernels import cayley, rotate

    return record_calls(
        monkeypatch, {cayley: ["cayley_neumann", "cayley_neumann_backward"], rotate: ["rotate", "rotate_backward"]}
    )


class TestCayley:
    @pytest.mark.parametrize("terms", [4, 1, 2, 3, 5, 6, 7])
    @pytest.mark.parametrize(("r", "b"), [(3, 32), (7, 5), (5, 16), (2, 30), (1, 2)], ids=str)
    def test_value_and_gradient(self, device, launches, r, b, terms):
        generators = packed(r, b).requires_grad_()
        expected = reference.cayley_neumann(reference.skew(generators, b), terms) - torch.eye(b)
        upstream = torch.randn(r, b, b, dtype=torch.float64)
        expected.backward(upstream)
        (actual_in,) = on(device, torch.float32, generators.detach())
        actual_in.requires_grad_()
        actual = F.cayley_neumann(actual_in, b, terms)
        actual.backward(upstream.to(actual))
        assert launches == ["cayley_neumann", "cayley_neumann_backward"]
        assert_close("Δ", actual.cpu(), expected.detach(), 2e-6)
        assert_close("∂generators", actual_in.grad.cpu(), generators.grad, 4e-6)

    def test_many_layers_share_a_launch(self, device, launches):
        layers = [p.float().to(device).requires_grad_() for p in (packed(2, 8), packed(5, 8), packed(1, 8))]
        together = F.cayley_neumann_many(layers, 8)
        assert launches == ["cayley_neumann"]
        sum((i + 1) * delta.sum() for i, delta in enumerate(together)).backward()
        assert launches == ["cayley_neumann", "cayley_neumann_backward"]
        for i, (layer, delta) in enumerate(zip(layers, together, strict=True)):
            alone = layer.detach().requires_grad_()
            expected = F.cayley_neumann(alone, 8)
            assert torch.equal(delta, expected)
            ((i + 1) * expected.sum()).backward()
            torch.testing.assert_close(layer.grad, alone.grad)

    @pytest.mark.parametrize(("r", "b", "std"), [(3, 32, 0.05), (7, 5, 0.3), (12, 2, 1.5), (2, 32, 1.0), (1, 16, 0.0)])
    def test_gradient_of_the_weight_form(self, device, r, b, std):
        """``xᵀ∂x R⁻ᵀ``, also where R is far from orthogonal and Newton's iteration has to start elsewhere."""
        delta = F.cayley_neumann(packed(r, b, std), b)
        x, grad_x = torch.randn(2, 50, r * b, dtype=torch.float64)
        products = torch.einsum("tri,trj->rij", x.view(50, r, b), grad_x.view(50, r, b))
        expected = products @ torch.linalg.inv(delta + torch.eye(b)).mT
        actual = ops.weight_form_delta_grad(*on(device, torch.float32, grad_x, x, delta))
        assert_close("∂Δ", actual.cpu(), expected, 1e-5 if std <= 1 else 1e-4)

    def test_gradient_of_the_weight_form_ends_on_nan(self, device):
        x, delta = torch.randn(20, 8, device=device), torch.full((2, 4, 4), float("nan"), device=device)
        assert ops.weight_form_delta_grad(x, x, delta).isnan().all()

    def test_wide_blocks_and_float64_go_to_plain_torch(self, device, launches):
        for dtype, b in ((torch.float32, 64), (torch.float64, 8)):
            (generators,) = on(device, dtype, packed(2, b))
            expected = reference.cayley_neumann(reference.skew(packed(2, b).to(dtype), b), 4)
            assert F.cayley_neumann(generators, b).shape == expected.shape
        assert launches == []


SHAPES = [
    ((2, 35), 32, 96),
    ((37,), 8, 40),
    ((1,), 32, 64),
    ((33,), 12, 36),
    ((3, 2, 9), 30, 60),
    ((65,), 64, 64),
    ((17,), 5, 35),
    ((50,), 2, 10),
    ((0,), 32, 64),
    ((), 16, 32),
]


class TestRotate:
    @DTYPES
    @pytest.mark.parametrize(("leading", "b", "d"), [*SHAPES, ((40,), 128, 256), ((20,), 256, 256)], ids=str)
    def test_value_and_gradients(self, device, launches, leading, b, d, dtype):
        x, upstream = rounded(*leading, d, dtype=dtype), rounded(*leading, d, dtype=dtype)
        delta = F.cayley(packed(d // b, b), b)
        x_ref, delta_ref = x.clone().requires_grad_(), delta.clone().requires_grad_()
        expected = reference.rotate(x_ref, delta_ref + torch.eye(b))
        expected.backward(upstream)
        x_in, grad_in = on(device, dtype, x, upstream)
        (delta_in,) = on(device, torch.float32, delta)
        x_in.requires_grad_()
        delta_in.requires_grad_()
        actual = F.rotate(x_in, delta_in)
        actual.backward(grad_in)
        kernels = ["rotate", "rotate_backward"]
        assert launches == ([] if dtype == torch.float32 and b > 64 else kernels)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_close("x̂", actual.cpu(), expected.detach(), ROUNDING[dtype])
        assert_close("∂x", x_in.grad.cpu(), x_ref.grad, ROUNDING[dtype])
        assert_close("∂Δ", delta_in.grad.cpu(), delta_ref.grad, 4e-6)

    @pytest.mark.parametrize("wanted", ["x", "delta"])
    def test_only_the_wanted_gradient(self, device, wanted):
        x, upstream = torch.randn(40, 64, device=device), torch.randn(40, 64, device=device)
        delta = 0.1 * torch.randn(2, 32, 32, device=device)
        both = [x.clone().requires_grad_(), delta.clone().requires_grad_()]
        F.rotate(*both).backward(upstream)
        one = [x.clone().requires_grad_(wanted == "x"), delta.clone().requires_grad_(wanted == "delta")]
        F.rotate(*one).backward(upstream)
        index = 0 if wanted == "x" else 1
        torch.testing.assert_close(one[index].grad, both[index].grad)
        assert one[1 - index].grad is None

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
    def test_layouts(self, device, launches, layout):
        x = {
            "transposed": lambda: torch.randn(64, 40).mT,
            "sliced": lambda: torch.randn(40, 200)[:, 3:131:2],
            "expanded": lambda: torch.randn(1, 64).expand(40, 64),
            "offset": lambda: torch.randn(41, 65)[1:, 1:],
        }[layout]().to(device)
        delta = 0.1 * torch.randn(2, 32, 32, device=device)
        assert x.shape == (40, 64)
        expected = reference.rotate(x.double().cpu(), delta.double().cpu() + torch.eye(32))
        assert_close("x̂", F.rotate(x, delta).cpu(), expected, 2e-6)
        transposed = reference.rotate(x.double().cpu(), delta.double().cpu().mT + torch.eye(32))
        assert_close("x̂ of Δᵀ", F.rotate(x, delta.mT).cpu(), transposed, 2e-6)
        shared = delta[:1].expand(2, -1, -1)
        expected = reference.rotate(x.double().cpu(), shared.double().cpu() + torch.eye(32))
        assert_close("x̂ of a shared block", F.rotate(x, shared).cpu(), expected, 2e-6)
        assert launches == ["rotate"] * 3

    @DTYPES
    def test_zero_delta_changes_no_bit(self, device, launches, dtype):
        x = torch.randn(70, 64, device=device).to(dtype)
        generators = torch.zeros(2, 496, device=device)
        assert torch.equal(F.rotate(x, torch.zeros(2, 32, 32, device=device)), x)
        assert torch.equal(ops.neumann_rotate(x, generators, 32, 4), x)
        assert launches == ["rotate", "rotate"]

    def test_offsets_beyond_2_to_the_31(self, device, launches):
        """Rows 2³⁰ elements apart, in memory that is never touched but there."""
        apart = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
        x, grad = torch.randn(2, 3, 64).bfloat16().to(device)
        apart.copy_(x)
        delta = 0.1 * torch.randn(2, 32, 32, device=device)
        assert torch.equal(F.rotate(apart, delta), F.rotate(x, delta))
        for actual, expected in zip(
            ops.rotate_backward(grad, apart, delta), ops.rotate_backward(grad, x, delta), strict=True
        ):
            assert torch.equal(actual, expected)
        generators = packed(2, 32).float().to(device)
        assert torch.equal(ops.neumann_rotate(apart, generators, 32, 4), ops.neumann_rotate(x, generators, 32, 4))
        assert launches == ["rotate", "rotate", "rotate_backward", "rotate_backward", "rotate", "rotate"]

    def test_two_runs_give_equal_bits(self, device):
        x, grad = torch.randn(2, 777, 96, device=device).bfloat16()
        delta, generators = torch.randn(3, 32, 32, device=device), packed(3, 32).float().to(device)
        first, second = (ops.rotate_backward(grad, x, delta) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        first, second = (ops.neumann_rotate_backward(grad, x, generators, 32, 4) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("std", [0.001, 0.005, 0.02])
    def test_16_bit_keeps_small_rotations(self, device, std):
        """Cast to bf16, R near the identity loses the rotation; Δ keeps it: 0.8% of its effect, before rounding x̂."""
        delta = F.cayley(torch.randn(4, 496, dtype=torch.float64) * std, 32)
        x = rounded(256, 128, dtype=torch.bfloat16)
        exact = reference.rotate(x, delta)
        actual = F.rotate(x.to(device, torch.bfloat16), delta.float().to(device)).cpu().double()
        rounding = (torch.finfo(torch.bfloat16).eps / 2) * x.abs().mul(1.2)
        inside = (actual - x - exact).abs() <= 8e-3 * exact.square().mean().sqrt() + rounding
        assert inside.double().mean() > 0.999

    def test_what_is_not_written_is_not_zero_by_luck(self, device, monkeypatch):
        """Outputs are allocated full of NaN; every element has to be written."""
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
        x, grad = torch.randn(2, 45, 84, device=device)
        delta = 0.1 * torch.randn(7, 12, 12, device=device)
        assert F.rotate(x, delta).isfinite().all()
        assert all(part.isfinite().all() for part in ops.rotate_backward(grad, x, delta))


class TestFromGenerators:
    @DTYPES
    @pytest.mark.parametrize(("leading", "b", "d"), [s for s in SHAPES if s[1] <= 32], ids=str)
    def test_value_and_gradients(self, device, launches, leading, b, d, dtype):
        x, upstream = rounded(*leading, d, dtype=dtype), rounded(*leading, d, dtype=dtype)
        generators = packed(d // b, b).float().double()
        x_ref, generators_ref = x.clone().requires_grad_(), generators.clone().requires_grad_()
        expected = reference.rotate(x_ref, reference.cayley_neumann(reference.skew(generators_ref, b), 4))
        expected.backward(upstream)
        x_in, grad_in = on(device, dtype, x, upstream)
        (generators_in,) = on(device, torch.float32, generators)
        x_in.requires_grad_()
        generators_in.requires_grad_()
        actual = ops.neumann_rotate(x_in, generators_in, b, 4)
        actual.backward(grad_in)
        assert launches == ["rotate", "rotate_backward", "cayley_neumann_backward"]
        assert_close("x̂", actual.cpu(), expected.detach(), ROUNDING[dtype])
        assert_close("∂x", x_in.grad.cpu(), x_ref.grad, ROUNDING[dtype])
        assert_close("∂generators", generators_in.grad.cpu(), generators_ref.grad, 4e-6)

    def test_without_a_gradient_of_the_generators(self, device, launches):
        x = torch.randn(20, 64, device=device, requires_grad=True)
        generators = packed(2, 32).float().to(device)
        upstream = torch.randn(20, 64, device=device)
        ops.neumann_rotate(x, generators, 32, 4).backward(upstream)
        assert launches == ["rotate", "rotate"]
        expected = F.rotate(upstream, F.cayley_neumann(generators, 32).mT)
        assert_close("∂x", x.grad, expected, 2e-6)


def test_opcheck(device):
    generators = packed(3, 4).float().to(device)
    delta, x = torch.randn(3, 4, 4, device=device), torch.randn(2, 5, 12, device=device)
    grads = [torch.randn_like(x), torch.randn_like(x)]
    cases = {
        ops.cayley_neumann: (generators.clone().requires_grad_(), 4, 4),
        ops.rotate: (x.clone().requires_grad_(), delta.clone().requires_grad_()),
        ops.rotate_backward: (x, x, delta),
        ops.neumann_rotate: (x.clone().requires_grad_(), generators.clone().requires_grad_(), 4, 4),
        ops.neumann_rotate_backward: (x, x, generators, 4, 4),
        ops.rotate_group: (x.clone().requires_grad_(), [delta.clone().requires_grad_(), delta]),
        ops.rotate_group_backward: (grads, x, [delta, delta]),
        ops.rotate_matmul: (x, delta, torch.randn(7, 12, device=device), None),
        ops.weight_form_delta_grad: (x, x, delta),
    }
    for op, args in cases.items():
        torch.library.opcheck(
            op.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_second_derivatives_are_refused(device):
    """A kernel's results would count as constants, and the second derivative be wrong without a word."""
    x, generators = on(device, torch.float32, rounded(3, 16, dtype=torch.float32), packed(2, 8))
    x.requires_grad_()
    for y in (
        F.rotate(x, F.cayley_neumann(generators.requires_grad_(), 8)),
        F.rotate_group(x, [F.cayley(generators, 8)])[0],
    ):
        with pytest.raises(RuntimeError, match=r"rotate(_group)?_backward has no derivative of its own"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)
