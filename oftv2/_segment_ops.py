"""Rows that lie in segments, each with a rotation or a weight of its own: the tokens of a mixture of experts.

    x̂ᵢ = xᵢ + xᵢ Δₑ          ∂xᵢ = ĝᵢ + ĝᵢ Δₑᵀ          ∂Δₑ = Σ xᵢᵀ ĝᵢ          yᵢ = xᵢ Wₑ

for the rows ``i`` of segment ``e``, which are those from ``ends[e − 1]`` to ``ends[e]``; the last of ``ends`` is the
number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._ops import check_features, default, rotate, rotate_delta_grad

torch.library.define("oftv2::rotate_segments", "(Tensor x, Tensor deltas, Tensor ends) -> Tensor")
torch.library.define(
    "oftv2::rotate_segments_delta_grad", "(Tensor grad, Tensor x, Tensor deltas, Tensor ends) -> Tensor"
)
torch.library.define("oftv2::segment_matmul", "(Tensor x, Tensor weight, Tensor ends) -> Tensor")


def check_segments(x: Tensor, deltas: Tensor, ends: Tensor) -> None:
    """Refuses what does not fit together: ``x`` of ``(S, d)``, Δ of ``(E, r, b, b)`` and ends of ``(E,)``."""
    if deltas.dim() != 4 or deltas.shape[2] != deltas.shape[3]:
        raise RuntimeError(f"rotate_segments takes Δ of (E, r, b, b), not {tuple(deltas.shape)}")
    _check_ends("rotate_segments", x, deltas, ends)
    check_features(x, *deltas.shape[1:3])


def _check_ends(name: str, x: Tensor, of_segments: Tensor, ends: Tensor) -> None:
    if x.dim() != 2 or ends.shape != of_segments.shape[:1] or ends.dtype != torch.int32:
        raise RuntimeError(
            f"{name} takes x of (S, d) and int32 ends of ({of_segments.shape[0]},), not {tuple(x.shape)} and "
            f"{tuple(ends.shape)} in {ends.dtype}"
        )


def _segments(x: Tensor, ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The segments that have rows; on a GPU it waits for ``ends``."""
    start = 0
    for segment, end in enumerate(ends.tolist()):
        if end < start or end > x.shape[0]:
            raise RuntimeError(f"ends are to rise up to the {x.shape[0]} rows of x, not {ends.tolist()}")
        if end > start:
            yield segment, slice(start, end)
        start = end
    if start != x.shape[0]:
        raise RuntimeError(f"ends are to rise up to the {x.shape[0]} rows of x, not {ends.tolist()}")


@default("rotate_segments")
def _rotate_segments(x: Tensor, deltas: Tensor, ends: Tensor) -> Tensor:
    check_segments(x, deltas, ends)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for segment, rows in _segments(x, ends):
        out[rows] = rotate(x[rows], deltas[segment])
    return out


@default("rotate_segments_delta_grad")
def _rotate_segments_delta_grad(grad: Tensor, x: Tensor, deltas: Tensor, ends: Tensor) -> Tensor:
    total = torch.zeros(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    for segment, rows in _segments(x, ends):
        total[segment] = rotate_delta_grad(grad[rows], x[rows], deltas[segment])
    return total


@default("segment_matmul")
def _segment_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    check_product(x, weight, ends)
    if _has_grouped_mm(x, weight):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    out = torch.empty(x.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    for segment, rows in _segments(x, ends):
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
        and x.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
    )


def _fake_rotate(x: Tensor, deltas: Tensor, ends: Tensor) -> Tensor:
    check_segments(x, deltas, ends)
    return x.new_empty(x.shape)


def _fake_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    check_product(x, weight, ends)
    return x.new_empty(x.shape[0], weight.shape[2])


torch.library.register_fake("oftv2::rotate_segments")(_fake_rotate)
torch.library.register_fake("oftv2::rotate_segments_delta_grad")(
    lambda grad, x, deltas, ends: deltas.new_empty(deltas.shape)
)
torch.library.register_fake("oftv2::segment_matmul")(_fake_product)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_weight(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, deltas, ends = ctx.saved_tensors
    wants_x, wants_deltas, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    return (
        torch.ops.oftv2.rotate_segments(grad, deltas.mT, ends) if wants_x else None,
        torch.ops.oftv2.rotate_segments_delta_grad(grad, x, deltas, ends) if wants_deltas else None,
        None,
    )


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    weight, ends = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    if wants_weight:
        raise RuntimeError("segment_matmul has no gradient for its weight: it is for frozen ones")
    return torch.ops.oftv2.segment_matmul(grad.contiguous(), weight.mT, ends) if wants_x else None, None, None


torch.library.register_autograd("oftv2::rotate_segments", _rotate_gradients, setup_context=_save)
torch.library.register_autograd("oftv2::segment_matmul", _product_gradients, setup_context=_save_weight)
