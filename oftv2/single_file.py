"""``oft_R.weight`` files of image trainers, OneTrainer and sd-scripts, told apart by what they note in the metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import Tensor, nn

from .adapter_file import GENERATORS, PREFIX, AdapterFile
from .config import OFTConfig
from .errors import AdapterError
from .peft_reader import block_size_of
from .state import oft_layers

_SCALED = ".oft_R.scaled_oft"
_TERMS = 5  # of PEFT's count, fixed in both programs


def read_single_file(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> AdapterFile:
    """An adapter of OneTrainer or sd-scripts; its layers keep the names that they have in the file.

    Raises:
        AdapterError: not certainly one, or one that is no plain rotation.
    """
    layers = {key.removesuffix(GENERATORS): key for key in tensors if key.endswith(GENERATORS)}
    if not layers:
        raise AdapterError(f"{path} does not hold an oftv2 adapter's description, and no oft_R.weight tensors")
    origin = _origin(metadata)
    if origin is None:
        raise AdapterError(
            f"{path} does not hold an oftv2 adapter's description. It has oft_R.weight tensors, but no notes of "
            "OneTrainer's or sd-scripts' in its metadata, and which rotation they stand for cannot be told from them"
        )
    scaled = {key for key in tensors if key.endswith(_SCALED)}
    other = sorted(set(tensors) - set(layers.values()) - scaled)
    if other:
        scale = "; dora_scale changes norms, which a rotation does not" if "dora_scale" in "".join(other) else ""
        raise AdapterError(f"{path} holds more than rotations: {', '.join(other[:3])}{scale}")
    sizes = {layer: block_size_of(key, tensors[key]) for layer, key in layers.items()}
    generators = {
        PREFIX + layer + GENERATORS: tensors[key].float() / tensors[key].shape[1] ** 0.5
        if layer + _SCALED in scaled
        else tensors[key]
        for layer, key in layers.items()
    }
    config = OFTConfig(
        block_size=max(sizes.values()),
        neumann_terms=_TERMS - 2,
        target_modules=tuple(layers),
        modules_to_save=(),
        block_share=all(tensors[key].shape[0] == 1 for key in layers.values()),
    )
    base = {"class": "", "name_or_path": "", "sketches": {}}
    return AdapterFile(config, sizes, (), base, generators, origin=origin)


def located(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The same adapter under the names that its layers have in ``model``; this library's and PEFT's have them already.

    Both programs rotate a convolution's kernels the other way round than a linear layer's weight: negated here.

    Raises:
        AdapterError: a layer that the model lacks, or has twice.
    """
    if adapter.origin in ("oftv2", "PEFT"):
        return adapter
    places: dict[str, list[str]] = {}
    for name in [*dict(model.named_modules()), *dict(oft_layers(model))]:
        for spelling in {name, name.replace(".", "_")}:
            if name not in places.setdefault(spelling, []):
                places[spelling].append(name)
    tensors, sizes, missing = {}, {}, []
    for layer, size in adapter.block_sizes.items():
        found = places.get(_without_prefix(layer), [])
        if len(found) != 1:
            missing.append(layer)
            continue
        generators = adapter.generators(layer)
        weight = getattr(model.get_submodule(found[0]), "weight", None)
        is_convolution = isinstance(weight, Tensor) and weight.dim() == 4
        tensors[PREFIX + found[0] + GENERATORS] = -generators if is_convolution else generators
        sizes[found[0]] = size
    if missing:
        raise AdapterError(
            f"{len(missing)} of {len(adapter.block_sizes)} layers are not in this {type(model).__name__}: "
            f"{', '.join(missing[:3])}. A file for several models (U-Net, text encoders) is loaded into none of them"
        )
    config = dataclasses.replace(adapter.config, target_modules=tuple(sizes))
    return dataclasses.replace(adapter, config=config, block_sizes=sizes, tensors=tensors)


def _origin(metadata: dict[str, str]) -> str | None:
    if metadata.get("ss_network_module", "").endswith("networks.oft_v2"):
        return "sd-scripts"
    try:
        settings = json.loads(metadata.get("ot_config", "{}"))
    except ValueError:
        return None
    return "OneTrainer" if isinstance(settings, dict) and settings.get("peft_type") == "OFT_2" else None


def _without_prefix(layer: str) -> str:
    """Without what says which of several models a layer is in: ``lora_unet_``, ``lora_te1_``, ``unet.``, …"""
    _, dot, rest = layer.partition(".")
    if dot:
        return rest
    parts = layer.split("_", 2)
    return parts[2] if parts[0] == "lora" and len(parts) == 3 else layer
