"""Puts the Triton kernels in place of the plain-torch operators on CUDA devices.

Triton itself is imported at the first call on such a device. What the kernels do not take (float64, very wide blocks in
float32, GPUs before compute capability 8.0) goes on to the operator's default implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oftv2._operator import ops, require_grad
from oftv2._ops import check_features, check_rotation
from oftv2._quant_ops import Weight4bit
from oftv2._row_ops import check_rows
from oftv2._segment_ops import check_segments, times

from .usable import rotates, transforms, usable

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def register(dispatch_key: str = "CUDA") -> torch.library.Library:
    """Registers every kernel under a dispatch key; they stay for as long as the returned object lives."""
    library = torch.library.Library("oftv2", "IMPL")
    for name, implementation in _IMPLEMENTATIONS.items():
        library.impl(name, implementation, dispatch_key)
        getattr(ops, name).kernels[dispatch_key.lower()] = implementation
    return library


def unregister(library: torch.library.Library, dispatch_key: str) -> None:
    """Takes back what :func:`register` did; only where that was not for good."""
    library._destroy()
    for name in _IMPLEMENTATIONS:
        del getattr(ops, name).kernels[dispatch_key.lower()]


def _kernel(name: str, when: Callable[..., bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Notes a function as the CUDA implementation of an operator, for the arguments that it takes."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def implementation(*args: Any) -> Any:
            if not when(*args):
                return getattr(ops, name).plain(*args)
            if torch.is_grad_enabled() and require_grad(args):  # autograd's own calls are without: create_graph=True
                raise RuntimeError(
                    f"oftv2: the kernel for {name} has no derivative of its own, so there are no second derivatives on "
                    "this device: leave out create_graph=True, or compute them on a CPU"
                )
            return function(*args)

        _IMPLEMENTATIONS[name] = implementation
        return function

    return note


@_kernel("cayley_neumann", when=lambda generators, b, terms: transforms(generators, b))
def _cayley_neumann(generators: Tensor, block_size: int, terms: int) -> Tensor:
    from . import cayley

    return cayley.cayley_neumann(generators, block_size, terms)


@_kernel("cayley_neumann_backward", when=lambda grad, generators, b, terms: transforms(generators, b))
def _cayley_neumann_backward(grad: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    from . import cayley

    return cayley.cayley_neumann_backward(grad, generators, block_size, terms)


@_kernel("rotate", when=lambda x, delta: rotates(x, delta.shape[-1]))
def _rotate(x: Tensor, delta: Tensor) -> Tensor:
    from . import rotate

    check_rotation(x, delta)
    return rotate.rotate(x, [delta], delta.shape[1])[0]


@_kernel("rotate_backward", when=lambda grad, x, delta: rotates(x, delta.shape[-1]) and grad.dtype == x.dtype)
def _rotate_backward(grad: Tensor, x: Tensor, delta: Tensor) -> tuple[Tensor | None, Tensor]:
    from . import rotate

    grad_x, (partials,) = rotate.rotate_backward([grad], x, [delta], delta.shape[1])
    return grad_x, partials.sum(0).to(delta.dtype)


@_kernel("rotate_delta_grad", when=lambda grad, x, delta: rotates(x, delta.shape[-1]) and grad.dtype == x.dtype)
def _rotate_delta_grad(grad: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    from . import rotate

    _, (partials,) = rotate.rotate_backward([grad], x, [delta], delta.shape[1], with_x=False)
    return partials.sum(0).to(delta.dtype)


@_kernel(
    "weight_form_delta_grad",
    when=lambda grad_x, x, delta: (
        rotates(x, delta.shape[-1]) and grad_x.dtype == x.dtype and transforms(delta, delta.shape[-1])
    ),
)
def _weight_form_delta_grad(grad_x: Tensor, x: Tensor, delta: Tensor) -> Tensor:
    from . import cayley, rotate

    _, (partials,) = rotate.rotate_backward([grad_x], x, [delta], delta.shape[1], with_x=False)
    return cayley.times_inverse_transposed(partials.sum(0), delta)


def _makes_and_rotates(x: Tensor, generators: Tensor, block_size: int, terms: int) -> bool:
    return rotates(x, block_size, terms=terms) and transforms(generators, block_size)


@_kernel("neumann_rotate", when=_makes_and_rotates)
def _neumann_rotate(x: Tensor, generators: Tensor, block_size: int, terms: int) -> Tensor:
    from . import rotate

    check_features(x, generators.shape[0], block_size)
    return rotate.rotate(x, [generators], block_size, terms)[0]


@_kernel("neumann_rotate_backward", when=lambda grad, x, *rest: grad.dtype == x.dtype and _makes_and_rotates(x, *rest))
def _neumann_rotate_backward(
    grad: Tensor, x: Tensor, generators: Tensor, block_size: int, terms: int
) -> tuple[Tensor | None, Tensor]:
    from . import cayley, rotate

    grad_x, (partials,) = rotate.rotate_backward([grad], x, [generators], block_size, terms)
    return grad_x, cayley.cayley_neumann_backward(partials, generators, block_size, terms)


def _group_fits(x: Tensor, deltas: list[Tensor]) -> bool:
    return bool(deltas) and rotates(x, deltas[0].shape[-1], group=len(deltas)) and _same_blocks(deltas)


def _same_blocks(deltas: list[Tensor]) -> bool:
    return all(delta.shape == deltas[0].shape and delta.dtype == deltas[0].dtype for delta in deltas)


@_kernel("rotate_group", when=_group_fits)
def _rotate_group(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    from . import rotate

    check_rotation(x, deltas[0])
    return rotate.rotate(x, deltas, deltas[0].shape[1])


@_kernel(
    "rotate_group_backward",
    when=lambda grads, x, deltas: _group_fits(x, deltas) and all(grad.dtype == x.dtype for grad in grads),
)
def _rotate_group_backward(grads: list[Tensor], x: Tensor, deltas: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    from . import rotate

    grad_x, partials = rotate.rotate_backward(grads, x, deltas, deltas[0].shape[1])
    return grad_x, [part.sum(0).to(delta.dtype) for part, delta in zip(partials, deltas, strict=True)]


@_kernel("rotate_rows", when=lambda x, deltas, rows: rotates(x, deltas.shape[-1]) and deltas.shape[0] > 0)
def _rotate_rows(x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    from . import rotate_rows

    check_rows(x, deltas, rows)
    return rotate_rows.rotate_rows(x, deltas, rows)


@_kernel(
    "rotate_rows_delta_grad",
    when=lambda grad, x, deltas, rows: rotates(x, deltas.shape[-1]) and grad.dtype == x.dtype and deltas.shape[0] > 0,
)
def _rotate_rows_delta_grad(grad: Tensor, x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    from . import rotate_rows

    return rotate_rows.rotate_rows_delta_grad(grad, x, deltas, rows).sum(0).to(deltas.dtype)


@_kernel("rotate_segments", when=lambda x, deltas, ends, order=None: rotates(x, deltas.shape[-1]))
def _rotate_segments(x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
    from . import rotate_segments

    check_segments(x, deltas, ends, order)
    return rotate_segments.rotate_segments(x, deltas, ends, order, times(x, order))


@_kernel(
    "rotate_segments_delta_grad",
    when=lambda grad, x, deltas, ends, order=None: rotates(x, deltas.shape[-1]) and grad.dtype == x.dtype,
)
def _rotate_segments_delta_grad(
    grad: Tensor, x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None
) -> Tensor:
    from . import rotate_segments

    partials = rotate_segments.rotate_segments_delta_grad(grad, x, deltas, ends, order, times(x, order))
    return partials.sum(0).to(deltas.dtype)


def _multiplies(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (usable(x.device) and x.dtype == weight.dtype):
        return False
    from . import rotate_matmul

    return rotate_matmul.supports(x.dtype, delta.shape[-1])


@_kernel("rotate_matmul", when=_multiplies)
def _rotate_matmul(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from . import rotate_matmul

    check_rotation(x, delta)
    return rotate_matmul.rotate_matmul(x, delta, weight, bias)


# ---------------------------------------------------------------------------------------------- 4-bit weights


def _stored(weight: Weight4bit) -> tuple[Any, ...]:
    """The kernels' arguments for a 4-bit weight, and its nested scales."""
    nested = (*weight.nested, weight.blocksize2) if weight.nested else None
    return (weight.packed, weight.absmax, weight.code, tuple(weight.shape), weight.blocksize), nested


def _dequantizes(delta: Tensor, dtype: torch.dtype) -> bool:
    if not usable(delta.device):
        return False
    from . import nf4

    return nf4.supports(dtype, delta.shape[-1])


@_kernel("dequantize_rotate_4bit", when=lambda delta, *rest: _dequantizes(delta, rest[-1]))
def _dequantize_rotate(delta: Tensor, *arguments: Any) -> Tensor:
    from . import nf4

    *weight, dtype = arguments
    (packed, absmax, code, shape, blocksize), nested = _stored(Weight4bit(*weight))
    return nf4.dequantize_rotate(packed, absmax, code, shape, blocksize, delta, dtype, nested=nested)


@_kernel(
    "rotate_matmul_4bit", when=lambda x, delta, *rest: _dequantizes(delta, x.dtype) and rotates(x, delta.shape[-1])
)
def _rotate_matmul_4bit(x: Tensor, delta: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    from . import nf4_matmul

    check_rotation(x, delta)
    (packed, absmax, code, shape, blocksize), nested = _stored(Weight4bit(*arguments))
    return nf4_matmul.rotate_matmul_4bit(x, delta, packed, absmax, code, shape, blocksize, nested=nested, bias=bias)
