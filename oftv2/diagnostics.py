"""How healthy an adapter is: is it still a rotation, and how large are its generators?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from .base import OFTLayer
from .errors import AdapterError
from .partitioned import gathered
from .rotation import Rotation
from .sharding import whole_generators
from .stability import generator_norm, spectral_norm
from .state import oft_layers


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer's figures, each the worst over its blocks.

    Attributes:
        orthogonality_error: ``‖RᵀR − I‖_F``.
        generator_norm: ``‖Q‖₂``; the Neumann series needs it below 1.
        norm_error: ``max |σ(R) − 1|``: how much the rotation can stretch or shrink an input, relative to its norm.
        rotation_angle: the largest angle in degrees by which an input turns.
    """

    orthogonality_error: float
    generator_norm: float
    norm_error: float
    rotation_angle: float


@torch.no_grad()
def layer_diagnostics(layer: OFTLayer) -> LayerDiagnostics:
    """The figures of one layer's active adapter, in float64; of several, the worst."""
    with gathered(layer.generators_of(layer.sequence)):
        return _worst(
            rotation_diagnostics(layer.rotations[name], whole_generators(layer, name), layer.name)
            for name in layer.sequence
        )


@torch.no_grad()
def rotation_diagnostics(rotation: Rotation, generators: Tensor, name: str) -> LayerDiagnostics:
    """The figures of a rotation by itself, in float64; ``name`` is for messages."""
    packed = rotation.effective(generators)
    delta = rotation.delta(generators)[: generators.shape[0]].double().cpu()
    identity = torch.eye(delta.shape[-1], dtype=delta.dtype)
    R = delta + identity
    if not delta.isfinite().all():
        raise AdapterError(f"{name}: the rotation holds NaN or Inf")
    error = R.mT @ R - identity  # has the eigenvalues σ² − 1
    largest = spectral_norm(error).amax().item()
    norm = generator_norm(packed, rotation.block_size)
    return LayerDiagnostics(
        orthogonality_error=torch.linalg.matrix_norm(error).amax().item(),
        generator_norm=norm,
        norm_error=largest / 2 if largest < 1e-4 else (torch.linalg.svdvals(R) - 1).abs().amax().item(),
        rotation_angle=2 * torch.rad2deg(torch.atan(torch.tensor(norm))).item(),  # e^{iθ} = (1 + iq)/(1 − iq)
    )


def diagnostics(model: nn.Module) -> dict[str, LayerDiagnostics]:
    """The figures of every layer with an active adapter by its path; sharded by FSDP2, on every process at once.

    Raises:
        AdapterError: the model holds no adapted layer, or a rotation with NaN or Inf.
    """
    report = {name or layer.name: layer_diagnostics(layer) for name, layer in oft_layers(model) if layer.sequence}
    if not report:
        raise AdapterError(f"this {type(model).__name__} holds no adapted layer to look at")
    return report


def summary(model: nn.Module) -> dict[str, float]:
    """The worst figure over all layers, by name: what a training log wants."""
    report = diagnostics(model).values()
    return asdict(_worst(report))


def _worst(each: Iterable[LayerDiagnostics]) -> LayerDiagnostics:
    names = [field.name for field in fields(LayerDiagnostics)]
    rows = list(each)
    return LayerDiagnostics(**{name: max(getattr(row, name) for row in rows) for name in names})
