"""The Triton kernels that rotate one input by several Δ, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from conftest import assert_close, record_calls
from oftv2 import functional as F
from oftv2 import reference

# What rounding alone costs, with room for the order of summation; Δ is rounded to 16 bit as well.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def launches(monkeypatch, device):
    """Names of the kernel launchers that were called, so that no test compares plain torch with itself."""
    from oftv2.kernels import rotate

    return record_calls(monkeypatch, {rotate: ["rotate", "rotate_backward"]})


class TestGroup:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("size", "b", "d"), [(2, 32, 96), (3, 32, 64), (3, 12, 36), (2, 64, 128), (4, 16, 32)])
    def test_equals_the_rotations_one_by_one(self, device, launches, size, b, d, dtype):
        x = torch.randn(3, 25, d, device=device).to(dtype)
        grads = [torch.randn_like(x) for _ in range(size)]
        deltas = [(0.1 * torch.randn(d // b, b, b, device=device)).requires_grad_() for _ in range(size)]
        x_in = x.clone().requires_grad_()
        together = F.rotate_group(x_in, deltas)
        torch.autograd.backward(together, grads)
        if dtype == torch.bfloat16 and size <= 3:
            assert launches == ["rotate", "rotate_backward"]
        x_ref = x.double().cpu().requires_grad_()
        expected, wanted = [], []
        for delta in deltas:
            wanted.append(delta.detach().double().cpu().requires_grad_())
            expected.append(reference.rotate(x_ref, wanted[-1] + torch.eye(b)))
        torch.autograd.backward(expected, [grad.double().cpu() for grad in grads])
        for i in range(size):
            assert_close(f"x̂ {i}", together[i].cpu(), expected[i].detach(), ROUNDING[dtype])
            assert_close(f"∂Δ {i}", deltas[i].grad.cpu(), wanted[i].grad, 4e-6)
        assert_close("∂x", x_in.grad.cpu(), x_ref.grad, ROUNDING[dtype])

    def test_an_output_that_is_not_used_adds_nothing(self, device):
        x = torch.randn(10, 32, device=device).bfloat16().requires_grad_()
        deltas = [(0.1 * torch.randn(1, 32, 32, device=device)).requires_grad_() for _ in range(2)]
        first, _ = F.rotate_group(x, deltas)
        first.sum().backward()
        assert deltas[0].grad.abs().sum() > 0
        assert torch.equal(deltas[1].grad, torch.zeros_like(deltas[1]))

    def test_the_input_is_kept_once(self, device):
        x = torch.randn(512, 64, device=device).bfloat16().requires_grad_()
        deltas = [(0.1 * torch.randn(2, 32, 32, device=device)).requires_grad_() for _ in range(3)]
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            F.rotate_group(x, deltas)
        assert sum(kept.values()) == x.nbytes + sum(delta.nbytes for delta in deltas)
