"""The adapter's file: one safetensors file with its description in the metadata, read with care, written atomically."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from .config import OFTConfig
from .errors import AdapterError

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
# PEFT's names, under which an adapter's tensors are found by its tools too.
PREFIX = "base_model.model."
GENERATORS = ".oft_R.weight"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter read from disk.

    Attributes:
        config: its configuration.
        block_sizes: by layer path.
        trained: names of the base parameters trained in full.
        base: what :func:`oftv2.base_check.describe_base` said of its base model.
        tensors: everything by its key in the file.
    """

    config: OFTConfig
    block_sizes: dict[str, int]
    trained: tuple[str, ...]
    base: dict[str, Any]
    tensors: dict[str, Tensor]

    def generators(self, layer: str) -> Tensor:
        return self.tensors[PREFIX + layer + GENERATORS]

    def parameter(self, name: str) -> Tensor:
        return self.tensors[PREFIX + name]

    def expected_keys(self) -> set[str]:
        layers = {PREFIX + layer + GENERATORS for layer in self.block_sizes}
        return layers | {PREFIX + name for name in self.trained}


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter without a model.

    Raises:
        AdapterError: files that are missing, truncated, or not written by this library.
    """
    path = Path(folder) / TENSORS_FILE
    if not path.is_file():
        what = "has no " + TENSORS_FILE if Path(folder).is_dir() else "is not a folder"
        raise AdapterError(f"{folder} {what}: give the folder that save_adapter wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read, it may be truncated: {error}") from error
    try:
        return _parse(json.loads(metadata["oftv2"]), path, tensors)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} does not hold an oftv2 adapter's description: {error!r}") from error


def _parse(manifest: dict[str, Any], path: Path, tensors: dict[str, Tensor]) -> AdapterFile:
    """Takes a description apart, part by part; whatever is not as it should be raises a ValueError or the like."""
    version = _checked(manifest["format_version"], int)
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {version}, and this oftv2 reads up to {FORMAT_VERSION}: update oftv2"
        )
    sizes = _checked(manifest["block_sizes"], dict)
    if not all(_checked(size, int) >= 2 for size in sizes.values()):
        raise ValueError(f"block_sizes={sizes} holds sizes below 2")
    base = _checked(manifest["base"], dict)
    for name in ("class", "name_or_path"):
        _checked(base[name], str)
    for layer, sketch in _checked(base["sketches"], dict).items():
        if layer not in sizes:
            raise ValueError(f"a sketch of {layer!r}, which is not adapted")
        _checked(sketch["quantized"], bool)
        for value in _checked(sketch["values"], list):
            _checked(value, float)
    trained = tuple(_checked(name, str) for name in _checked(manifest["trained_parameters"], list))
    return AdapterFile(OFTConfig.from_dict(_checked(manifest["config"], dict)), sizes, trained, base, tensors)


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} stands where a {kind.__name__} should")
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces ``path`` in one step; leftovers of writers that were killed are swept up."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if not _running(leftover.name.split(".")[-2]):
            leftover.unlink(missing_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _running(process: str) -> bool:
    """Whether a process of this number is there: its temporary file is being written, not left over."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
