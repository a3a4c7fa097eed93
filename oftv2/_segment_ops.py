"""Rows that lie in segments, each with a rotation or a weight of its own: the tokens of a mixture of experts.

    x̂ᵢ = xᵢ + xᵢ Δₑ          ∂xᵢ = ĝᵢ + ĝᵢ Δₑᵀ          ∂Δₑ = Σ xᵢᵀ ĝᵢ          yᵢ = xᵢ Wₑ

for the rows ``i`` of segment ``e``, which are those from ``ends[e − 1]`` to ``ends[e]``; the last of ``ends`` is the
number of rows. With ``order``, a permutation of the ``k · T`` places where ``T`` tokens are wanted, row ``i`` is the
token ``order[i] // k``: it is fetched on the way, and ``x`` of ``(T, d)`` is all that is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._operator import in_torch_func, ops
from ._ops import check_features, rotate, rotate_delta_grad

ops.define("rotate_segments", "(Tensor x, Tensor deltas, Tensor ends, Tensor? order=None) -> Tensor")
ops.define(
    "rotate_segments_delta_grad",
    "(Tensor grad, Tensor x, Tensor deltas, Tensor ends, Tensor? order=None) -> Tensor",
)
ops.define("segment_matmul", "(Tensor x, Tensor weight, Tensor ends) -> Tensor")


def check_segments(x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None) -> None:
    """Refuses what does not fit together: ``x`` of ``(S, d)``, Δ of ``(E, r, b, b)``, ends of ``(E,)``; or an order of
    ``(S,)`` and ``x`` of ``(S / k, d)``."""
    if deltas.dim() != 4 or deltas.shape[2] != deltas.shape[3]:
        raise RuntimeError(f"rotate_segments takes Δ of (E, r, b, b), not {tuple(deltas.shape)}")
    _check_ends("rotate_segments", x, deltas, ends)
    check_features(x, *deltas.shape[1:3])
    if order is not None and (order.dim() != 1 or order.dtype != torch.int64 or len(order) % max(1, len(x))):
        raise RuntimeError(
            f"rotate_segments takes an int64 order of a multiple of the {len(x)} rows of x, not "
            f"{tuple(order.shape)} in {order.dtype}"
        )


def _check_ends(name: str, x: Tensor, of_segments: Tensor, ends: Tensor) -> None:
    if x.dim() != 2 or ends.shape != of_segments.shape[:1] or ends.dtype != torch.int32:
        raise RuntimeError(
            f"{name} takes x of (S, d) and int32 ends of ({of_segments.shape[0]},), not {tuple(x.shape)} and "
            f"{tuple(ends.shape)} in {ends.dtype}"
        )


def times(x: Tensor, order: Tensor | None) -> int:
    """``k``: how many times each token is wanted."""
    return 1 if order is None else max(1, len(order) // max(1, len(x)))


def by_token(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """The sum of each token's rows, ``(T, d)``; by a permutation: adding by index has no fixed order on a GPU."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return rows[places].view(len(order) // k, k, rows.shape[-1]).sum(1)


def _segments(count: int, ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The segments that have some of the rows; on a GPU it waits for ``ends``."""
    start = 0
    for segment, end in enumerate([*ends.tolist(), count]):
        if not start <= end <= count or (segment == len(ends) and start != count):
            raise RuntimeError(f"ends are to rise up to the number of rows, {count}, not {ends.tolist()}")
        if end > start:
            yield segment, slice(start, end)
        start = end


def _rows(x: Tensor, order: Tensor | None, rows: slice) -> Tensor:
    return x[rows] if order is None else x[order[rows] // times(x, order)]


@ops.rotate_segments.default
def _rotate_segments(x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
    check_segments(x, deltas, ends, order)
    out = torch.empty(len(x if order is None else order), x.shape[1], dtype=x.dtype, device=x.device)
    for segment, rows in _segments(len(out), ends):
        out[rows] = rotate(_rows(x, order, rows), deltas[segment])
    return out


@ops.rotate_segments_delta_grad.default
def _rotate_segments_delta_grad(
    grad: Tensor, x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None
) -> Tensor:
    total = torch.zeros(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    for segment, rows in _segments(len(grad), ends):
        total[segment] = rotate_delta_grad(grad[rows], _rows(x, order, rows), deltas[segment])
    return total


@ops.segment_matmul.default
def _segment_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    check_product(x, weight, ends)
    if _has_grouped_mm(x, weight):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    out = torch.empty(x.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    for segment, rows in _segments(len(x), ends):
        if in_torch_func():  # it differentiates nothing that is written by out=
            out[rows] = x[rows] @ weight[segment]
        else:
            torch.mm(x[rows], weight[segment], out=out[rows])
    return out


def check_product(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    """Refuses what does not fit together: ``x`` of ``(S, d)``, a weight of ``(E, d, n)`` and ends of ``(E,)``."""
    if weight.dim() != 3 or x.shape[-1:] != weight.shape[1:2] or x.dtype != weight.dtype:
        raise RuntimeError(
            f"segment_matmul takes x of (S, d) and a weight of (E, d, n) in one dtype, not {tuple(x.shape)} in "
            f"{x.dtype} and {tuple(weight.shape)} in {weight.dtype}"
        )
    _check_ends("segment_matmul", x, weight, ends)


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies all segments in one launch: in bf16, rows being multiples of 16 bytes."""
    return (
        x.is_cuda
        and x.numel() > 0
        and x.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
    )


def _fake_rotate(x: Tensor, deltas: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
    check_segments(x, deltas, ends, order)
    return x.new_empty(len(x if order is None else order), x.shape[1])


def _fake_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    check_product(x, weight, ends)
    return x.new_empty(x.shape[0], weight.shape[2])


ops.rotate_segments.fake(_fake_rotate)
ops.rotate_segments_delta_grad.fake(lambda grad, x, deltas, ends, order=None: deltas.new_empty(deltas.shape))
ops.segment_matmul.fake(_fake_product)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_weight(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, deltas, ends, order = ctx.saved_tensors
    wants_x, wants_deltas, *_ = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_x = grad_deltas = None
    if wants_x:
        grad_x = ops.rotate_segments(grad, deltas.mT, ends)
        grad_x = grad_x if order is None else by_token(grad_x, order, times(x, order))
    if wants_deltas:
        grad_deltas = ops.rotate_segments_delta_grad(grad, x, deltas, ends, order)
    return grad_x, grad_deltas, None, None


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    weight, ends = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    if wants_weight:
        raise RuntimeError("segment_matmul has no gradient for its weight: it is for frozen ones")
    return ops.segment_matmul(grad.contiguous(), weight.mT, ends) if wants_x else None, None, None


ops.rotate_segments.differentiable(_save, _rotate_gradients)
ops.segment_matmul.differentiable(_save_weight, _product_gradients)
