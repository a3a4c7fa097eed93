"""The rotation of one layer: its settings with the block size resolved, and Δ from generators."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional as F
from .config import OFTConfig
from .errors import AdapterError
from .reference import skew


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
                adjust = "" if config.adjust_block_size else ", or set adjust_block_size=True"
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
        packed = self.effective(generators)
        if self.parametrization == "cayley":
            delta = F.cayley(packed, self.block_size)
        elif self.parametrization == "neumann":
            delta = F.neumann(packed, self.block_size, self.terms)
        else:
            delta = F.cayley_neumann(packed, self.block_size, self.terms)
        return delta.expand(self.num_blocks, -1, -1) if self.block_share else delta


class KeptRotation:
    """Δ of generators that do not change, for as long as they do not.

    The generators' memory is held on to: another tensor cannot come to lie where they lay and be taken for them.
    """

    def __init__(self, generators: Tensor, delta: Tensor) -> None:
        self.delta = delta
        self._generators, self._memory = generators, generators.detach()
        self._version = None if generators.is_inference() else generators._version
        self._casts: dict[torch.dtype, Tensor] = {}

    def is_of(self, generators: Tensor) -> bool:
        """Whether these are the generators, unchanged as far as a version counter sees."""
        return (
            generators is self._generators
            and self._version is not None
            and self._version == generators._version
            and self._memory.data_ptr() == generators.data_ptr()
        )

    def cast(self, dtype: torch.dtype) -> Tensor:
        """Δ in another dtype, cast once."""
        if dtype not in self._casts:
            with torch.inference_mode(False), torch.no_grad():
                self._casts[dtype] = self.delta.to(dtype)
        return self._casts[dtype]


def generator_norm(packed: Tensor, block_size: int) -> float:
    """The largest spectral norm ``‖Q‖₂`` of the blocks of packed generators ``(r, b(b−1)/2)``."""
    return spectral_norm(skew(packed.float(), block_size)).amax().item()


def spectral_norm(matrices: Tensor) -> Tensor:
    """The largest singular value of each of ``(r, b, b)`` matrices, to 0.1%: ``(r,)``.

    ``AᵀA`` squared ten times is all but the projector on its top eigenvectors; batched products do in milliseconds what
    one decomposition a block does in seconds.
    """
    gram = matrices.mT @ matrices
    power = _normalized(gram)
    for _ in range(10):
        power = _normalized(power @ power)
    return ((power @ gram) * power).sum((1, 2)).clamp_min(0).sqrt()  # Rayleigh quotient; ‖power‖_F is 1


def _normalized(matrices: Tensor) -> Tensor:
    return matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(torch.finfo(matrices.dtype).tiny)


def _nearest_divisors(number: int, size: int) -> list[int]:
    """The largest divisor of ``number`` up to ``size`` and the smallest above it, from 2 up."""
    divisors = [divisor for divisor in range(2, number + 1) if number % divisor == 0]
    return [d for d in divisors if d <= size][-1:] + [d for d in divisors if d > size][:1]
