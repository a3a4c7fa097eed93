"""The adapter's file: one safetensors file with its description in the metadata, and how it is written atomically."""

from __future__ import annotations

import glob
import json
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .config import OFTConfig
from .errors import AdapterError

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 2  # 1 had one layout, now called "oftv2"
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
        tensors: everything by its key, under this library's names.
        origin: what wrote it.
        notes: what the user should know of how it was read.
        apart: of ``trained``, what was trained as a copy of its own, even where the base model ties it.
        output_scales: by layer path, what its outputs, but for the bias, are multiplied by, ``(n,)``.
    """

    config: OFTConfig
    block_sizes: dict[str, int]
    trained: tuple[str, ...]
    base: dict[str, Any]
    tensors: dict[str, Tensor]
    origin: str = "oftv2"
    notes: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    output_scales: Mapping[str, Tensor] = field(default_factory=dict)

    def generators(self, layer: str) -> Tensor:
        """A layer's packed generators, as they are in the file."""
        return self.tensors[PREFIX + layer + GENERATORS]

    def parameter(self, name: str) -> Tensor:
        """A parameter of the base model that trained in full."""
        return self.tensors[PREFIX + name]

    def expected_keys(self) -> set[str]:
        """The names of the tensors that the description promises."""
        layers = {PREFIX + layer + GENERATORS for layer in self.block_sizes}
        return layers | {PREFIX + name for name in self.trained}


def parse_manifest(manifest: dict[str, Any], path: Path) -> tuple[AdapterFile, str]:
    """The adapter that a file of this library describes, without its tensors, and the layout of those.

    Takes the description apart, part by part; whatever is not as it should be raises a ValueError or the like.
    """
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
    layout = manifest["layout"] if version > 1 else "oftv2"
    if layout not in ("oftv2", "peft"):
        raise ValueError(f"layout={layout!r}")
    return AdapterFile(OFTConfig.from_dict(_checked(manifest["config"], dict)), sizes, trained, base, {}), layout


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} stands where a {kind.__name__} should")
    return value


def serialized(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    """A safetensors file of tensors from any device, which may share memory."""
    data = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    return safetensors.torch.save(data, metadata={"format": "pt", **metadata})


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces ``path`` in one step; leftovers of writers that were killed are swept up.

    Several processes and threads may do so at once, on several machines that share the folder, too.
    """
    host = platform.node()
    for leftover in path.parent.glob(f".{path.name}.{glob.escape(host)}.*.tmp"):
        if not _running(leftover.name.split(".")[-2]):
            leftover.unlink(missing_ok=True)
    temporary = path.parent / f".{path.name}.{host}.{threading.get_ident()}.{os.getpid()}.tmp"
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces ``path`` in one step by indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _running(process: str) -> bool:
    """Whether a process of this number is there: its temporary file is being written, not left over."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
