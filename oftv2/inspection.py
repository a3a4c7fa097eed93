"""What an adapter on disk is, and how healthy, without its model."""

from __future__ import annotations

import os
from collections import Counter

from .adapter_file import AdapterFile
from .diagnostics import LayerDiagnostics, rotation_diagnostics
from .errors import AdapterError
from .reading import read_adapter
from .rotation import Rotation

_NEAR_LIMIT = 0.9
_FAR_FROM_ORTHOGONAL = 1e-2


def inspect_adapter(source: str | os.PathLike[str]) -> str:
    """A report on an adapter's folder or file, as text.

    Raises:
        AdapterError: nothing that this library reads.
    """
    adapter = read_adapter(source)
    config = adapter.config
    figures = {layer: _figures(adapter, layer) for layer in adapter.block_sizes}
    sizes = Counter(adapter.block_sizes.values())
    targets = Counter(layer.rpartition(".")[2] for layer in adapter.block_sizes)
    count = sum(adapter.generators(layer).numel() for layer in adapter.block_sizes)
    full = sum(adapter.parameter(name).numel() for name in adapter.trained)
    terms = "" if config.parametrization == "cayley" else f", k = {config.neumann_terms}"
    lines = {
        "adapter": f"{source}, written by {adapter.origin}",
        "base model": " ".join(filter(None, (adapter.base["name_or_path"], adapter.base["class"]))) or "not noted",
        "layers": f"{len(figures)}: " + ", ".join(f"{name} ×{times}" for name, times in targets.most_common(12)),
        "block sizes": ", ".join(f"{size} ×{times}" for size, times in sorted(sizes.items())),
        "parameters": f"{count:,} in generators, {full:,} trained in full",
        "rotation": ", ".join(filter(None, (config.parametrization + terms, *_options(adapter)))),
        "in full": ", ".join(adapter.trained[:6]) + (" …" if len(adapter.trained) > 6 else "") or "none",
    }
    for title, field, form in (
        ("‖RᵀR − I‖", "orthogonality_error", "{:.1e}"),
        ("‖Q‖₂", "generator_norm", "{:.3f}"),
        ("norm error", "norm_error", "{:.1e}"),
        ("angle", "rotation_angle", "{:.1f}°"),
    ):
        most, worst = max((getattr(figure, field), layer) for layer, figure in figures.items())
        lines[title] = f"{form.format(most)} at most ({worst})"
    lines["health"] = _health(figures, exact=config.parametrization == "cayley")
    lines |= {f"note {number}": note for number, note in enumerate(adapter.notes, 1)}
    return "\n".join(f"{title + ':':<13}{text}" for title, text in lines.items())


def _figures(adapter: AdapterFile, layer: str) -> LayerDiagnostics:
    generators = adapter.generators(layer).float()
    if not generators.isfinite().all():
        raise AdapterError(f"{layer}: the generators hold NaN or Inf")
    size = adapter.block_sizes[layer]
    rotation = Rotation.resolve(adapter.config, generators.shape[0] * size, layer, block_size=size)
    return rotation_diagnostics(rotation, generators, layer)


def _options(adapter: AdapterFile) -> list[str]:
    config = adapter.config
    return [
        "one block shared in each layer" if config.block_share else "",
        "scaled generators" if config.scale_generators else "",
        f"constraint {config.constraint}" if config.constraint is not None else "",
        f"dropout {config.dropout}" if config.dropout else "",
    ]


def _health(figures: dict[str, LayerDiagnostics], *, exact: bool) -> str:
    norm = max(figure.generator_norm for figure in figures.values())
    error = max(figure.orthogonality_error for figure in figures.values())
    if norm == 0:
        return "untrained: every rotation is the identity"
    if not exact and norm >= 1:
        return "diverged: from ‖Q‖₂ = 1 on the series does not converge, and R is no rotation"
    if not exact and norm > _NEAR_LIMIT:
        return "near its limit: from ‖Q‖₂ = 1 on the series diverges"
    if error > _FAR_FROM_ORTHOGONAL:
        return "far from orthogonal: norms are not kept"
    return "good"
