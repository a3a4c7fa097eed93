"""The mathematics in plain torch: slow, differentiable, in any floating dtype. Every fast path is compared with it.

``d`` is the number of input features, ``b`` the block size, ``r = d / b`` the number of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(generators: Tensor, block_size: int) -> Tensor:
    """Packed strict upper triangles ``(r, b(b−1)/2)``, row-major, to skew-symmetric matrices ``Q`` of ``(r, b, b)``."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=generators.device)
    upper = generators.new_zeros(generators.shape[0], block_size, block_size)
    upper = upper.index_put((torch.arange(len(upper), device=upper.device)[:, None], rows, columns), generators)
    return upper - upper.mT


def pack(Q: Tensor) -> Tensor:
    """The inverse of :func:`skew`: ``(r, b, b)`` to ``(r, b(b−1)/2)``."""
    rows, columns = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1, device=Q.device)
    return Q[:, rows, columns]


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """``R = (I + Q)(I + Q + … + Qᵏ)``, the Cayley transform, its Neumann series cut after ``Qᵏ`` (k = ``terms``)."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    series, power = identity, identity
    for _ in range(terms):
        power = power @ Q
        series = series + power
    return (identity + Q) @ series


def cayley(Q: Tensor) -> Tensor:
    """The exact Cayley transform ``R = (I + Q)(I − Q)⁻¹``, orthogonal for every skew-symmetric ``Q``."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(identity - Q, identity + Q, left=False)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """``x · blockdiag(R₁ … R_r)``: ``x`` of ``(..., d)`` as row vectors, ``R`` of ``(r, b, b)``."""
    return x @ torch.block_diag(*R)


def oft_linear(x: Tensor, R: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = (x R) Wᵀ + bias``: ``x`` of ``(..., d)``, ``weight`` of ``(n, d)``."""
    return torch.nn.functional.linear(rotate(x, R), weight, bias)


def merge_weight(weight: Tensor, R: Tensor) -> Tensor:
    """``W′ = W · blockdiag(R)ᵀ``: the plain weight ``(n, d)`` that does what the rotation and ``W`` did."""
    return weight @ torch.block_diag(*R).mT
