"""The operators: schemas, fake kernels, autograd, and the default implementation in plain torch for any device.

Autograd code calls ``torch.ops.oftv2`` only, so a backend is added by registering its implementation for a device.
Every operator that yields or takes a rotation works with ``Δ = R − I`` of shape ``(r, b, b)``: near the identity, ``R``
in 16 bit would lose the rotation, where ``Δ`` keeps it to relative precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of x that a CPU takes at a time. It bounds what is converted to float32 where x is 16 bit; and a sum over all
# tokens at once leaves the caches (2 threads, float32, b = 32, T = 2048: 2.8 ms at d = 1536, 2.4 in such parts).
_CHUNK_ELEMENTS = 1 << 19
# Below so many tokens, adding x to x Δ is cheaper than preparing R and a convolution (CPU, 2 threads, float32, b = 32:
# training steps of eight layers of SmolLM2 take 4% less at 256 tokens, 2% less at 512, and as long at 1024; on its own,
# the rotation takes 0.48 against 0.40 ms at T = 512, d = 1024).
FEW_TOKENS = 1024

torch.library.define("oftv2::cayley_neumann", "(Tensor generators, int block_size, int terms) -> Tensor")
torch.library.define(
    "oftv2::cayley_neumann_backward", "(Tensor grad, Tensor generators, int block_size, int terms) -> Tensor"
)
torch.library.define("oftv2::cayley", "(Tensor generators, int block_size) -> Tensor")
torch.library.define("oftv2::cayley_backward", "(Tensor grad, Tensor delta) -> Tensor")
torch.library.define("oftv2::rotate", "(Tensor x, Tensor delta) -> Tensor")
torch.library.define("oftv2::rotate_backward", "(Tensor grad, Tensor x, Tensor delta) -> (Tensor, Tensor)")
torch.library.define("oftv2::rotate_delta_grad", "(Tensor grad, Tensor x, Tensor delta) -> Tensor")


# By operator, the implementation for every device, for backends that leave some cases to it.
DEFAULTS: dict[str, Callable[..., Any]] = {}


def default(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an operator's implementation for every device, with autocast off: it would round the float32 blocks."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def implementation(first: Tensor | list[Tensor], *args: Any) -> Any:
            device_type = (first if isinstance(first, Tensor) else first[0]).device.type
            if torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return function(first, *args)
            return function(first, *args)

        torch.library.impl(f"oftv2::{name}", "CompositeExplicitAutograd")(implementation)
        DEFAULTS[name] = implementation
        return implementation

    return register


# ---------------------------------------------------------------------------------------------- generators to Δ


@functools.lru_cache(maxsize=64)
def _triangles(block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in a flattened block of the strict upper triangle, row by row, and of their mirror images."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=device)
    return rows * block_size + columns, columns * block_size + rows


@functools.lru_cache(maxsize=64)
def _skew_entries(block_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each entry of a flattened block, where its packed generator is, and its sign (0 on the diagonal)."""
    positions = torch.zeros(block_size**2, dtype=torch.long, device=device)
    signs = torch.zeros(block_size**2, dtype=dtype, device=device)
    for entries, sign in zip(_triangles(block_size, device), (1, -1), strict=True):
        positions[entries] = torch.arange(len(entries), device=device)
        signs[entries] = sign
    return positions, signs


@functools.lru_cache(maxsize=64)
def identity(block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``I`` of ``(b, b)``, shared: never written to."""
    return torch.eye(block_size, dtype=dtype, device=device)


def _skew(generators: Tensor, block_size: int) -> Tensor:
    positions, signs = _skew_entries(block_size, generators.dtype, generators.device)
    return generators.index_select(1, positions).mul_(signs).view(-1, block_size, block_size)


def _pack_skew_grad(grad: Tensor) -> Tensor:
    """``∂L/∂Q`` of unconstrained entries to the gradient of the packed generators: ``G − Gᵀ`` at the upper triangle."""
    upper, lower = _triangles(grad.shape[-1], grad.device)
    flat = grad.reshape(grad.shape[0], -1)
    return flat.index_select(1, upper) - flat.index_select(1, lower)


def add_identity(matrix: Tensor) -> Tensor:
    """``I + matrix`` of square matrices."""
    return matrix + identity(matrix.shape[-1], matrix.dtype, matrix.device)


def _horner(Q: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """``P = Q²``, ``H = Q + Q²``, and where Horner's scheme for ``Δ = 2(Q + … + Qᵏ) + Qᵏ⁺¹`` starts.

    ``V ← 2H + V·P``, ⌈k/2⌉ − 1 times, ends at Δ; the start is ``2H + P·Q`` for even k and ``2H − P`` for odd k. With P
    that makes k/2 + 1 products.
    """
    P = torch.bmm(Q, Q)
    H = Q + P
    return P, H, torch.baddbmm(H, P, Q, beta=2) if terms % 2 == 0 else H + Q


@default("cayley_neumann")
def _cayley_neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    P, H, V = _horner(_skew(generators, block_size), terms)
    for _ in range((terms - 1) // 2):
        V = torch.baddbmm(H, V, P, beta=2)
    return V


@default("cayley_neumann_backward")
def _cayley_neumann_backward(grad: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    Q = _skew(generators, block_size)
    P, H, V = _horner(Q, terms)  # Qᵀ = −Q, Pᵀ = P
    values, grads = [V], [grad]  # of V: forward from the start, and backward from Δ
    for _ in range((terms - 1) // 2):
        values.append(torch.baddbmm(H, values[-1], P, beta=2))
        grads.append(torch.bmm(grads[-1], P))
    grad_H = functools.reduce(torch.add, grads)  # half of it
    if terms % 2 == 0:
        grad_Q = torch.baddbmm(grad_H, P, grads[-1], beta=2)
        grad_P = torch.baddbmm(grad_H, grads[-1], Q, beta=2, alpha=-1)
    else:
        grad_Q = 2 * grad_H
        grad_P = grad_Q - grads[-1]
    for value, grad_V in zip(values, grads[-2::-1], strict=False):  # V ← 2H + V·P
        grad_P.baddbmm_(value.mT, grad_V)
    # ∂P/∂Q adds −(∂P·Q + Q·∂P), of which only the skew part counts: that of −(∂P + ∂Pᵀ)·Q, one product.
    return _pack_skew_grad(grad_Q.baddbmm_(grad_P + grad_P.mT, Q, alpha=-1))


@default("cayley")
def _cayley(generators: Tensor, block_size: int) -> Tensor:
    Q = _skew(generators, block_size)  # Δ = (I + Q)(I − Q)⁻¹ − I = 2 Q (I − Q)⁻¹
    return torch.linalg.solve(add_identity(-Q), 2 * Q, left=False)


@default("cayley_backward")
def _cayley_backward(grad: Tensor, delta: Tensor) -> Tensor:
    inverse = add_identity(delta / 2)  # (I − Q)⁻¹ = I + Δ/2, and dΔ = 2 (I − Q)⁻¹ dQ (I − Q)⁻¹
    return _pack_skew_grad(2 * inverse.mT @ grad @ inverse.mT)


# ---------------------------------------------------------------------------------------------- Δ on activations


def as_blocks(x: Tensor, delta: Tensor) -> Tensor:
    """``(..., d)`` viewed as ``(r, T, b)``."""
    r, b, _ = delta.shape
    return x.reshape(-1, r, b).transpose(0, 1)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Parts of the tokens of ``x`` of ``(T, d)``: a CPU's caches are smaller than x."""
    step = max(1, _CHUNK_ELEMENTS // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def rotate_few(x: Tensor, delta: Tensor) -> Tensor:
    """``x + x Δ``, in the one dtype of both."""
    if x.numel() == x.shape[-1]:  # one token: fewer views
        blocks = x.reshape(delta.shape[0], 1, -1)
        return torch.baddbmm(blocks, blocks, delta).view(x.shape)
    blocks = as_blocks(x, delta)
    return torch.baddbmm(blocks, blocks, delta).transpose(0, 1).reshape(x.shape)


@default("rotate")
def rotate(x: Tensor, delta: Tensor) -> Tensor:
    check_rotation(x, delta)
    if x.element_size() < 4 and x.device.type == "cpu":  # its 16-bit products are slow and coarse
        flat, out = x.reshape(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part in _chunks(flat):
            out.view(flat.shape)[part] = rotate(flat[part].float(), delta)
        return out
    if x.element_size() < 4 or x.shape[:-1].numel() < FEW_TOKENS:
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


@default("rotate_delta_grad")
def rotate_delta_grad(grad: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    x_blocks, grad_blocks = as_blocks(x, delta), as_blocks(grad, delta)
    total = torch.zeros(delta.shape, dtype=wide, device=x.device)
    for part in _chunks(x.reshape(-1, x.shape[-1])):
        total.baddbmm_(x_blocks[:, part].to(wide).mT, grad_blocks[:, part].to(wide))
    return total.to(delta.dtype)


@default("rotate_backward")
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


# ---------------------------------------------------------------------------------------------- shapes and gradients


def _fake_delta(generators: Tensor, block_size: int, *_: Any) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size)


def _fake_rotate(x: Tensor, delta: Tensor) -> Tensor:
    check_rotation(x, delta)
    return x.new_empty(x.shape)


torch.library.register_fake("oftv2::cayley_neumann")(_fake_delta)
torch.library.register_fake("oftv2::cayley")(_fake_delta)
torch.library.register_fake("oftv2::cayley_neumann_backward")(
    lambda grad, generators, block_size, terms: torch.empty_like(generators, memory_format=torch.contiguous_format)
)
torch.library.register_fake("oftv2::cayley_backward")(
    lambda grad, delta: delta.new_empty(delta.shape[0], delta.shape[1] * (delta.shape[1] - 1) // 2)
)
torch.library.register_fake("oftv2::rotate")(_fake_rotate)
torch.library.register_fake("oftv2::rotate_delta_grad")(lambda grad, x, delta: delta.new_empty(delta.shape))
torch.library.register_fake("oftv2::rotate_backward")(
    lambda grad, x, delta: (grad.new_empty(grad.shape), delta.new_empty(delta.shape))
)


def _save_neumann(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    generators, ctx.block_size, ctx.terms = inputs
    ctx.save_for_backward(generators)


def _neumann_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (generators,) = ctx.saved_tensors
    return torch.ops.oftv2.cayley_neumann_backward(grad, generators, ctx.block_size, ctx.terms), None, None


def _save_cayley(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _cayley_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.oftv2.cayley_backward(grad, *ctx.saved_tensors), None


def _save_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rotate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, delta = ctx.saved_tensors
    if all(ctx.needs_input_grad):
        return torch.ops.oftv2.rotate_backward(grad, x, delta)
    if ctx.needs_input_grad[0]:
        return torch.ops.oftv2.rotate(grad, delta.mT), None
    return None, torch.ops.oftv2.rotate_delta_grad(grad, x, delta)


torch.library.register_autograd("oftv2::cayley_neumann", _neumann_grad, setup_context=_save_neumann)
torch.library.register_autograd("oftv2::cayley", _cayley_grad, setup_context=_save_cayley)
torch.library.register_autograd("oftv2::rotate", _rotate_grad, setup_context=_save_rotate)
