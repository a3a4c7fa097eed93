"""Adapters in PEFT's layout: its tensor names and its ``adapter_config.json``, as PEFT from 0.18 on reads them.

PEFT computes ``y = x·R·Wᵀ`` as this library does, from the same packed triangles, so the numbers stay as they are, but
for two cases: PEFT's exact transform is the transpose, which negated generators undo; and it has no
``scale_generators``, so scaled ones are written, and the unscaled beside them under a name that PEFT passes over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapter_file import GENERATORS, PREFIX
from .base import OFTLayer
from .config import OFTConfig
from .conv import OFTConv2d
from .experts import OFTExperts
from .functional import effective_generators
from .layers import OFTEmbedding, is_conv1d
from .peft_config import DEFAULT_EPS, to_peft
from .peft_names import base_description, module_names, trained_tensors
from .rotation import Rotation
from .state import get_state, layers_of, plain_name

EMBEDDING_GENERATORS = ".oft_embedding_R.weight"
UNSCALED = ".oftv2_generators"
# The first PEFT whose series is this one; from it on, PEFT notes its version in the file.
_PEFT_VERSION = "0.18.0"


@dataclass(frozen=True)
class PeftLayout:
    """An adapter as PEFT would have it.

    Attributes:
        problems: what PEFT cannot express, one message each; with any, the rest is not to be used.
        config: what ``adapter_config.json`` holds.
        tensors: by PEFT's names.
    """

    problems: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def peft_layout(model: nn.Module, name: str) -> PeftLayout:
    """The adapter ``name`` of a wrapped model in PEFT's layout, with everything that PEFT cannot express."""
    config = get_state(model).configs[name]
    layers = layers_of(model, name)
    problems: list[str] = []
    series = to_peft(config.parametrization, config.neumann_terms)
    if series is None:
        problems.append(_no_series(config))
    for path, layer in layers.items():
        problems += _layer_problems(model, path, layer)
    sizes = _sizes(config, {path: _features_and_rotation(layer, name) for path, layer in layers.items()})
    if sizes is None:
        problems.append(
            "block sizes that differ from layer to layer: PEFT has one oft_block_size or one r for all layers; use one "
            "block_size that divides every layer, without block_size_pattern"
        )
    targets, saved, wrong = module_names(model, name)
    problems += wrong
    description = {
        "bias": config.bias,
        "block_share": config.block_share,
        "coft": config.constraint is not None,
        "eps": config.constraint if config.constraint is not None else DEFAULT_EPS,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": float(config.dropout),
        "modules_to_save": saved or None,
        "peft_type": "OFT",
        "peft_version": _PEFT_VERSION,
        "revision": None,
        "target_modules": targets,
        **base_description(model),
        **(sizes or {}),
        **(series or {}),
    }
    return PeftLayout(tuple(problems), description, _tensors(model, name, layers))


def _tensors(model: nn.Module, name: str, layers: dict[str, OFTLayer]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        rotation, generators = layer.rotations[name], layer.generators[name].detach()
        suffix = EMBEDDING_GENERATORS if isinstance(layer, OFTEmbedding) else GENERATORS
        scaled = effective_generators(generators, rotation.block_size, scale=rotation.scale)
        tensors[PREFIX + path + suffix] = -scaled if rotation.parametrization == "cayley" else scaled
        if rotation.scale:
            tensors[PREFIX + path + UNSCALED] = generators
    tensors |= trained_tensors(model, name)
    return tensors


def from_layout(tensors: dict[str, Tensor], config: OFTConfig, layers: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of what :func:`peft_layout` does to tensors: under this library's names, bit for bit.

    Raises:
        KeyError: the unscaled generators of a layer are missing.
    """
    out = dict(tensors)
    for layer in layers:
        own = PREFIX + layer + GENERATORS
        generators = out.pop(PREFIX + layer + EMBEDDING_GENERATORS, out.pop(own, None))
        if config.scale_generators:
            generators = out.pop(PREFIX + layer + UNSCALED)
        elif generators is not None and config.parametrization == "cayley":
            generators = -generators
        if generators is not None:
            out[own] = generators
    return {PREFIX + plain_name(key.removeprefix(PREFIX)): tensor for key, tensor in out.items()}


def _no_series(config: OFTConfig) -> str:
    if config.parametrization == "neumann":
        return 'parametrization="neumann" is the series of PEFT before 0.18, which PEFT does not compute any more'
    return f"neumann_terms={config.neumann_terms}: PEFT has no such series; use an even number, 2, 4 or 6"


def _layer_problems(model: nn.Module, path: str, layer: OFTLayer) -> list[str]:
    base = layer.base_layer
    paths = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
    if len(paths) > 1:
        return [f"{path} is one module under several paths ({', '.join(paths)}), of which PEFT would adapt the first"]
    if is_conv1d(base):
        return [f"{path} is a Conv1D, and PEFT's OFT takes none"]
    if isinstance(layer, OFTExperts):
        return [f"{path} are experts with stacked weights ({type(base).__name__}), and PEFT's OFT takes none"]
    if isinstance(layer, OFTConv2d) and (set(base.kernel_size) != {1} or set(base.dilation) != {1}):
        return [
            f"{path} is a Conv2d with kernel {tuple(base.kernel_size)} and dilation {tuple(base.dilation)}: PEFT's OFT "
            "adds up overlapping patches and is right for 1×1 kernels alone"
        ]
    return []


def _features_and_rotation(layer: OFTLayer, name: str) -> tuple[int, Rotation]:
    return layer.rotated_features(layer.base_layer)[0], layer.rotations[name]


def _sizes(config: OFTConfig, layers: dict[str, tuple[int, Rotation]]) -> dict[str, int] | None:
    """PEFT's ``oft_block_size`` or ``r`` that give every layer its block size, also where PEFT adjusts them."""
    sizes = {rotation.block_size for _, rotation in layers.values()}
    counts = {rotation.num_blocks for _, rotation in layers.values()}
    asked = [size for size in [*sizes, config.block_size] if size is not None] if len(sizes) > 1 else [*sizes]
    for size in sorted(set(asked)):
        if all(_divisor(d, size) == rotation.block_size for d, rotation in layers.values()):
            return {"oft_block_size": size, "r": 0}
    for count in sorted({*counts, config.num_blocks or min(counts)}):
        if all(d // _divisor(d, count) == rotation.block_size for d, rotation in layers.values()):
            return {"oft_block_size": 0, "r": count}
    return None


def _divisor(features: int, asked: int) -> int:
    """The divisor of ``features`` that PEFT takes where it is asked for a number that may be none: the nearest."""
    if asked >= features:
        return features
    lower = next(n for n in range(asked, 0, -1) if features % n == 0)
    higher = next(n for n in range(asked, features + 1) if features % n == 0)
    return lower if asked - lower <= higher - asked else higher
