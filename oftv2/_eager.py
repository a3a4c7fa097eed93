"""``Δ`` of several layers from one autograd node: on a CPU, where making it for one layer hardly takes less time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._operator import Operator, ops


def version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to, as far as that is counted."""
    return None if tensor.is_inference() else tensor._version


class Transform(torch.autograd.Function):
    """``Δ`` of several layers' generators of one block size. What is not used has no gradient.

    It keeps the generators itself: tensors that autograd keeps are gone after one backward pass, and layers that share
    this node may have several, each with a loss of its own.
    """

    @staticmethod
    def forward(ctx: Any, block_size: int, terms: int, *generators: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings = block_size, terms
        ctx.generators, ctx.versions = generators, [version(packed) for packed in generators]
        return tuple(_together(ops.cayley_neumann, (generators,), block_size, terms))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[i + 2]]
        if any(version(ctx.generators[i]) != ctx.versions[i] for i in wanted):
            raise RuntimeError(
                "the generators of an adapter were written to between a forward pass and its backward pass, as by an "
                "optimizer's step; their gradients would be wrong"
            )
        found: Sequence[Tensor] = ()
        if wanted:
            used = [grads[i] for i in wanted], [ctx.generators[i] for i in wanted]
            found = _together(ops.cayley_neumann_backward, used, *ctx.settings)
        by_place = dict(zip(wanted, found, strict=True))
        return None, None, *(by_place.get(i) for i in range(len(grads)))


def _together(operator: Operator, operands: tuple[Sequence[Any], ...], *settings: int) -> Sequence[Tensor]:
    """An operator on the blocks of several layers, and its result layer by layer."""
    counts = [len(tensor) for tensor in operands[0]]
    joined = [tensors[0] if len(tensors) == 1 else torch.cat(list(tensors)) for tensors in operands]
    result: Tensor = operator.plain(*joined, *settings)
    return [result] if len(counts) == 1 else result.split(counts)
