"""The Triton kernels on 4-bit weights, against plain torch and float64: in the interpreter, or on a CUDA device.

Plain torch dequantizes as bitsandbytes does, which ``test_quant_forms.py`` shows; nothing here needs it.
"""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close
from oftv2 import reference
from oftv2._quant_ops import Weight4bit, dequantize_4bit

# What rounding alone costs, with room for the order of summation; Δ is rounded to 16 bit as well.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
pytestmark = pytest.mark.timeout(300)


class Weight:
    """A random weight as bitsandbytes packs it, with any 16 values, and the arguments that launchers take for it."""

    def __init__(self, device, n, d, *, blocksize=64, nested=False):
        groups = -(-n * d // blocksize)
        self.packed = torch.randint(256, (n * d // 2, 1), device=device).byte()
        code, absmax = torch.randn(16, device=device), torch.rand(groups, device=device) * 0.1
        self.layout = ((n, d), blocksize)
        self.nested = None
        if nested:
            absmax = torch.randint(256, (groups,), device=device).byte()
            levels, scales = torch.rand(256, device=device) - 0.5, torch.rand(-(-groups // 256), device=device) * 0.1
            self.nested = (levels, scales, torch.tensor(0.05, device=device), 256)
        self.storage = (self.packed, absmax, code)

    def dequantized(self, dtype):
        """By plain torch."""
        shape, blocksize = self.layout
        *nested, blocksize2 = self.nested or (0,)
        storage = self.packed, *self.storage[1:]
        return dequantize_4bit(Weight4bit(*storage, nested, list(shape), blocksize, blocksize2), dtype)

    def rotated(self, delta, dtype):
        from oftv2.kernels.nf4 import dequantize_rotate

        return dequantize_rotate(*self.storage, *self.layout, delta, dtype, nested=self.nested)

    def product(self, x, delta, **options):
        from oftv2.kernels.nf4_matmul import rotate_matmul_4bit

        return rotate_matmul_4bit(x, delta, *self.storage, *self.layout, nested=self.nested, **options)


def deltas(device, d, b):
    return torch.randn(d // b, b, b, device=device) * (0.3 / b**0.5)


def plus_identity(delta):
    return delta.double() + torch.eye(delta.shape[-1], dtype=torch.float64, device=delta.device)


class TestDequantize:
    @DTYPES
    @NESTED
    @pytest.mark.parametrize(
        ("n", "d", "blocksize"),
        [(5, 256, 64), (3, 640, 128), (2, 512, 512), (7, 96, 64), (6, 33, 64), (30, 200, 4096), (1, 2, 64)],
        ids=str,
    )
    def test_equals_plain_torch(self, device, n, d, blocksize, nested, dtype):
        weight = Weight(device, n, d, blocksize=blocksize, nested=nested)
        actual = weight.rotated(None, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual, weight.dequantized(dtype))

    def test_any_storage_dtype_and_offset(self, device):
        weight = Weight(device, 4, 128)
        expected = weight.dequantized(torch.bfloat16)
        shifted = torch.cat([weight.packed.new_zeros(1, 1), weight.packed])[1:]
        assert shifted.storage_offset() == 1
        for packed in (weight.packed.view(-1).view(torch.bfloat16)[:, None], shifted):
            weight.storage = (packed, *weight.storage[1:])
            assert torch.equal(weight.rotated(None, torch.bfloat16), expected)

    def test_nothing_to_do(self, device):
        weight = Weight(device, 2, 64)
        weight.layout = ((0, 64), 64)
        assert weight.rotated(deltas(device, 64, 32), torch.float16).shape == (0, 64)


class TestDequantizeRotate:
    @DTYPES
    @pytest.mark.parametrize(
        ("n", "d", "b", "blocksize"),
        [
            (70, 256, 32, 64),
            (5, 192, 2, 64),
            (3, 320, 8, 64),
            (9, 96, 12, 64),
            (33, 384, 16, 128),
            (6, 192, 64, 128),
            (4, 256, 128, 64),
            (2, 512, 256, 64),
            (2, 512, 32, 512),
            (21, 200, 8, 4096),
            (6, 33, 3, 64),
            (5, 240, 48, 64),
            (2, 144, 72, 64),
        ],
        ids=str,
    )
    def test_value(self, device, n, d, b, blocksize, dtype):
        if (b, dtype) == (256, torch.float32):
            with pytest.raises(ValueError, match="float32 in blocks of 256"):
                Weight(device, n, d).rotated(deltas(device, d, b), dtype)
            return
        for nested in (False, True):
            weight = Weight(device, n, d, blocksize=blocksize, nested=nested)
            delta = deltas(device, d, b)
            expected = reference.merge_weight(weight.dequantized(dtype).double(), plus_identity(delta))
            assert_close("W′", weight.rotated(delta, dtype), expected, ROUNDING[dtype])
            zero = torch.zeros_like(delta)
            assert torch.equal(weight.rotated(zero, dtype), weight.dequantized(dtype))

    @pytest.mark.parametrize("b", [12, 32])
    def test_delta_in_any_layout(self, device, b):
        weight = Weight(device, 7, 2 * 96, nested=True)
        W = weight.dequantized(torch.float32).double()
        delta = deltas(device, 192, b)
        layouts = {"transposed": delta.mT, "expanded": delta[:1].expand_as(delta), "sliced": delta.repeat(1, 1, 2)}
        layouts["sliced"] = layouts["sliced"][:, :, b:]
        for name, given in layouts.items():
            assert not given.is_contiguous()
            expected = reference.merge_weight(W, plus_identity(given))
            assert_close(name, weight.rotated(given, torch.float32), expected, ROUNDING[torch.float32])

    def test_small_rotations_survive_16_bit(self, device):
        """The effect of a rotation too small for R in bfloat16, before W′ is rounded to it."""
        weight = Weight(device, 16, 256)
        delta = deltas(device, 256, 32) * 0.02
        W = weight.dequantized(torch.bfloat16).double()
        effect = reference.merge_weight(W, plus_identity(delta)) - W
        error = weight.rotated(delta, torch.bfloat16).double() - W - effect
        half_step = W.abs().max() * 2**-8
        assert error.abs().max() <= half_step
        assert error.mean().abs() <= 0.1 * error.abs().mean()


class TestMatmul:
    @DTYPES
    @pytest.mark.parametrize("T", [16, 0, 1, 2, 17])
    @pytest.mark.parametrize(
        ("n", "d", "b", "blocksize", "nested"),
        [
            (20, 640, 32, 64, True),
            (17, 1024, 64, 128, False),
            (33, 96, 12, 64, True),
            (6, 66, 2, 4096, False),
        ],
        ids=str,
    )
    def test_value(self, device, n, d, b, blocksize, nested, T, dtype):
        weight = Weight(device, n, d, blocksize=blocksize, nested=nested)
        W = weight.dequantized(dtype).double()
        x = torch.randn(T, d, device=device).to(dtype)
        delta = deltas(device, d, b)
        bias = torch.randn(n, device=device).to(dtype)
        expected = reference.oft_linear(x.double(), plus_identity(delta), W, bias.double())
        actual = weight.product(x, delta, bias=bias)
        assert actual.dtype == dtype
        assert actual.shape == (T, n)
        assert_close("rotated", actual, expected, 2 * ROUNDING[dtype])
        plain = weight.product(x, None)
        assert_close("plain", plain, x.double() @ W.mT, ROUNDING[dtype])
        assert torch.equal(weight.product(x, torch.zeros_like(delta)), plain)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @NESTED
    @pytest.mark.parametrize(
        ("n", "d", "blocksize"), [(11, 4096, 64), (8, 4160, 32), (4, 2048, 2048), (12, 64, 64)], ids=str
    )
    def test_one_token(self, device, n, d, blocksize, nested, dtype):
        """Whole and partial steps along the inputs; W as it is stored, not rounded to 16 bits."""
        weight = Weight(device, n, d, blocksize=blocksize, nested=nested)
        W = weight.dequantized(torch.float32).double()
        x, bias = (torch.randn(size, device=device).to(dtype) for size in (d, n))
        expected = x.double() @ W.mT + bias.double()
        actual = weight.product(x, None, bias=bias)
        assert actual.shape == (n,)
        half_step = torch.finfo(dtype).eps / 2 * expected.abs()
        assert ((actual.double() - expected).abs() <= 1.01 * half_step + 2e-6 * (x.double().abs() @ W.abs().mT)).all()
        assert torch.equal(actual, weight.product(x, None, bias=bias))

    def test_any_layout_of_x(self, device):
        weight = Weight(device, 24, 128)
        delta = deltas(device, 128, 32)
        x = torch.randn(2, 3, 256, device=device)[..., ::2]
        expected = reference.oft_linear(x.double(), plus_identity(delta), weight.dequantized(torch.float32).double())
        actual = weight.product(x, delta)
        assert actual.shape == (2, 3, 24)
        assert_close("strided", actual, expected, ROUNDING[torch.float32])
        sliced = torch.randn(5, 512, device=device)[:, 64:192]
        expected = sliced.double() @ weight.dequantized(torch.float32).double().mT
        assert_close("sliced", weight.product(sliced, None), expected, ROUNDING[torch.float32])
