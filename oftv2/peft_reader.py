"""Reading adapters that PEFT wrote: its configuration and tensor names to this library's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_file import CONFIG_FILE, GENERATORS, PREFIX, AdapterFile
from .config import OFTConfig
from .errors import AdapterError
from .peft_before_016 import is_before_016, modernized
from .peft_config import DEFAULT_TERMS, from_peft, series_before_018
from .peft_format import EMBEDDING_GENERATORS, from_layout

_DROPOUT = (
    "module_dropout={} is in the file, and was never applied: PEFT ignores it. Loaded with dropout 0, as it was trained"
)
_SERIES = (
    "written by PEFT before 0.18, whose Neumann series doubled its last power too: loaded as today's PEFT reads it, "
    "which is not quite what was trained; load_adapter(…, as_trained=True) takes the series that it was trained with"
)
_AS_TRAINED = (
    "written by PEFT before 0.18: loaded with the series that it was trained with, unlike what today's PEFT does"
)
_IDENTITY = (
    "num_cayley_neumann_terms={}: PEFT's rotation is the identity for such a series, and this adapter does nothing"
)


def read_peft(tensors: dict[str, Tensor], folder: Path, as_trained: bool) -> AdapterFile:
    """The adapter in a folder that PEFT wrote.

    Raises:
        AdapterError: another kind of adapter, or a configuration that cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "peft_type" not in values:
            raise ValueError("no peft_type")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} does not hold PEFT's description of an adapter: {error}") from error
    if values["peft_type"] != "OFT":
        raise AdapterError(f"{folder} holds a {values['peft_type']} adapter of PEFT's; this library takes OFT")
    scales: dict[str, Tensor] = {}
    old_notes: tuple[str, ...] = ()
    if is_before_016(tensors):
        tensors, values, scales, old_notes = modernized(tensors, values, folder)
    config, notes, rotates = _config(values, path, as_trained)
    tensors = dict(tensors)
    sizes: dict[str, int] = {}
    for key in list(tensors):
        suffix = next((end for end in (GENERATORS, EMBEDDING_GENERATORS) if key.endswith(end)), None)
        if suffix is None:
            continue
        sizes[key.removeprefix(PREFIX).removesuffix(suffix)] = block_size_of(key, tensors[key])
        if not rotates:
            tensors[key] = torch.zeros_like(tensors[key])
    tensors = from_layout(tensors, config, sizes)
    generators = {PREFIX + layer + GENERATORS for layer in sizes}
    trained = tuple(key.removeprefix(PREFIX) for key in tensors if key not in generators)
    tops, apart = _saved(trained, config.modules_to_save or ())
    base: dict[str, Any] = {
        "class": (values.get("auto_mapping") or {}).get("base_model_class") or "",
        "task": values.get("task_type") or "",
        "name_or_path": values.get("base_model_name_or_path") or "",
        "sketches": {},
    }
    config = dataclasses.replace(config, modules_to_save=tops)
    notes = (*old_notes, *notes)
    return AdapterFile(config, sizes, trained, base, tensors, "PEFT", notes, apart, output_scales=scales)


def block_size_of(key: str, tensor: Tensor) -> int:
    """``b`` of packed generators ``(r, b(b−1)/2)``; the configuration has only what was asked for."""
    count = tensor.shape[-1] if tensor.dim() == 2 else -1
    size = (1 + math.isqrt(1 + 8 * max(count, 0))) // 2
    if size < 2 or size * (size - 1) // 2 != count:
        raise AdapterError(
            f"{key} of shape {tuple(tensor.shape)} holds no packed skew-symmetric matrices (r, b(b−1)/2)"
        )
    return size


def _config(values: Mapping[str, Any], path: Path, as_trained: bool) -> tuple[OFTConfig, tuple[str, ...], bool]:
    """The configuration, what to tell the user, and whether the adapter rotates anything at all."""
    terms, neumann = values.get("num_cayley_neumann_terms", DEFAULT_TERMS), values.get("use_cayley_neumann", True)
    notes = []
    rotates = not neumann or (isinstance(terms, int) and terms >= 2)
    if not rotates:
        notes.append(_IDENTITY.format(terms))
        values = {**values, "num_cayley_neumann_terms": DEFAULT_TERMS}
    try:
        fields = from_peft(values)
        if rotates and neumann and terms > 2 and _before_018(values.get("peft_version")):
            notes.append(_AS_TRAINED if as_trained else _SERIES)
            fields |= series_before_018(terms) if as_trained else {}
        if fields.pop("dropout", 0):
            notes.append(_DROPOUT.format(values["module_dropout"]))
        return OFTConfig(**fields), tuple(notes), rotates
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path} cannot be taken over: {error}") from error


def _before_018(version: Any) -> bool:
    """PEFT notes its version from 0.18 on; before that there is none."""
    numbers = str(version or "0.0").partition("@")[0].split(".")
    return tuple(int(number) if number.isdigit() else 0 for number in numbers[:2]) < (0, 18)


def _saved(trained: tuple[str, ...], names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the modules that PEFT trained in full, by their names, and the parameters in them."""
    tops: dict[str, None] = {}
    apart = []
    for parameter in trained:
        parts = parameter.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        top = next((path for path in paths if path.endswith(names)), None) if names else None
        if top is not None:
            tops[top] = None
            apart.append(parameter)
    return tuple(tops), tuple(apart)
