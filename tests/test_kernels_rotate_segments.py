"""Segments of rows with rotations and weights of their own: plain torch and kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close, record_calls
from oftv2 import functional as F
from oftv2 import reference

ops = torch.ops.oftv2
ROUNDING = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
# rows of each segment, blocks
CASES = [
    ((5, 0, 70, 1, 33), (3, 32)),
    ((0, 0, 3), (2, 16)),
    ((300, 1), (2, 8)),
    ((9, 20), (3, 12)),
    ((7,), (2, 64)),
    ((40, 0), (1, 128)),
    ((2, 20), (1, 256)),
    ((1,) * 20, (5, 5)),
    ((0, 0), (2, 8)),
]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def launches(monkeypatch, device):
    """Names of the kernel launchers that were called, so that no test compares plain torch with itself."""
    from oftv2.kernels import rotate_segments

    return record_calls(monkeypatch, {rotate_segments: ["rotate_segments", "rotate_segments_delta_grad"]})


def problem(lengths, blocks, dtype=torch.float64):
    """x, an upstream gradient, Δ and the ends of the segments; in float64, x as ``dtype`` holds it."""
    r, b = blocks
    x, upstream = torch.randn(2, sum(lengths), r * b, dtype=torch.float64).to(dtype).double()
    generators = torch.randn(len(lengths) * r, b * (b - 1) // 2, dtype=torch.float64) * 0.3 / b**0.5
    ends = torch.tensor(lengths).cumsum(0).int()
    return x, upstream, F.cayley(generators, b).unflatten(0, (len(lengths), r)).float().double(), ends


def one_by_one(x, deltas, ends):
    """The reference: every segment on its own."""
    parts = x.tensor_split(ends[:-1].tolist())
    identity = torch.eye(deltas.shape[-1], dtype=deltas.dtype)
    return torch.cat([reference.rotate(part, delta + identity) for part, delta in zip(parts, deltas, strict=True)])


def compare(device, dtype, lengths, blocks, times=None):
    """With ``times``, rows are fetched by an order from tokens, which get the sum of their gradients."""
    x, upstream, deltas, ends = problem(lengths, blocks, dtype)
    order = None if times is None else torch.randperm(len(x))
    x = x if times is None else x[: len(x) // times]
    x_ref, deltas_ref = x.clone().requires_grad_(), deltas.clone().requires_grad_()
    expected = one_by_one(x_ref if order is None else x_ref[order // times], deltas_ref, ends)
    expected.backward(upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_in, deltas_in = x.to(device, dtype).requires_grad_(), deltas.to(device, wide).requires_grad_()
    actual = ops.rotate_segments(x_in, deltas_in, ends.to(device), order if order is None else order.to(device))
    actual.backward(upstream.to(device, dtype))
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_close("x̂", actual.detach().cpu(), expected.detach(), ROUNDING[dtype])
    assert_close("∂x", x_in.grad.cpu(), x_ref.grad, ROUNDING[dtype])
    assert_close("∂Δ", deltas_in.grad.cpu(), deltas_ref.grad, max(ROUNDING[wide], 1e-13))
    assert not deltas_in.grad[[length == 0 for length in lengths]].any()


ORDERED = [((5, 0, 70, 1, 32), (3, 32), 4), ((9, 21), (3, 12), 1), ((30,), (2, 64), 3), ((1,) * 20, (5, 5), 2)]


class TestDefault:
    @DTYPES
    @pytest.mark.parametrize(("lengths", "blocks"), CASES, ids=str)
    def test_equals_the_segments_one_by_one(self, lengths, blocks, dtype):
        compare("cpu", dtype, lengths, blocks)

    @DTYPES
    @pytest.mark.parametrize(("lengths", "blocks", "times"), ORDERED, ids=str)
    def test_rows_in_an_order(self, lengths, blocks, times, dtype):
        compare("cpu", dtype, lengths, blocks, times)

    @DTYPES
    @pytest.mark.parametrize("transposed", [False, True])
    def test_products(self, dtype, transposed):
        lengths = (5, 0, 12, 1)
        x, upstream = torch.randn(18, 24, dtype=dtype), torch.randn(18, 40, dtype=dtype)
        weight = torch.randn(4, 40, 24, dtype=dtype).mT if transposed else torch.randn(4, 24, 40, dtype=dtype)
        ends = torch.tensor(lengths).cumsum(0).int()
        actual = ops.segment_matmul(x.requires_grad_(), weight, ends)
        actual.backward(upstream)
        parts, wide = zip(x.detach().double().split(lengths), weight.double(), strict=True), weight.double().mT
        assert_close("y", actual.detach(), torch.cat([part @ own for part, own in parts]), ROUNDING[dtype])
        back = zip(upstream.double().split(lengths), wide, strict=True)
        assert_close("∂x", x.grad, torch.cat([part @ own for part, own in back]), ROUNDING[dtype])

    def test_gradcheck(self):
        x, _, deltas, ends = problem((2, 0, 3), (2, 4))
        arguments = (x.requires_grad_(), deltas.requires_grad_())
        assert torch.autograd.gradcheck(lambda x, deltas: ops.rotate_segments(x, deltas, ends), arguments)
        weight = torch.randn(3, 8, 5, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: ops.segment_matmul(x, weight, ends), (x,))

    def test_a_weight_that_would_train_is_refused(self):
        weight, ends = torch.randn(1, 4, 4, requires_grad=True), torch.tensor([2], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="no gradient for its weight"):
            ops.segment_matmul(torch.randn(2, 4), weight, ends).sum().backward()

    @pytest.mark.parametrize(
        ("x", "deltas", "ends", "message"),
        [
            ((5, 8), (2, 4, 4), [5], r"Δ of \(E, r, b, b\), not \(2, 4, 4\)"),
            ((5, 9), (1, 2, 4, 4), [5], "x has 9 features"),
            ((1, 5, 8), (1, 2, 4, 4), [5], r"x of \(S, d\) and int32 ends of \(1,\), not \(1, 5, 8\)"),
            ((5, 8), (1, 2, 4, 4), [2, 5], r"int32 ends of \(1,\), not \(5, 8\) and \(2,\)"),
            ((5, 8), (2, 2, 4, 4), [2, 4], r"rise up to the number of rows, 5, not \[2, 4\]"),
            ((5, 8), (2, 2, 4, 4), [2, 6], r"rise up to the number of rows, 5, not \[2, 6\]"),
            ((5, 8), (2, 2, 4, 4), [6, 5], r"rise up to the number of rows, 5, not \[6, 5\]"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, x, deltas, ends, message):
        with pytest.raises(RuntimeError, match=message):
            ops.rotate_segments(torch.randn(x), torch.randn(deltas), torch.tensor(ends, dtype=torch.int32))

    @pytest.mark.parametrize(
        "order", [torch.zeros(7, dtype=torch.int64), torch.zeros(10, dtype=torch.int32), torch.zeros(5, 2).long()]
    )
    def test_an_order_that_does_not_fit_is_refused(self, order):
        with pytest.raises(RuntimeError, match="an int64 order of a multiple of the 5 rows of x"):
            ops.rotate_segments(torch.randn(5, 8), torch.randn(1, 2, 4, 4), torch.tensor([10]).int(), order)

    @pytest.mark.parametrize(
        ("x", "weight", "dtype", "message"),
        [
            ((5, 8), (1, 9, 4), torch.float32, r"not \(5, 8\) in torch.float32 and \(1, 9, 4\)"),
            ((5, 8), (8, 4), torch.float32, r"and \(8, 4\)"),
            ((5, 8), (1, 8, 4), torch.bfloat16, r"in one dtype, .* in torch.bfloat16"),
            ((5, 8), (2, 8, 4), torch.float32, r"int32 ends of \(2,\)"),
        ],
    )
    def test_a_product_that_does_not_fit_is_refused(self, x, weight, dtype, message):
        with pytest.raises(RuntimeError, match=message):
            ops.segment_matmul(torch.randn(x), torch.randn(weight, dtype=dtype), torch.tensor([5], dtype=torch.int32))


class TestKernels:
    @DTYPES
    @pytest.mark.parametrize(("lengths", "blocks"), CASES, ids=str)
    def test_equals_the_segments_one_by_one(self, device, launches, lengths, blocks, dtype):
        compare(device, dtype, lengths, blocks)
        plain = dtype == torch.float64 or (dtype == torch.float32 and blocks[1] > 64)
        assert launches == ([] if plain else ["rotate_segments", "rotate_segments", "rotate_segments_delta_grad"])

    @DTYPES
    @pytest.mark.parametrize(("lengths", "blocks", "times"), ORDERED, ids=str)
    def test_rows_in_an_order(self, device, launches, lengths, blocks, times, dtype):
        compare(device, dtype, lengths, blocks, times)
        assert len(launches) == (0 if dtype == torch.float64 else 3)

    def test_many_shares_of_few_long_segments(self, device, launches):
        compare(device, torch.float32, (1000, 3), (1, 16))
        assert len(launches) == 3

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
    def test_layouts(self, device, launches, layout):
        x = {
            "transposed": lambda: torch.randn(64, 20).t(),
            "sliced": lambda: torch.randn(20, 200)[:, 3:131:2],
            "offset": lambda: torch.randn(21, 65)[1:, 1:],
        }[layout]().to(device)
        deltas = 0.1 * torch.randn(2, 2, 32, 32, device=device)
        ends = torch.tensor([7, 0, 20], device=device, dtype=torch.int32)[::2]
        for given in (deltas, deltas.mT, deltas[:, :1].expand(2, 2, 32, 32), deltas.flip(0)):
            expected = one_by_one(x.double().cpu(), given.double().cpu(), ends.cpu())
            assert_close("x̂", ops.rotate_segments(x, given, ends).cpu(), expected, 2e-6)
        assert launches == ["rotate_segments"] * 4

    def test_two_runs_give_equal_bits(self, device):
        x, grad, deltas, ends = problem((6, 70), (2, 32))
        arguments = grad.to(device).bfloat16(), x.to(device).bfloat16(), deltas.float().to(device)
        first, second = (ops.rotate_segments_delta_grad(*arguments, ends.to(device)) for _ in range(2))
        assert torch.equal(first, second)

    def test_what_is_not_written_is_not_zero_by_luck(self, device, monkeypatch):
        """Outputs are allocated full of NaN; every element has to be written, of segments without rows too."""
        x, grad, deltas, ends = problem((6, 0, 45), (7, 12), torch.float32)
        arguments = [tensor.float().to(device) for tensor in (x, deltas)]
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
        ends = ends.to(device)
        assert ops.rotate_segments(*arguments, ends).isfinite().all()
        totals = ops.rotate_segments_delta_grad(grad.float().to(device), *arguments, ends)
        assert totals.isfinite().all()
        assert [bool(total.any()) for total in totals] == [True, False, True]

    def test_offsets_beyond_2_to_the_31(self, device, launches):
        """Tokens far apart, in memory that is never touched but there."""
        memory = torch.empty(2**31 + 2**11, dtype=torch.bfloat16, device=device)
        x, grad = torch.randn(2, 3, 32).bfloat16().to(device)
        deltas = (0.1 * torch.randn(2, 1, 32, 32)).bfloat16().to(device)
        ends = torch.tensor([1, 3], dtype=torch.int32, device=device)
        apart = memory.as_strided(x.shape, (2**30, 1))
        apart.copy_(x)
        for op, *rest in ((ops.rotate_segments,), (ops.rotate_segments_delta_grad, grad)):
            assert torch.equal(op(*rest, apart, deltas, ends), op(*rest, x, deltas, ends))
        assert len(launches) == 4


def test_opcheck(device):
    x, grad, deltas, ends = (tensor.to(device) for tensor in problem((4, 3), (3, 4)))
    x, grad, deltas = x.float(), grad.float(), deltas.float()
    cases = {
        ops.rotate_segments: (x.clone().requires_grad_(), deltas.clone().requires_grad_(), ends),
        ops.rotate_segments_delta_grad: (grad, x[::7].clone(), deltas, ends, torch.randperm(7, device=device)),
        ops.segment_matmul: (x.clone().requires_grad_(), torch.randn(2, 12, 8, device=device), ends),
    }
    for op, args in cases.items():
        torch.library.opcheck(op.default, args)
