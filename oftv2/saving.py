"""Saving adapters: one safetensors file, written atomically, and never over a good adapter if there is NaN in it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_file import (
    CONFIG_FILE,
    FORMAT_VERSION,
    GENERATORS,
    PREFIX,
    TENSORS_FILE,
    AdapterFile,
    serialized,
    write_atomically,
    write_json,
)
from .adapters import check_unmerged
from .base import OFTLayer
from .base_check import describe_base, keep_sketches
from .config import OFTConfig
from .errors import AdapterError, PeftFormatWarning, itemized, listed, refuse
from .fitting import check_tensors
from .model_card import write_card
from .partitioned import gathered, is_partitioned
from .peft_format import peft_layout
from .sharding import is_sharded, is_writer, unsharded, warning_of_waits, whole_generators
from .state import adapter_parameters, check_known, get_state, layers_of, trained_parameters
from .trained import base_values
from .unsaved import warn_of_unsaved

# Where PEFT looks up which kind of adapter a folder holds; its error shows what it looked for, and nothing else.
_NOT_PEFTS = "OFT in the format of oftv2, which PEFT cannot read: load it with oftv2.load_adapter"


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    format: str | None = None,
) -> Path:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``, which is made if needed, and a
    model card beside them, unless there is one that was edited.

    By default in PEFT's layout, so that ``PeftModel.from_pretrained(base, folder)`` computes the same (PEFT 0.18 and
    up). What PEFT cannot express is written in this library's own layout instead, with a warning that names it: by the
    time of saving, an error would cost a finished training.

    The safetensors file holds everything that :func:`load_adapter` needs, and replaces an older one in a single step:
    whoever stops the program at any moment finds the old adapter or the new one. The JSON beside it is for PEFT, or for
    people.

    Of a model that FSDP2 or DeepSpeed ZeRO-3 shards, **every process has to call this**: together they gather the
    adapter, the first one writes it, and the others wait until it is there. One that is alone warns after a minute, and
    waits as long as the process group's timeout. Under DDP any of them may call it, or all, with the model inside.

    Args:
        model (nn.Module): a wrapped model.
        folder (str | os.PathLike): where to.
        adapter_name (str | None): which adapter, active or not; the active one by default.
        format (str | None): ``"peft"`` or ``"oftv2"``, no other; ``None`` takes the first that can hold the adapter.

    Returns:
        Path: the folder.

    Raises:
        AdapterError: not wrapped, merged, disabled, sharded by FSDP1, or several adapters active and none named; an
            adapter with NaN or Inf, which is not written over a good one; ``format="peft"`` and one that PEFT cannot
            express.
    """
    if format not in (None, "peft", "oftv2"):
        raise AdapterError(f'format={format!r} is not allowed: use "peft", "oftv2" or None')
    state = get_state(model)
    name = adapter_name or state.active
    check_known(model, [name])
    check_unmerged(model)
    warn_of_unsaved(model)
    layers, parameters = layers_of(model, name), adapter_parameters(model, name)
    collective = any(is_sharded(parameter) or is_partitioned(parameter) for parameter in parameters)
    if not collective:
        return _write(folder, *_content(model, name, layers, format))
    with warning_of_waits("save_adapter"):
        try:
            with unsharded(model, parameters), gathered(parameters):
                keep_sketches({path: layer.base_layer for path, layer in layers.items()})
                content = _content(model, name, layers, format)
                return _write(folder, *content) if is_writer() else Path(folder)
        finally:
            torch.distributed.barrier()  # whichever process reads it next, it is there


def _content(
    model: nn.Module, name: str, layers: dict[str, OFTLayer], format: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any] | None]:
    """An adapter's tensors, its description, and PEFT's description where its layout can hold the adapter."""
    state, trained = get_state(model), trained_parameters(model, name)
    tensors = {PREFIX + path + GENERATORS: whole_generators(layer, name) for path, layer in layers.items()}
    tensors |= {PREFIX + path: parameter for path, parameter in trained.items()}
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError(f"not saved: NaN or Inf in {listed(bad)}")
    description, layout = None, "oftv2"
    if format != "oftv2" and (found := _in_peft_layout(model, name, refuse=format == "peft")) is not None:
        description, tensors, layout = *found, "peft"
    sizes = {path: layer.rotations[name].block_size for path, layer in layers.items()}
    with base_values(model):
        base = describe_base(model, {path: layer.base_layer for path, layer in layers.items()})
    return tensors, _manifest(state.configs[name], sizes, tuple(trained), base, layout), description


def places(model: nn.Module, adapter_names: Sequence[str] | None = None) -> dict[str, Path]:
    """The folders of adapters within one that holds several, as PEFT reads them: ``.``, and subfolders of their names.

    The first active one is in the folder itself; where none of those named is active, the first of them.

    Raises:
        AdapterError: not wrapped; unknown names.
    """
    state = get_state(model)
    names = list(state.configs) if adapter_names is None else list(adapter_names)
    check_known(model, names)
    if not names:
        raise AdapterError("no adapter is named, so there is nothing to save")
    first = next((name for name in state.sequence if name in names), names[0])
    return {first: Path("."), **{name: Path(name) for name in names if name != first}}


def save_adapters(model: nn.Module, folder: str | os.PathLike[str], adapter_names: Sequence[str] | None = None) -> Path:
    """Writes several adapters, as PEFT does: one into ``folder``, and every other one into a subfolder of its name.

    Args:
        model (nn.Module): a wrapped model.
        folder (str | os.PathLike): where to.
        adapter_names (Sequence[str] | None): which; ``None``: all of them. The first active one goes into the folder
            itself; where none of them is active, the first.

    Returns:
        Path: the folder.

    Raises:
        AdapterError: see :func:`save_adapter`; unknown names.
    """
    for name, place in places(model, adapter_names).items():
        save_adapter(model, Path(folder) / place, adapter_name=name)
    return Path(folder)


def rewrite_adapter(adapter: AdapterFile, folder: str | os.PathLike[str]) -> Path:
    """Writes an adapter that was read from disk in this library's own format, without its model.

    Raises:
        AdapterError: an adapter whose meaning depends on the model: layers by another program's names, parameters that
            PEFT saved, which may be trained or not, or scales of a weight.
    """
    beside = adapter.trained or adapter.output_scales
    if adapter.origin != "oftv2" and (adapter.origin != "PEFT" or beside):
        what = "parameters beside its rotations" if beside else "layers by names of its own"
        raise AdapterError(f"this adapter of {adapter.origin} has {what}: give the base model with --base")
    refuse("not written", check_tensors(adapter))
    base = {field: adapter.base[field] for field in ("class", "name_or_path", "sketches")}
    manifest = _manifest(adapter.config, adapter.block_sizes, adapter.trained, base, "oftv2")
    for note in adapter.notes:
        warnings.warn(note, PeftFormatWarning, stacklevel=2)
    return _write(folder, adapter.tensors, manifest, None)


def _manifest(
    config: OFTConfig, block_sizes: dict[str, int], trained: tuple[str, ...], base: dict[str, Any], layout: str
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "library": "oftv2",
        "layout": layout,
        "config": config.to_dict(),
        "block_sizes": block_sizes,
        "trained_parameters": list(trained),
        "base": base,
    }


def _write(
    folder: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    manifest: dict[str, Any],
    description: dict[str, Any] | None,
) -> Path:
    data = serialized(tensors, oftv2=json.dumps(manifest))
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{folder} is a file: give the folder that the adapter is to be saved in")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / TENSORS_FILE, data)
    write_json(target / CONFIG_FILE, description or {"peft_type": _NOT_PEFTS, **manifest})
    write_card(target, manifest)
    return target


def _in_peft_layout(
    model: nn.Module, name: str, *, refuse: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """PEFT's description and tensors; None, with a warning, where it cannot express the adapter."""
    found = peft_layout(model, name)
    if not found.problems:
        return found.config, found.tensors
    why = itemized(found.problems)
    if refuse:
        raise AdapterError(f'not saved: PEFT cannot express this adapter; use format="oftv2".\n{why}')
    warnings.warn(
        f'saved in the format "oftv2", which PEFT cannot read, for PEFT cannot express this adapter:\n{why}\n'
        'format="oftv2" says that this is meant; `python -m oftv2 convert` makes a LoRA of it',
        PeftFormatWarning,
        stacklevel=4,
    )
    return None
