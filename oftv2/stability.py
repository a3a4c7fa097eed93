"""How near generators are to where the Neumann series diverges, ``‖Q‖₂ = 1``, and a warning before they get there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._operator import capturing, unobserved
from .errors import StabilityWarning
from .reference import skew

if TYPE_CHECKING:
    from .rotation import Rotation

_WARN_NORM = 0.9
# Reading a norm waits for an accelerator, and takes a CPU 0.1 ms: look at it once in so many training steps.
_CHECK_INTERVAL = 64


class DivergenceCheck:
    """Warns, once, when a series of one layer is about to diverge."""

    def __init__(self) -> None:
        self._calls = 0
        self._warned = False

    def __call__(self, adapters: Iterable[tuple[Rotation, Tensor]], layer: str) -> None:
        """Looks at rotations and their packed generators, at the first call and at each 64th after it.

        Args:
            adapters (Iterable[tuple[Rotation, Tensor]]): read only where they are looked at.
            layer (str): the layer's path, for the warning.
        """
        if self._warned:
            return
        self._calls += 1
        if self._calls % _CHECK_INTERVAL != 1:
            return
        for rotation, generators in adapters:
            self._warned |= _warn_of_divergence(rotation, generators, layer)


@torch.no_grad()
def _warn_of_divergence(rotation: Rotation, generators: Tensor, layer: str) -> bool:
    """Warns where the series is about to diverge; returns whether it did.

    ‖Q‖₂ ≤ ‖packed‖₂ spares all but few layers the search for the norm.
    """
    if rotation.parametrization == "cayley" or generators.is_meta:
        return False
    if not unobserved(generators) or capturing():
        return False  # there may be no values to read
    packed = rotation.effective(generators)
    if torch.linalg.vector_norm(packed, dim=1).amax() <= _WARN_NORM:
        return False
    norm = generator_norm(packed, rotation.block_size)
    if norm <= _WARN_NORM:
        return False
    warnings.warn(
        f"{layer}: the generators reached ‖Q‖₂ = {norm:.2f}; from 1 on the Neumann series diverges and R is no "
        "rotation any more. Lower the learning rate, set OFTConfig.constraint, or use "
        'parametrization="cayley", which is orthogonal for every Q',
        StabilityWarning,
        stacklevel=2,
    )
    return True


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
