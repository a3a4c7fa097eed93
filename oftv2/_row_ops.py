"""A rotation for each row of a batch, as one operator: rows of different adapters, and rows without one, together.

    x̂ᵢ = xᵢ + xᵢ Δ[rowsᵢ]          ∂xᵢ = ĝᵢ + ĝᵢ Δ[rowsᵢ]ᵀ          ∂Δₐ = Σ xᵢᵀ ĝᵢ over the rows i of adapter a

A negative entry of ``rows`` leaves its row as it is, bit for bit. What the default implementation does depends on
``rows`` only where reading it costs nothing: on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operator import ops
from ._ops import check_features, rotate, rotate_delta_grad

ops.define("rotate_rows", "(Tensor x, Tensor deltas, Tensor rows) -> Tensor")
ops.define("rotate_rows_delta_grad", "(Tensor grad, Tensor x, Tensor deltas, Tensor rows) -> Tensor")

# A CPU gathers Δ for every row where the adapters have fewer tokens each than so many, or where neither x nor those Δ
# have more elements than that; else it rotates adapter by adapter (2 threads, float32, b = 32, 64 rows, ms gathered and
# by adapter: d = 1024, one token each, 64 adapters 0.9 and 1.3, 8 adapters 1.4 and 0.6, 64 tokens each 25 and 13;
# d = 256, 16 tokens each, 64 adapters 0.4 and 1.8, 8 adapters 0.4 and 1.3).
_FEW_TOKENS = 8
_SMALL = 1 << 20


def check_rows(x: Tensor, deltas: Tensor, rows: Tensor) -> None:
    """Refuses what does not fit together: ``x`` of ``(B, ..., d)``, Δ of ``(A, r, b, b)`` and rows of ``(B,)``."""
    if deltas.dim() != 4 or deltas.shape[2] != deltas.shape[3] or x.dim() < 2 or rows.shape != x.shape[:1]:
        raise RuntimeError(
            "rotate_rows takes x of (B, ..., d), Δ of (A, r, b, b) and rows of (B,), not "
            f"{tuple(x.shape)}, {tuple(deltas.shape)} and {tuple(rows.shape)}"
        )
    if rows.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"rotate_rows takes rows in int32 or int64, not {rows.dtype}")
    check_features(x, *deltas.shape[1:3])


def _places(rows: Tensor) -> dict[int, slice | Tensor]:
    """For each adapter in use (−1: none), the rows that it has: a slice where they lie together."""
    found: dict[int, list[int]] = {}
    for place, adapter in enumerate(rows.tolist()):
        found.setdefault(max(adapter, -1), []).append(place)
    return {
        adapter: slice(places[0], places[-1] + 1)
        if places[-1] - places[0] < len(places)
        else torch.tensor(places, device=rows.device)
        for adapter, places in found.items()
    }


def _row_blocks(x: Tensor, deltas: Tensor) -> Tensor:
    """``(B, ..., d)`` viewed as ``(B·r, T, b)``, copied where that takes it."""
    r, b = deltas.shape[1:3]
    return x.reshape(x.shape[0], -1, r, b).transpose(1, 2).flatten(0, 1)


@ops.rotate_rows.default
def _rotate_rows(x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    check_rows(x, deltas, rows)
    if not x.numel() or not deltas.shape[0]:
        return x.clone(memory_format=torch.contiguous_format)
    if x.device.type != "cpu":
        return _rotate_gathered(x, deltas, rows)
    places = _places(rows)
    tokens, gathered = x.shape[:-1].numel(), len(rows) * deltas[0].numel()
    if tokens < _FEW_TOKENS * len(places) or (len(places) > 1 and max(x.numel(), gathered) <= _SMALL):
        wide = torch.promote_types(x.dtype, torch.float32)  # a CPU's 16-bit products are slow and coarse
        return _rotate_gathered(x.to(wide), deltas, rows).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for adapter, place in places.items():
        out[place] = x[place] if adapter < 0 else rotate(x[place], deltas[adapter])
    return out


def _rotate_gathered(x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    """As one batched product, with Δ copied for every row: ``B·d·b`` elements."""
    shape = (*x.shape[:1], x.shape[1:-1].numel(), *deltas.shape[1:3])
    blocks = _row_blocks(x, deltas)
    gathered = deltas.index_select(0, rows.clamp_min(0)).to(x.dtype).flatten(0, 1)
    rotated = torch.baddbmm(blocks, blocks, gathered).unflatten(0, (shape[0], shape[2])).transpose(1, 2)
    return torch.where(rows.view(-1, *[1] * (x.dim() - 1)) < 0, x, rotated.reshape(x.shape))


@ops.rotate_rows_delta_grad.default
def _rotate_rows_delta_grad(grad: Tensor, x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    total = deltas.new_zeros(deltas.shape)
    if x.device.type == "cpu":
        for adapter, place in _places(rows).items():
            if adapter >= 0:
                total[adapter] = rotate_delta_grad(grad[place], x[place], deltas[adapter])
        return total
    return _sum_by_adapter(_products_by_row(grad, x, deltas), total, rows)


def _products_by_row(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    """``xᵢᵀ ĝᵢ`` of every row, ``(B, r, b, b)``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    products = torch.bmm(_row_blocks(x, deltas).mT.to(wide), _row_blocks(grad, deltas).to(wide))
    return products.unflatten(0, (x.shape[0], deltas.shape[1]))


def _sum_by_adapter(products: Tensor, total: Tensor, rows: Tensor) -> Tensor:
    """Writes the sum over each adapter's rows to ``total`` ``(A, r, b, b)``."""
    for adapter in range(total.shape[0]):  # a sum by index would add in any order, and a product spread NaN
        total[adapter] = products.masked_fill((rows != adapter).view(-1, 1, 1, 1), 0).sum(0)
    return total


def _fake_rotate_rows(x: Tensor, deltas: Tensor, rows: Tensor) -> Tensor:
    check_rows(x, deltas, rows)
    return x.new_empty(x.shape)


ops.rotate_rows.fake(_fake_rotate_rows)
ops.rotate_rows_delta_grad.fake(lambda grad, x, deltas, rows: deltas.new_empty(deltas.shape))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, deltas, rows = ctx.saved_tensors
    wants_x, wants_deltas, _ = ctx.needs_input_grad
    return (
        ops.rotate_rows(grad, deltas.mT, rows) if wants_x else None,
        ops.rotate_rows_delta_grad(grad, x, deltas, rows) if wants_deltas else None,
        None,
    )


ops.rotate_rows.differentiable(_save, _gradients)
