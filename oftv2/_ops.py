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

# Tokens that are converted to float32 at a time where a CPU computes a 16-bit rotation: bounds the temporary copy.
_CHUNK_ELEMENTS = 1 << 20
# From this many tokens a batched product into a strided result beats a contiguous one and a copy (CPU, 2 threads,
# float32, d = 1536, b = 32: 0.16 against 0.03 ms at T = 16, 0.50 against 0.40 at 512, 1.3 against 5.6 at 1024).
_STRIDED_MIN_TOKENS = 768

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
        return function

    return register


# ---------------------------------------------------------------------------------------------- generators to Δ


@functools.lru_cache(maxsize=64)
def _triangles(block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in a flattened block of the strict upper triangle, row by row, and of their mirror images."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=device)
    return rows * block_size + columns, columns * block_size + rows


def _skew(generators: Tensor, block_size: int) -> Tensor:
    upper, lower = _triangles(block_size, generators.device)
    Q = generators.new_zeros(generators.shape[0], block_size * block_size)
    Q.index_copy_(1, upper, generators)
    Q.index_copy_(1, lower, -generators)
    return Q.view(-1, block_size, block_size)


def _pack_skew_grad(grad: Tensor) -> Tensor:
    """``∂L/∂Q`` of unconstrained entries to the gradient of the packed generators: ``G − Gᵀ`` at the upper triangle."""
    upper, lower = _triangles(grad.shape[-1], grad.device)
    flat = grad.reshape(grad.shape[0], -1)
    return flat.index_select(1, upper) - flat.index_select(1, lower)


def add_identity(matrix: Tensor) -> Tensor:
    """Adds I to square matrices, in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    return matrix


def _horner(Q: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """``P = Q²``, ``S = 2(Q + Q²)``, and where Horner's scheme for ``Δ = 2(Q + … + Qᵏ) + Qᵏ⁺¹`` starts.

    ``V ← S + V·P``, ⌈k/2⌉ − 1 times, ends at Δ; the start is ``S + P·Q`` for even k and ``2Q + P`` for odd k. With P
    that makes k/2 + 1 products.
    """
    P = torch.bmm(Q, Q)
    S = torch.add(Q, P).mul_(2)
    return P, S, torch.baddbmm(S, P, Q) if terms % 2 == 0 else torch.add(P, Q, alpha=2)


@default("cayley_neumann")
def _cayley_neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    P, S, V = _horner(_skew(generators, block_size), terms)
    for _ in range((terms - 1) // 2):
        V = torch.baddbmm(S, V, P)
    return V


@default("cayley_neumann_backward")
def _cayley_neumann_backward(grad: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    Q = _skew(generators, block_size)
    P, S, V = _horner(Q, terms)  # Qᵀ = −Q, Pᵀ = P
    values = [V]
    for _ in range((terms - 1) // 2 - 1):
        values.append(torch.baddbmm(S, values[-1], P))
    steps = (terms - 1) // 2
    grad_V, grad_S, grad_P = grad, torch.zeros_like(grad), torch.zeros_like(grad)
    for value in reversed(values[:steps]):
        grad_S = grad_S + grad_V
        grad_P.baddbmm_(value.mT, grad_V)
        grad_V = torch.bmm(grad_V, P)
    if terms % 2 == 0:
        grad_S = grad_S + grad_V
        grad_P.baddbmm_(grad_V, Q, alpha=-1)
        grad_Q = torch.bmm(P, grad_V)
    else:
        grad_Q = 2 * grad_V
        grad_P += grad_V
    grad_Q.add_(grad_S, alpha=2)
    grad_P.add_(grad_S, alpha=2)
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


def _converts(x: Tensor) -> bool:
    """Whether a rotation is computed in float32 chunks: 16-bit products are slow and coarse on a CPU."""
    return x.device.type == "cpu" and x.element_size() < 4


def _chunks(x: Tensor, d: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // d)
    return (slice(start, start + step) for start in range(0, x.shape[1], step))


@default("rotate")
def _rotate(x: Tensor, delta: Tensor) -> Tensor:
    check_rotation(x, delta)
    d = x.shape[-1]
    blocks = as_blocks(x, delta)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_blocks = as_blocks(out, delta)
    if _converts(x):
        for part in _chunks(blocks, d):
            chunk = blocks[:, part].float()
            out_blocks[:, part] = torch.baddbmm(chunk, chunk, delta.to(chunk.dtype))
        return out
    delta = delta.to(x.dtype)
    if x.element_size() < 4:
        return torch.baddbmm(blocks, blocks, delta).transpose(0, 1).reshape(x.shape)
    # In float32 and above R = I + Δ loses nothing that rounding the result would keep, and saves a pass over x.
    R = add_identity(delta.clone())
    if blocks.shape[1] < _STRIDED_MIN_TOKENS:
        return torch.bmm(blocks, R).transpose(0, 1).reshape(x.shape)
    torch.bmm(blocks, R, out=out_blocks)
    return out


@default("rotate_delta_grad")
def _rotate_delta_grad(grad: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    x_blocks, grad_blocks = as_blocks(x, delta), as_blocks(grad, delta)
    if _converts(x):
        total = torch.zeros(delta.shape, dtype=torch.float32, device=x.device)
        for part in _chunks(x_blocks, x.shape[-1]):
            total.baddbmm_(x_blocks[:, part].float().mT, grad_blocks[:, part].float())
        return total.to(delta.dtype)
    return torch.bmm(x_blocks.mT, grad_blocks).to(delta.dtype)


@default("rotate_backward")
def _rotate_backward(grad: Tensor, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(grad, delta.mT), _rotate_delta_grad(grad, x, delta)


def check_rotation(x: Tensor, delta: Tensor) -> None:
    """Refuses an ``x`` whose last dimension the blocks of ``delta`` do not cover exactly."""
    torch._check(
        delta.dim() == 3 and delta.shape[1] == delta.shape[2] and x.dim() >= 1,
        lambda: f"rotate takes x of (..., d) and Δ of (r, b, b), not {tuple(x.shape)} and {tuple(delta.shape)}",
    )
    check_features(x, delta.shape[0], delta.shape[1])


def check_features(x: Tensor, num_blocks: int, block_size: int) -> None:
    """Refuses an ``x`` whose last dimension is not that of ``num_blocks`` blocks."""
    torch._check(
        x.dim() >= 1 and x.shape[-1] == num_blocks * block_size,
        lambda: (
            f"rotate: x has {x.shape[-1] if x.dim() else 'no'} features, and Δ of "
            f"{(num_blocks, block_size, block_size)} rotates {num_blocks * block_size}"
        ),
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
