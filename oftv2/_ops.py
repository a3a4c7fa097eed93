"""The operators that rotate activations: schemas, fake kernels, autograd, and plain torch.

Autograd code calls operators only, so a backend is added by registering its implementation for a device.
Every operator that yields or takes a rotation works with ``Δ = R − I`` of shape ``(r, b, b)``: near the identity, ``R``
in 16 bit would lose the rotation, where ``Δ`` keeps it to relative precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import constant, in_torch_func, ops

# Elements of x that a CPU takes at a time. It bounds what is converted to float32 where x is 16 bit; and a sum over all
# tokens at once leaves the caches (2 threads, float32, b = 32, T = 2048: 2.8 ms at d = 1536, 2.4 in such parts).
_CHUNK_ELEMENTS = 1 << 19
# Below so many tokens, adding x to x Δ is cheaper than preparing R and a convolution (CPU, 2 threads, float32, b = 32:
# training steps of eight layers of SmolLM2 take 4% less at 256 tokens, 2% less at 512, and as long at 1024; on its own,
# the rotation takes 0.48 against 0.40 ms at T = 512, d = 1024).
FEW_TOKENS = 1024

ops.define("rotate", "(Tensor x, Tensor delta) -> Tensor")
ops.define("rotate_backward", "(Tensor grad, Tensor x, Tensor delta) -> (Tensor, Tensor)")
ops.define("rotate_delta_grad", "(Tensor grad, Tensor x, Tensor delta) -> Tensor")


@constant
def identity(block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``I`` of ``(b, b)``, shared: never written to."""
    return torch.eye(block_size, dtype=dtype, device=device)


def add_identity(matrix: Tensor) -> Tensor:
    """``I + matrix`` of square matrices."""
    return matrix + identity(matrix.shape[-1], matrix.dtype, matrix.device)


def as_blocks(x: Tensor, delta: Tensor) -> Tensor:
    """``(..., d)`` viewed as ``(r, T, b)``."""
    r, b, _ = delta.shape
    return x.reshape(-1, r, b).transpose(0, 1)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Parts of the tokens of ``x`` of ``(T, d)``, about as large as each other: a CPU's caches are smaller than x."""
    count = -(-x.numel() // _CHUNK_ELEMENTS) if x.device.type == "cpu" else 1
    step = max(1, -(-x.shape[0] // max(1, count)))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def rotate_few(x: Tensor, delta: Tensor) -> Tensor:
    """``x + x Δ``, in the one dtype of both."""
    if x.numel() == x.shape[-1]:  # one token: fewer views
        blocks = x.reshape(delta.shape[0], 1, -1)
        return torch.baddbmm(blocks, blocks, delta).view(x.shape)
    blocks = as_blocks(x, delta)
    return torch.baddbmm(blocks, blocks, delta).transpose(0, 1).reshape(x.shape)


@ops.rotate.default
def rotate(x: Tensor, delta: Tensor) -> Tensor:
    """``x + x Δ`` of ``x`` ``(..., d)`` and ``Δ`` ``(r, b, b)``, in the dtype of ``x``."""
    check_rotation(x, delta)
    if x.element_size() < 4 and x.device.type == "cpu" and not in_torch_func():  # its 16-bit products: slow, coarse
        flat, out = x.reshape(-1, x.shape[-1]), x.new_empty(x.shape)
        for part in _chunks(flat):
            out.view(flat.shape)[part] = rotate(flat[part].float(), delta)
        return out
    recorded = torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad)  # for second derivatives
    if x.element_size() < 4 or x.shape[:-1].numel() < FEW_TOKENS or recorded or in_torch_func():
        return rotate_few(x, delta.to(x.dtype))
    # In float32 and above R = I + Δ loses nothing that rounding the result would keep, and saves a pass over x.
    R = add_identity(delta.to(x.dtype))
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if onednn and x.dtype == torch.float32 and x.device.type == "cpu":
        return _grouped_convolution(x, R)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.bmm(as_blocks(x, delta), R, out=as_blocks(out, delta))
    return out


def _grouped_convolution(x: Tensor, R: Tensor) -> Tensor:
    """``x · blockdiag(R)`` as a 1 × 1 convolution of r groups, for which oneDNN reads and writes tokens as they lie.

    A batched product strides over them block by block (CPU, 2 threads, float32, T = d = 1024: 0.6 against 1.0 ms at
    b = 32, 1.5 against 1.6 at b = 128; 1.1 the first time that oneDNN sees a T).
    """
    d, r = x.shape[-1], R.shape[0]
    image = x.reshape(1, 1, -1, d).contiguous().permute(0, 3, 1, 2)  # (1, d, 1, T), channels last
    filters = R.mT.reshape(d, -1, 1, 1)
    out = torch.mkldnn_convolution(image, filters, None, (0, 0), (1, 1), (1, 1), r)
    return out.permute(0, 2, 3, 1).reshape(x.shape)


@ops.rotate_delta_grad.default
def rotate_delta_grad(grad: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    """``∂L/∂Δ = Σ xᵀ ∂L/∂y`` over the tokens, block by block, ``(r, b, b)``; summed in float32 at least on a CPU."""
    wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    if x.dtype == grad.dtype == delta.dtype and 0 < x.numel() <= _CHUNK_ELEMENTS:
        return torch.bmm(as_blocks(x, delta).mT, as_blocks(grad, delta))
    total = grad.new_zeros(delta.shape, dtype=wide)
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    for part in _chunks(flat_x):
        total.baddbmm_(as_blocks(flat_x[part].to(wide), delta).mT, as_blocks(flat_grad[part].to(wide), delta))
    return total.to(delta.dtype)


@ops.rotate_backward.default
def _rotate_backward(grad: Tensor, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(grad, delta.mT), rotate_delta_grad(grad, x, delta)


def check_rotation(x: Tensor, delta: Tensor) -> None:
    """Refuses an ``x`` whose last dimension the blocks of ``delta`` do not cover exactly."""
    r, b, columns = delta.shape if delta.dim() == 3 else (0, 0, -1)
    if b != columns or x.dim() < 1:
        raise RuntimeError(
            f"rotate takes x of (..., d) and Δ of (r, b, b), not {tuple(x.shape)} and {tuple(delta.shape)}"
        )
    check_features(x, r, b)


def check_features(x: Tensor, num_blocks: int, block_size: int) -> None:
    """Refuses an ``x`` whose last dimension is not that of ``num_blocks`` blocks."""
    features = x.shape[-1] if x.dim() else 1
    if features != num_blocks * block_size:
        raise RuntimeError(
            f"rotate: x has {features} features, and Δ of {(num_blocks, block_size, block_size)} rotates "
            f"{num_blocks * block_size}"
        )


def _fake_rotate(x: Tensor, delta: Tensor) -> Tensor:
    check_rotation(x, delta)
    return x.new_empty(x.shape)


ops.rotate.fake(_fake_rotate)
ops.rotate_delta_grad.fake(lambda grad, x, delta: delta.new_empty(delta.shape))
ops.rotate_backward.fake(lambda grad, x, delta: (grad.new_empty(grad.shape), delta.new_empty(delta.shape)))


def _save_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rotate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, delta = ctx.saved_tensors
    if all(ctx.needs_input_grad):
        return ops.rotate_backward(grad, x, delta)
    if ctx.needs_input_grad[0]:
        return ops.rotate(grad, delta.mT), None
    return None, ops.rotate_delta_grad(grad, x, delta)


ops.rotate.differentiable(_save_rotate, _rotate_grad)
