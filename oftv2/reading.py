"""Reading an adapter from disk, whoever wrote it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from .adapter_file import CONFIG_FILE, PREFIX, TENSORS_FILE, AdapterFile, parse_manifest
from .errors import AdapterError
from .peft_format import from_layout
from .peft_reader import read_peft
from .single_file import read_single_file

_PICKLE_FILE = "adapter_model.bin"


def read_adapter(source: str | os.PathLike[str], *, as_trained: bool = False) -> AdapterFile:
    """Reads an adapter without a model.

    Args:
        source (str | os.PathLike): a folder of this library's or PEFT's, or a single safetensors file.
        as_trained (bool): see :func:`oftv2.load_adapter`.

    Raises:
        AdapterError: files that are missing or truncated, or that hold something else.
    """
    path = tensors_file(Path(source))
    metadata, tensors = _read(path)
    if "oftv2" in metadata:
        return _read_own(metadata["oftv2"], path, tensors)
    if any(key.startswith(PREFIX) for key in tensors):
        if not (path.parent / CONFIG_FILE).is_file():
            raise AdapterError(
                f"{path} does not hold an oftv2 adapter's description, and no {CONFIG_FILE} of PEFT's is beside it"
            )
        return read_peft(tensors, path.parent, as_trained)
    return read_single_file(tensors, metadata, path)


def tensors_file(source: Path) -> Path:
    """The file with an adapter's tensors, from its folder or itself; AdapterError where there is none."""
    if source.is_file():
        return source
    for name in (TENSORS_FILE, _PICKLE_FILE):
        if (source / name).is_file():
            return source / name
    what = f"has no {TENSORS_FILE}" if source.is_dir() else "is not a folder"
    of_hub = not source.exists() and not source.is_absolute() and len(source.parts) == 2
    hub = f"; one of the Hub is fetched by huggingface_hub.snapshot_download({str(source)!r})" if of_hub else ""
    inside = sorted({str(path.parent) for path in source.glob("*/adapter_model.*")})[:3]
    there = f"; there is one in {', '.join(inside)}" if inside else ""
    raise AdapterError(f"{source} {what}: give the folder that save_adapter or PEFT wrote{hub}{there}")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        if path.name == _PICKLE_FILE:
            return {}, torch.load(path, map_location="cpu", weights_only=True)
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise AdapterError(f"{path} cannot be read, it may be truncated or hold no tensors: {error}") from error


def _read_own(manifest: str, path: Path, tensors: dict[str, Tensor]) -> AdapterFile:
    try:
        adapter, layout = parse_manifest(json.loads(manifest), path)
        if layout == "peft":
            tensors = from_layout(tensors, adapter.config, adapter.block_sizes)
        return dataclasses.replace(adapter, tensors=tensors)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} does not hold an oftv2 adapter's description: {error!r}") from error
