"""Rows of a batch rotated by their own Δ: plain torch and the Triton kernels against the float64 reference."""

from __future__ import annotations

import contextlib

import pytest
import torch

import oftv2
from conftest import assert_close, randomize, record_calls
from oftv2 import _row_ops, reference
from oftv2 import functional as F

ops = torch.ops.oftv2
# What rounding alone costs, with room for the order of summation; kernels round Δ to 16 bit as well.
ROUNDING = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
# (B, T), blocks, adapters
SHAPES = [
    ((5, 37), (3, 32), 3),
    ((7, 1), (2, 16), 2),
    ((3, 300), (2, 8), 2),
    ((4, 2, 9), (3, 12), 5),
    ((9,), (2, 32), 4),
    ((2, 33), (2, 64), 1),
    ((3, 40), (1, 128), 2),
    ((2, 20), (1, 256), 2),
    ((6, 3), (5, 5), 64),
    ((0, 4), (2, 8), 2),
    ((3, 0), (2, 8), 2),
]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def launches(monkeypatch, device):
    """Names of the kernel launchers that were called, so that no test compares plain torch with itself."""
    from oftv2.kernels import rotate_rows

    return record_calls(monkeypatch, {rotate_rows: ["rotate_rows", "rotate_rows_delta_grad"]})


def problem(leading, blocks, adapters, dtype=torch.float64):
    """x, an upstream gradient, Δ and the rows' adapters, some of them none; in float64, x as ``dtype`` holds it."""
    r, b = blocks
    x, upstream = torch.randn(2, *leading, r * b, dtype=torch.float64).to(dtype).double()
    generators = torch.randn(adapters * r, b * (b - 1) // 2, dtype=torch.float64) * 0.3 / b**0.5
    rows = 7 * torch.arange(leading[0]) % (adapters + 1) - 1
    return x, upstream, F.cayley(generators, b).unflatten(0, (adapters, r)).float().double(), rows


def one_by_one(x, deltas, rows):
    """The reference: every row on its own."""
    out = [
        row if adapter < 0 else reference.rotate(row, deltas[adapter] + torch.eye(deltas.shape[-1]))
        for row, adapter in zip(x, rows.tolist(), strict=True)
    ]
    return torch.stack(out) if out else x.clone()


def compare(device, dtype, leading, blocks, adapters, index_dtype=torch.int64):
    x, upstream, deltas, rows = problem(leading, blocks, adapters, dtype)
    x_ref, deltas_ref = x.clone().requires_grad_(), deltas.clone().requires_grad_()
    expected = one_by_one(x_ref, deltas_ref, rows)
    # Where no row has an adapter, Δ is not in the graph, and its gradient is zero.
    torch.autograd.backward([expected, 0 * deltas_ref.sum()], [upstream, torch.ones((), dtype=torch.float64)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_in, deltas_in = x.to(device, dtype).requires_grad_(), deltas.to(device, wide).requires_grad_()
    rows_in = rows.to(device, index_dtype)
    actual = F.rotate_rows(x_in, deltas_in, rows_in)
    actual.backward(upstream.to(device, dtype))
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_close("x̂", actual.detach().cpu(), expected.detach(), ROUNDING[dtype])
    assert_close("∂x", x_in.grad.cpu(), x_ref.grad, ROUNDING[dtype])
    assert_close("∂Δ", deltas_in.grad.cpu(), deltas_ref.grad, max(ROUNDING[wide], 1e-13))
    untouched = rows < 0
    assert torch.equal(actual.detach().cpu()[untouched], x_in.detach().cpu()[untouched])
    assert torch.equal(x_in.grad.cpu()[untouched], upstream.to(dtype)[untouched])


class TestDefault:
    @DTYPES
    @pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "by adapter"])
    @pytest.mark.parametrize(("leading", "blocks", "adapters"), SHAPES, ids=str)
    def test_equals_the_rows_one_by_one(self, monkeypatch, leading, blocks, adapters, gathered, dtype):
        monkeypatch.setattr(_row_ops, "_FEW_TOKENS", 1 << 30 if gathered else 0)
        monkeypatch.setattr(_row_ops, "_SMALL", 0)
        compare("cpu", dtype, leading, blocks, adapters)

    @pytest.mark.parametrize(("leading", "blocks", "adapters"), SHAPES[:5], ids=str)
    def test_what_other_devices_do(self, leading, blocks, adapters):
        """The steps that read no index on the host."""
        x, upstream, deltas, rows = problem(leading, blocks, adapters)
        expected = one_by_one(x, deltas, rows)
        assert_close("x̂", _row_ops._rotate_gathered(x, deltas, rows), expected, 1e-13)
        products = _row_ops._products_by_row(upstream, x, deltas)
        total = _row_ops._sum_by_adapter(products, torch.empty_like(deltas), rows)
        assert_close("∂Δ", total, ops.rotate_rows_delta_grad(upstream, x, deltas, rows), 1e-13)

    def test_gradcheck(self):
        x, _, deltas, rows = problem((4, 3), (2, 4), 3)
        assert rows.tolist() == [-1, 2, 1, 0]
        arguments = (x.requires_grad_(), deltas.requires_grad_())
        assert torch.autograd.gradcheck(lambda x, deltas: F.rotate_rows(x, deltas, rows), arguments)

    def test_without_any_adapter(self):
        x = torch.randn(3, 2, 8, requires_grad=True)
        rows = torch.full((3,), -1)
        for deltas in (torch.randn(0, 2, 4, 4), torch.randn(2, 2, 4, 4)):
            out = F.rotate_rows(x, deltas.requires_grad_(), rows)
            assert torch.equal(out, x)
            out.sum().backward()
            assert not deltas.grad.any()

    @pytest.mark.parametrize("few", [0, 8], ids=["by adapter", "gathered"])
    def test_rows_without_an_adapter_keep_zeros_and_infinities(self, monkeypatch, few):
        monkeypatch.setattr(_row_ops, "_FEW_TOKENS", few)
        monkeypatch.setattr(_row_ops, "_SMALL", 0)
        x = torch.tensor([[-0.0, float("inf"), float("nan"), 1.0]] * 2)
        for rows in ([-1, -1], [-1, 0]):
            out = F.rotate_rows(x, torch.full((1, 1, 4, 4), float("nan")), torch.tensor(rows))
            assert torch.equal(out[0].view(torch.int32), x[0].view(torch.int32))

    def test_compiles_in_one_graph_and_follows_new_rows(self):
        x, _, deltas, rows = problem((4, 3), (2, 4), 3)
        compiled = torch.compile(F.rotate_rows, fullgraph=True, backend="aot_eager")
        for index in (rows, rows.flip(0)):
            torch.testing.assert_close(compiled(x, deltas, index), one_by_one(x, deltas, index))

    @pytest.mark.parametrize(
        ("deltas", "rows", "message"),
        [
            ((2, 4, 4), torch.zeros(3, dtype=torch.long), r"Δ of \(A, r, b, b\)"),
            ((2, 2, 4, 4), torch.zeros(4, dtype=torch.long), r"rows of \(B,\), not \(3, 5, 8\)"),
            ((2, 3, 4, 4), torch.zeros(3, dtype=torch.long), "x has 8 features"),
            ((2, 2, 4, 4), torch.zeros(3), "int32 or int64, not torch.float32"),
            ((2, 2, 4, 4), torch.tensor([0, 1, 2]), "index 2 is out of bounds|out of range"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, monkeypatch, deltas, rows, message):
        monkeypatch.setattr(_row_ops, "_SMALL", 0)
        for tokens in (5, 50):
            with pytest.raises((RuntimeError, IndexError), match=message.replace("5, 8", f"{tokens}, 8")):
                F.rotate_rows(torch.randn(3, tokens, 8), torch.randn(deltas), rows)


class TestKernels:
    @DTYPES
    @pytest.mark.parametrize(("leading", "blocks", "adapters"), SHAPES, ids=str)
    def test_equals_the_rows_one_by_one(self, device, launches, leading, blocks, adapters, dtype):
        compare(device, dtype, leading, blocks, adapters, torch.int32 if blocks[1] > 16 else torch.int64)
        plain = dtype == torch.float64 or (dtype == torch.float32 and blocks[1] > 64)
        assert launches == ([] if plain else ["rotate_rows", "rotate_rows", "rotate_rows_delta_grad"])

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
    def test_layouts(self, device, launches, layout):
        x = {
            "transposed": lambda: torch.randn(64, 20, 3).permute(2, 1, 0),
            "sliced": lambda: torch.randn(3, 20, 200)[:, :, 3:131:2],
            "expanded": lambda: torch.randn(3, 1, 64).expand(3, 20, 64),
            "offset": lambda: torch.randn(4, 21, 65)[1:, 1:, 1:],
        }[layout]().to(device)
        deltas = 0.1 * torch.randn(2, 2, 32, 32, device=device)
        rows = torch.tensor([1, 7, -1, 7, 0], device=device)[::2]
        for given in (deltas, deltas.mT, deltas[:, :1].expand(2, 2, 32, 32), deltas.flip(0)):
            expected = one_by_one(x.double().cpu(), given.double().cpu(), rows)
            assert_close("x̂", F.rotate_rows(x, given, rows).cpu(), expected, 2e-6)
        assert launches == ["rotate_rows"] * 4

    @pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy, at ∞ · 0
    def test_rows_without_an_adapter_keep_infinities(self, device, launches):
        x = torch.randn(2, 3, 32, device=device)
        x[:, 0, 0] = float("inf")
        deltas = torch.randn(1, 1, 32, 32, device=device)
        out = F.rotate_rows(x, deltas, torch.tensor([-1, 0], device=device))
        assert torch.equal(out[0], x[0])
        assert launches == ["rotate_rows"]

    def test_offsets_beyond_2_to_the_31(self, device, launches):
        """Rows, tokens and adapters far apart, in memory that is never touched but there."""
        memory = torch.empty(2**31 + 2**11, dtype=torch.bfloat16, device=device)
        x, grad = torch.randn(2, 3, 4, 32).bfloat16().to(device)
        deltas = (0.1 * torch.randn(3, 1, 32, 32)).bfloat16().to(device)
        rows = torch.tensor([2, -1, 1], device=device)
        expected = F.rotate_rows(x, deltas, rows), ops.rotate_rows_delta_grad(grad, x, deltas, rows)
        for strides in ((2**30, 32, 1), (32, 2**29, 1)):
            apart = memory.as_strided(x.shape, strides)
            apart.copy_(x)
            assert torch.equal(F.rotate_rows(apart, deltas, rows), expected[0])
            assert torch.equal(ops.rotate_rows_delta_grad(grad, apart, deltas, rows), expected[1])
        far = memory.as_strided(deltas.shape, (2**30, 1024, 32, 1))
        far.copy_(deltas)
        assert torch.equal(F.rotate_rows(x, far, rows), expected[0])
        assert len(launches) == 7

    def test_two_runs_give_equal_bits(self, device):
        x, grad, deltas, rows = problem((6, 70), (2, 32), 2)
        arguments = grad.to(device).bfloat16(), x.to(device).bfloat16(), deltas.float().to(device)
        first, second = (ops.rotate_rows_delta_grad(*arguments, rows.to(device)) for _ in range(2))
        assert torch.equal(first, second)

    def test_what_is_not_written_is_not_zero_by_luck(self, device, monkeypatch):
        """Outputs are allocated full of NaN; every element has to be written, of adapters without a row too."""
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
        x, grad = torch.randn(2, 3, 45, 84, device=device)
        deltas, rows = 0.1 * torch.randn(4, 7, 12, 12, device=device), torch.tensor([2, -1, 0])
        assert F.rotate_rows(x, deltas, rows.to(device)).isfinite().all()
        totals = ops.rotate_rows_delta_grad(grad, x, deltas, rows.to(device))
        assert totals.isfinite().all()
        assert [bool(total.any()) for total in totals] == [True, False, True, False]


def test_a_model_whose_rows_have_adapters_of_their_own(device, launches):
    model = oftv2.wrap_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), adapter_name="math", block_size=32)
    oftv2.add_adapter(model, "chat", block_size=16)
    randomize(model)
    model.to(device, torch.bfloat16)
    x, rows = torch.randn(4, 5, 64, device=device).bfloat16(), ["chat", "math", None, "chat"]
    expected = []
    for i, name in enumerate(rows):
        oftv2.set_adapter(model, name or "math")
        with contextlib.nullcontext() if name else oftv2.disable_adapter(model):
            expected.append(model(x[i : i + 1]))
    oftv2.set_adapter(model, ["math", "chat"])
    with oftv2.adapters_per_row(model, rows):
        for train in (True, False):
            assert_close("output", model.train(train)(x), torch.cat(expected), 8e-3)
            with torch.no_grad():
                assert_close("output", model(x), torch.cat(expected), 8e-3)
        model(x).sum().backward()
    assert launches == ["rotate_rows"] * 5 + ["rotate_rows_delta_grad"]
    assert all(packed.grad.any() for packed in model[0].generators.values())


def test_opcheck(device):
    x, grad, deltas, rows = (tensor.to(device) for tensor in problem((4, 3), (3, 4), 2))
    x, grad, deltas = x.float(), grad.float(), deltas.float()
    cases = {
        ops.rotate_rows: (x.clone().requires_grad_(), deltas.clone().requires_grad_(), rows),
        ops.rotate_rows_delta_grad: (grad, x, deltas, rows),
    }
    for op, args in cases.items():
        torch.library.opcheck(op.default, args)
