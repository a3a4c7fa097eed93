"""The fused rotation and product against the float64 reference: in the interpreter, or on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close
from oftv2 import reference

# What rounding alone costs, with room for the order of summation: of x̂ and y, and of Δ to 16 bit.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
pytestmark = pytest.mark.timeout(300)


def run(device, *tensors):
    from oftv2.kernels.rotate_matmul import rotate_matmul

    return rotate_matmul(*(None if tensor is None else tensor.to(device) for tensor in tensors)).cpu()


def numbers(*shape, dtype, std=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype)


def rotation(r, b, dtype=torch.float32):
    """Δ of rotations that turn by about 0.2."""
    return (reference.cayley(reference.skew(numbers(r, b * (b - 1) // 2, dtype=torch.float64, std=0.1), b))
            - torch.eye(b, dtype=torch.float64)).to(dtype)  # fmt: skip


def expected_of(x, delta, weight, bias=None):
    R = delta.double() + torch.eye(delta.shape[-1], dtype=torch.float64)
    return reference.oft_linear(x.double(), R, weight.double(), None if bias is None else bias.double())


def splits(T, d, n, b, dtype):
    from oftv2.kernels.rotate_matmul import plan

    x, delta = torch.empty(T, d, dtype=dtype, device="meta"), torch.empty(d // b, b, b, device="meta")
    return plan(x, T, delta, n).grid[1]


CASES = [  # tokens, d, n, b
    (1, 64, 40, 32),
    (2, 70, 33, 2),
    (15, 72, 17, 8),
    (16, 132, 150, 12),
    (17, 96, 1, 32),
    (70, 144, 131, 48),
    (1, 640, 19, 64),
    (17, 128, 70, 64),
    (3, 1024, 21, 128),
    (70, 256, 37, 128),
    (5, 97 * 5, 30, 5),
]


@DTYPES
@pytest.mark.parametrize(("T", "d", "n", "b"), CASES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_value(device, T, d, n, b, with_bias, dtype):
    x, delta, weight = numbers(T, d, dtype=dtype), rotation(d // b, b), numbers(n, d, dtype=dtype, std=d**-0.5)
    bias = numbers(n, dtype=dtype) if with_bias else None
    actual = run(device, x, delta, weight, bias)
    assert actual.dtype == dtype
    assert_close("y", actual, expected_of(x, delta, weight, bias), ROUNDING[dtype])


@pytest.mark.parametrize(("T", "d", "n", "b"), [(2, 1024, 70, 32), (16, 512, 33, 16), (40, 640, 50, 64)], ids=str)
@DTYPES
def test_shares_of_the_columns(device, T, d, n, b, dtype):
    """Few tiles of outputs: the columns are cut into shares, whose sums and the bias are added up."""
    assert splits(T, d, n, b, dtype) > 1
    x, delta, weight = numbers(T, d, dtype=dtype), rotation(d // b, b), numbers(n, d, dtype=dtype, std=d**-0.5)
    bias = numbers(n, dtype=dtype)
    first, second = (run(device, x, delta, weight, bias) for _ in range(2))
    assert_close("y", first, expected_of(x, delta, weight, bias), ROUNDING[dtype])
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tokens(device, monkeypatch, dtype):
    """The tiles for many tokens, whose programs are ordered in groups."""
    from oftv2.kernels import rotate_matmul as module

    monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    T, d, n, b = 1100, 64, 270, 32
    x, delta, weight = numbers(T, d, dtype=dtype), rotation(d // b, b), numbers(n, d, dtype=dtype, std=d**-0.5)
    launch = module.plan(x, T, delta, n)
    assert launch.constants["BLOCK_T"] == 128
    assert launch.grid[0] % launch.constants["GROUP"] != 0  # the last group is smaller
    assert_close("y", run(device, x, delta, weight), expected_of(x, delta, weight), ROUNDING[dtype])


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (3, 5), (2, 1, 9)], ids=str)
def test_leading_dimensions(device, leading):
    x, delta, weight = torch.randn(*leading, 64), rotation(2, 32), torch.randn(24, 64)
    actual = run(device, x, delta, weight)
    assert actual.shape == (*leading, 24)
    assert actual.is_contiguous()
    assert_close("y", actual, expected_of(x, delta, weight), 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(device, dtype):
    delta, weight, bias = rotation(2, 32), numbers(100, 200, dtype=dtype), numbers(200, dtype=dtype)
    inputs = {
        "sliced": numbers(20, 200, dtype=dtype)[:, 3:131:2],
        "transposed": numbers(64, 20, dtype=dtype).mT,
        "offset": numbers(21, 65, dtype=dtype)[1:, 1:],
        "expanded": numbers(1, 64, dtype=dtype).expand(20, 64),
    }
    weights = {"rows": weight[10:50, 7:71], "every second": weight[::2, :64], "transposed": weight[:64].mT[:50]}
    for name, x in inputs.items():
        for kind, W in weights.items():
            for turn, shared in ((delta.mT, "Δᵀ"), (delta[:1].expand(2, -1, -1), "one block"), (delta.to(dtype), "Δ")):
                b = bias[::2][: W.shape[0]]
                actual = run(device, x, turn, W, b)
                assert_close(f"{name}, {kind}, {shared}", actual, expected_of(x, turn, W, b), ROUNDING[dtype])


@pytest.mark.parametrize("T", [1, 40])
@DTYPES
def test_zero_delta_is_the_plain_product(device, T, dtype):
    """Whole numbers, whose products and sums are exact in float32, so that every bit has to agree."""
    x, weight = torch.randint(-8, 9, (T, 512)).to(dtype), torch.randint(-8, 9, (70, 512)).to(dtype)
    expected = (x.double() @ weight.double().mT).to(dtype)
    assert torch.equal(run(device, x, torch.zeros(16, 32, 32), weight), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_rotating_first(device, dtype):
    """x̂ is rounded as by the separate rotation: what is left is the order of summation and one rounding of y."""
    from oftv2.kernels.rotate import rotate

    x, delta, weight = numbers(40, 128, dtype=dtype), rotation(4, 32), numbers(50, 128, dtype=dtype)
    rotated = rotate(x.to(device), [delta.to(device)], 32)[0].cpu()
    expected = (rotated.double() @ weight.double().mT).to(dtype)
    differing = run(device, x, delta, weight) != expected
    assert differing.double().mean() < 0.02


def test_what_is_not_written_is_not_zero_by_luck(device, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
    for T in (3, 45):
        x, delta, weight = torch.randn(T, 1020), rotation(85, 12), torch.randn(77, 1020)
        assert run(device, x, delta, weight).isfinite().all()


def test_what_no_kernel_takes_is_refused(device):
    with pytest.raises(ValueError, match="blocks of 256"):
        run(device, torch.randn(2, 256), torch.zeros(1, 256, 256), torch.randn(3, 256))
    with pytest.raises(ValueError, match="float64"):
        run(device, torch.randn(2, 8).double(), torch.zeros(1, 8, 8), torch.randn(3, 8).double())
