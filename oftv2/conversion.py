"""An adapter as a LoRA of PEFT's, for serving stacks that take nothing else.

What an adapter adds to a weight, ``Δ = W(Rᵀ − I)``, is cut to a low rank by its singular values. ``R`` turns every
direction, so ``Δ`` has full rank as a rule: a LoRA approximates a rotation, and what it leaves out is reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_file import CONFIG_FILE, PREFIX, TENSORS_FILE, serialized, write_atomically, write_json
from .base import OFTLayer
from .conv import OFTConv2d
from .errors import AdapterError, refuse
from .experts import OFTExperts
from .layers import OFTEmbedding, is_conv1d
from .merging import rotated
from .peft_names import base_description, module_names, trained_tensors
from .quant import find_backend
from .state import get_state, layers_of

# Below this share of Δ, what is left out is float32's rounding.
_EXACT = 1e-5
_BIAS = {"none": "none", "all": "all", "oft_only": "lora_only"}


@dataclass(frozen=True)
class LayerConversion:
    """How well one layer came over.

    Attributes:
        rank: of the LoRA.
        exact_rank: from which rank on nothing is left out.
        error: ``‖Δ − BA‖_F / ‖Δ‖_F``.
        weight_error: ``‖Δ − BA‖_F / ‖W‖_F``.
    """

    rank: int
    exact_rank: int
    error: float
    weight_error: float

    @property
    def exact(self) -> bool:
        """Whether it is the same function, to rounding."""
        return self.error <= _EXACT


@torch.no_grad()
def save_as_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, LayerConversion]:
    """Writes the active adapter of a wrapped model as a LoRA in PEFT's format, with ``lora_alpha = r`` (a scale of 1).

    All layers get the same rank: not every program that reads a LoRA takes others.

    Args:
        model (nn.Module): a wrapped model.
        folder (str | os.PathLike): where to.
        rank (int | None): the rank; more than a layer can have does no harm.
        tolerance (float | None): instead of it, the smallest rank whose error is below this in every layer.
        progress (Callable): gets the layers to convert and gives them back, as ``tqdm`` does.

    Returns:
        dict[str, LayerConversion]: by layer path.

    Raises:
        AdapterError: not exactly one of ``rank`` and ``tolerance``; a merged adapter; a layer that PEFT's LoRA has no
            form for; parameters trained in full that it cannot hold.
    """
    if (rank is None) == (tolerance is None):
        raise AdapterError("give either a rank or a tolerance")
    if (rank is not None and rank < 1) or (tolerance is not None and not 0 < tolerance < 1):
        raise AdapterError(f"rank={rank}, tolerance={tolerance}: use a rank from 1 up, or a tolerance between 0 and 1")
    state = get_state(model)
    name, layers = state.active, layers_of(model, state.active)
    targets, saved, problems = module_names(model, name)
    problems += [f"{path} has groups, which PEFT's LoRA does not take" for path in layers if _has_groups(layers[path])]
    problems += [
        f"{path} are experts: no LoRA is made of those" for path in layers if isinstance(layers[path], OFTExperts)
    ]
    problems += [f"{path}: the adapter is merged; call unmerge first" for path in layers if layers[path].merged]
    refuse("not converted", problems)
    common = rank or max(_needed_rank(layers[path], tolerance or 0.0) for path in progress(layers))
    tensors, report = trained_tensors(model, name), {}
    for path in progress(layers):
        added, norm = _added(layers[path])
        left, singular, right = (part.cpu() for part in torch.linalg.svd(added, full_matrices=False))
        kept = min(common, len(singular))
        root = singular[:kept].sqrt()
        down = torch.zeros(common, right.shape[1])
        up = torch.zeros(left.shape[0], common)
        down[:kept], up[:, :kept] = root[:, None] * right[:kept], left[:, :kept] * root
        tensors |= _named(path, layers[path], down, up)
        rest = torch.linalg.vector_norm(singular[kept:]).item()
        whole = max(singular.norm().item(), 1e-30)
        report[path] = LayerConversion(common, _smallest_rank(singular, _EXACT), rest / whole, rest / max(norm, 1e-30))
    config = state.configs[name]
    description = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "modules_to_save": saved or None,
        "bias": _BIAS[config.bias],
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in layers.values()),
        "inference_mode": True,
        **base_description(model),
    }
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / TENSORS_FILE, serialized(tensors))
    write_json(out / CONFIG_FILE, description)
    return report


def _has_groups(layer: OFTLayer) -> bool:
    return isinstance(layer, OFTConv2d) and layer.base_layer.groups > 1


def _added(layer: OFTLayer) -> tuple[Tensor, float]:
    """What the adapter adds to a weight of ``(out, in)``, in float32, and ``‖W‖``."""
    weight = _weight(layer).flatten(1)
    delta = layer.rotation.delta(layer.generators[layer.active]).to(weight)
    return rotated(weight, delta if isinstance(layer, OFTEmbedding) else delta.mT) - weight, weight.norm().item()


def _weight(layer: OFTLayer) -> Tensor:
    base = layer.base_layer
    backend = find_backend(base)
    if backend is not None and backend.dequantize is None:
        raise AdapterError(
            f"{layer.name}: the weight of this {type(base).__name__} cannot be read: give the unquantized model"
        )
    read = backend.dequantize if backend else None
    weight = (read(base) if read else base.weight.detach()).float()
    return weight.mT.contiguous() if is_conv1d(base) else weight


def _needed_rank(layer: OFTLayer, tolerance: float) -> int:
    return _smallest_rank(torch.linalg.svdvals(_added(layer)[0]).cpu(), tolerance)


def _smallest_rank(singular: Tensor, tolerance: float) -> int:
    """The smallest rank that leaves out no more than this share of the norm."""
    rest = singular.double().square().flip(0).cumsum(0).flip(0).sqrt()
    return max(1, int((rest > tolerance * rest[0]).sum()))


def _named(path: str, layer: OFTLayer, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """``up · down`` under PEFT's names: an embedding's rows are what it multiplies from the left."""
    if isinstance(layer, OFTEmbedding):
        return {f"{PREFIX}{path}.lora_embedding_A": up.mT, f"{PREFIX}{path}.lora_embedding_B": down.mT}
    if isinstance(layer, OFTConv2d):
        shape = layer.base_layer.weight.shape[1:]
        down, up = down.view(-1, *shape), up[:, :, None, None]
    return {f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": up}
