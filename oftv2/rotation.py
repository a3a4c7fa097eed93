"""The rotation of one layer: its settings with the block size resolved, and Δ from generators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional as F
from ._eager import version
from ._operator import capturing
from .config import OFTConfig
from .errors import AdapterError


@dataclass(frozen=True)
class Rotation:
    """The settings of one adapter in one layer, with the block size resolved."""

    block_size: int
    num_blocks: int
    terms: int = 4
    parametrization: str = "cayley_neumann"
    dropout: float = 0.0
    constraint: float | None = None
    block_share: bool = False
    scale: bool = False

    @classmethod
    def resolve(
        cls, config: OFTConfig, features: int, name: str, *, groups: int = 1, block_size: int | None = None
    ) -> Rotation:
        """The rotation that ``config`` asks for on ``features`` inputs (in ``groups`` that no block may straddle).

        Raises:
            AdapterError: the block size does not divide, with the nearest sizes that do.
        """
        size = block_size or config.block_size or max(1, round(features / (config.num_blocks or 1)))
        unit = features // groups
        exact = bool(block_size or config.block_size) or size * (config.num_blocks or 1) == features
        if not exact or size < 2 or unit < 2 or unit % size:
            nearest = _nearest_divisors(unit, size)
            usable = [divisor for divisor in nearest if size / 4 <= divisor <= 4 * size]
            if not (config.adjust_block_size and usable):
                by_blocks = config.num_blocks is not None and block_size is None
                asked = f"num_blocks={config.num_blocks}" if by_blocks else f"block_size={size}"
                per_group = f" in groups of {unit}" if groups > 1 else ""
                adjust = ", or set adjust_block_size=True" if usable and not config.adjust_block_size else ""
                raise AdapterError(
                    f"{name}: {asked} does not divide its {features} input features{per_group}; the nearest block "
                    f"sizes that do: {' and '.join(map(str, nearest)) or 'none, there is nothing to rotate'}. Choose "
                    f"one, give this layer its own in block_size_pattern, leave it out with exclude_modules{adjust}"
                )
            size = min(usable, key=lambda divisor: abs(math.log(divisor) - math.log(size)))
        return cls(
            block_size=size,
            num_blocks=features // size,
            terms=config.neumann_terms,
            parametrization=config.parametrization,
            dropout=config.dropout,
            constraint=config.constraint,
            block_share=config.block_share,
            scale=config.scale_generators,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the packed generators."""
        return 1 if self.block_share else self.num_blocks, self.block_size * (self.block_size - 1) // 2

    def effective(self, generators: Tensor) -> Tensor:
        """The packed generators after scaling and projection."""
        return F.effective_generators(generators, self.block_size, scale=self.scale, constraint=self.constraint)

    def delta(self, generators: Tensor) -> Tensor:
        """``Δ = R − I`` of ``(r, b, b)``, without dropout; a shared block is expanded, not copied."""
        return self._expanded(self._transformed(self.effective(generators)))

    def _transformed(self, packed: Tensor) -> Tensor:
        """``Δ`` of effective generators ``(r, b(b−1)/2)``, whatever ``r`` is."""
        if self.parametrization == "cayley":
            return F.cayley(packed, self.block_size)
        if self.parametrization == "neumann":
            return F.neumann(packed, self.block_size, self.terms)
        return F.cayley_neumann(packed, self.block_size, self.terms)

    def _expanded(self, delta: Tensor) -> Tensor:
        return delta.expand(self.num_blocks, -1, -1) if self.block_share else delta

    @staticmethod
    def deltas(rotations: Sequence[Rotation], generators: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`delta` of several adapters, those that are made in the same way in one pass (on a GPU, one launch)."""
        alike: dict[tuple[str, int, int], list[int]] = {}
        for i, rotation in enumerate(rotations):
            alike.setdefault((rotation.parametrization, rotation.block_size, rotation.terms), []).append(i)
        found: dict[int, Tensor] = {}
        for places in alike.values():
            packed = [rotations[i].effective(generators[i]) for i in places]
            together = rotations[places[0]]._transformed(torch.cat(packed))
            parts = together.split([len(own) for own in packed])
            found |= {i: rotations[i]._expanded(part) for i, part in zip(places, parts, strict=True)}
        return [found[i] for i in range(len(rotations))]

    def dropped(self, delta: Tensor) -> Tensor:
        """``Δ`` of a training step: blocks are the identity with the probability ``dropout``."""
        if not self.dropout:
            return delta
        keep = torch.rand(delta.shape[0], 1, 1, device=delta.device) >= self.dropout
        return delta * keep

    def __str__(self) -> str:
        shared = ", one shared block" if self.block_share else ""
        return f"block_size={self.block_size}, num_blocks={self.num_blocks}{shared}"


class KeptRotation:
    """Δ of generators that do not change, for as long as they do not.

    The generators' memory is held on to: another tensor cannot come to lie where they lay and be taken for them.

    Args:
        generators (Sequence[torch.Tensor]): of each adapter that Δ is made of, in their order.
        delta (torch.Tensor): Δ.
    """

    def __init__(self, generators: Sequence[Tensor], delta: Tensor) -> None:
        self.delta = delta
        self._casts: dict[torch.dtype, Tensor] = {}
        self._note(generators)

    def _note(self, generators: Sequence[Tensor]) -> None:
        self._made_of = [(packed, packed.detach(), version(packed)) for packed in generators]

    def rewrite(self, generators: Sequence[Tensor], delta: Tensor) -> None:
        """Other values in the same memory, in every dtype that was asked for."""
        for kept in (self.delta, *self._casts.values()):
            shared = kept.stride(0) == 0  # one block that is used for the whole layer
            (kept[:1] if shared else kept).copy_(delta[:1] if shared else delta)
        self._note(generators)

    def is_of(self, generators: Sequence[Tensor]) -> bool:
        """Whether these are the generators, unchanged as far as a version counter sees."""
        if len(generators) != len(self._made_of):
            return False
        for now, (packed, memory, noted) in zip(generators, self._made_of):  # noqa: B905  (compared above; strict costs time)
            if now is not packed or noted is None or noted != now._version or memory.data_ptr() != now.data_ptr():
                return False
        return True

    def cast(self, dtype: torch.dtype) -> Tensor:
        """Δ in another dtype, cast once."""
        if dtype in self._casts:
            return self._casts[dtype]
        with torch.inference_mode(False), torch.no_grad():
            cast = self.delta.to(dtype)
        if not capturing():
            settle(cast)
            self._casts[dtype] = cast
        return cast


def settle(delta: Tensor) -> None:
    """Waits until a Δ that is to be kept is made: other streams, which may use it next, would not."""
    if delta.is_cuda:
        torch.cuda.current_stream(delta.device).synchronize()


def _nearest_divisors(number: int, size: int) -> list[int]:
    """The largest divisor of ``number`` up to ``size`` and the smallest above it, from 2 up."""
    divisors = [divisor for divisor in range(2, number + 1) if number % divisor == 0]
    return [d for d in divisors if d <= size][-1:] + [d for d in divisors if d > size][:1]
