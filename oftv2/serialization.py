"""Saving adapters and loading them: safetensors, atomic, and checked whole before a model is touched."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .adapter_file import (
    CONFIG_FILE,
    FORMAT_VERSION,
    GENERATORS,
    PREFIX,
    TENSORS_FILE,
    AdapterFile,
    write_atomically,
)
from .base import DEFAULT_ADAPTER, OFTLayer
from .base_check import compare_base, describe_base
from .config import OFTConfig
from .errors import AdapterError, PeftFormatWarning
from .fitting import check_tensors, check_trained, compare_plain, compare_wrapped, listed, refuse, without_copies
from .gradient_check import check_gradients
from .model_card import write_card
from .peft_format import peft_layout
from .reading import read_adapter
from .single_file import located
from .state import find_state, get_state, oft_layers, plain_parameter
from .targets import Target
from .wrap import check_model, install

_MAX_LISTED = 12


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

    Args:
        model (nn.Module): a wrapped model.
        folder (str | os.PathLike): where to.
        adapter_name (str | None): which adapter; the active one by default.
        format (str | None): ``"peft"`` or ``"oftv2"``, no other; ``None`` takes the first that can hold the adapter.

    Returns:
        Path: the folder.

    Raises:
        AdapterError: not wrapped, merged, sharded, or an adapter with NaN or Inf, which is not written over a good one;
            ``format="peft"`` and an adapter that PEFT cannot express.
    """
    if format not in (None, "peft", "oftv2"):
        raise AdapterError(f'format={format!r} is not allowed: use "peft", "oftv2" or None')
    state = get_state(model)
    name = adapter_name or state.active
    if name not in state.configs:
        raise AdapterError(f"there is no adapter {name!r} in this model; it has {', '.join(map(repr, state.configs))}")
    layers = dict(oft_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise AdapterError("the adapter is merged: call unmerge(model) before saving it")
    tensors = {PREFIX + path + GENERATORS: layer.generators[name] for path, layer in layers.items()}
    trained = tuple(state.originals[name])
    tensors |= {PREFIX + parameter: plain_parameter(model, parameter) for parameter in trained}
    sharded = [key for key, tensor in tensors.items() if hasattr(tensor, "full_tensor")]
    if sharded:
        raise AdapterError(f"not saved: sharded (FSDP) are {listed(sharded)}; call unshard() on those modules first")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError(f"not saved: NaN or Inf in {listed(bad)}")
    description, layout = None, "oftv2"
    if format != "oftv2" and (found := _in_peft_layout(model, name, refuse=format == "peft")) is not None:
        description, tensors, layout = *found, "peft"
    sizes = {path: layer.rotations[name].block_size for path, layer in layers.items()}
    base = describe_base(model, _frozen_layers(model, layers, trained))
    return _write(folder, tensors, _manifest(state.configs[name], sizes, trained, base, layout), description)


def rewrite_adapter(adapter: AdapterFile, folder: str | os.PathLike[str]) -> Path:
    """Writes an adapter that was read from disk in this library's own format, without its model.

    Raises:
        AdapterError: an adapter whose meaning depends on the model: layers by another program's names, or parameters
            that PEFT saved, which may be trained or not.
    """
    if adapter.origin != "oftv2" and (adapter.origin != "PEFT" or adapter.trained):
        what = "parameters beside its rotations" if adapter.trained else "layers by names of its own"
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
    data = safetensors.torch.save(
        {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
        metadata={"format": "pt", "oftv2": json.dumps(manifest)},
    )
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{folder} is a file: give the folder that the adapter is to be saved in")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / TENSORS_FILE, data)
    write_atomically(target / CONFIG_FILE, (json.dumps(description or manifest, indent=2) + "\n").encode())
    write_card(target, manifest)
    return target


def _frozen_layers(model: nn.Module, layers: dict[str, OFTLayer], trained: tuple[str, ...]) -> dict[str, nn.Module]:
    """The base layers whose weight is the base model's: one tied to a head that trains is not."""
    training = {id(plain_parameter(model, name)) for name in trained}
    bases = {path: layer.base_layer for path, layer in layers.items()}
    return {path: base for path, base in bases.items() if id(base._parameters.get("weight")) not in training}


def _in_peft_layout(
    model: nn.Module, name: str, *, refuse: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """PEFT's description and tensors; None, with a warning, where it cannot express the adapter."""
    found = peft_layout(model, name)
    if not found.problems:
        return found.config, found.tensors
    why = "\n  ".join(found.problems[:_MAX_LISTED])
    more = f"\n  … and {len(found.problems) - _MAX_LISTED} more" if len(found.problems) > _MAX_LISTED else ""
    if refuse:
        raise AdapterError(f'not saved: PEFT cannot express this adapter; use format="oftv2".\n  {why}{more}')
    warnings.warn(
        f'saved in the format "oftv2", which PEFT cannot read, for PEFT cannot express this adapter:\n  {why}{more}\n'
        'format="oftv2" says that this is meant; `python -m oftv2 convert` makes a LoRA of it',
        PeftFormatWarning,
        stacklevel=3,
    )
    return None


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    trainable: bool | None = None,
    check_base: bool = True,
    as_trained: bool = False,
) -> nn.Module:
    """Loads an adapter, this library's or PEFT's, into its base model, or into a model already wrapped alike, in place.

    Everything is checked before the model is touched: an adapter is loaded whole or not at all.

    Args:
        model (nn.Module): the base model that the adapter was trained on, quantized or not; or a wrapped one.
        folder (str | os.PathLike): what :func:`save_adapter` or PEFT (an OFT of 0.16 or later) wrote; or a single
            safetensors file of OneTrainer's or sd-scripts'.
        adapter_name (str): the name it gets.
        trainable (bool | None): whether to go on training it. ``None``: as it was in a wrapped model, else no.
        check_base (bool): compare a sketch of the base weights with that of the model it was trained on.
            PEFT's files have none.
        as_trained (bool): of adapters that PEFT wrote before 0.18: with the series that they were trained with, and not
            with the slightly different one that later PEFTs read them with.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: one error that lists all that is wrong: unreadable or truncated files, missing and unexpected
            tensors, shapes, NaN or Inf, layers that the model lacks, other base weights. With ``trainable=True`` also
            a layer that lets no gradient through.
    """
    adapter = read_adapter(folder, as_trained=as_trained)
    if adapter.origin not in ("oftv2", "PEFT"):
        adapter = located(adapter, model)
    if adapter.origin == "PEFT":
        adapter = without_copies(adapter, model)
    wrapped = find_state(model) is not None
    if wrapped:
        problems, targets = compare_wrapped(model, adapter, adapter_name), list[Target]()
    else:
        check_model(model, adapter_name)
        problems, targets = compare_plain(model, adapter)
    problems = check_tensors(adapter) + problems + check_trained(model, adapter)
    if trainable and not problems:
        check_gradients(_base_layers(model, targets))
    if check_base and not problems:
        problems += compare_base(model, adapter.base)
    refuse(f"the adapter in {folder} does not fit, and nothing was loaded", problems)
    if not wrapped:
        install(model, adapter.config, targets, adapter_name, trained=adapter.trained)
    _copy(model, adapter, adapter_name, trainable if trainable is not None or wrapped else False)
    for note in adapter.notes:
        warnings.warn(f"{folder}: {note}", PeftFormatWarning, stacklevel=2)
    return model


def _base_layers(model: nn.Module, targets: list[Target]) -> dict[str, nn.Module]:
    """What is to be adapted in a plain model, or is in a wrapped one, by its path."""
    layers = {path: layer.base_layer for path, layer in oft_layers(model)}
    return layers | {target.name: target.module for target in targets}


@torch.no_grad()
def _copy(model: nn.Module, adapter: AdapterFile, adapter_name: str, trainable: bool | None) -> None:
    parameters = [(layer.generators[adapter_name], adapter.generators(path)) for path, layer in oft_layers(model)]
    parameters += [(plain_parameter(model, name), adapter.parameter(name)) for name in adapter.trained]
    for parameter, value in parameters:
        parameter.copy_(value)
        if trainable is not None:
            parameter.requires_grad_(trainable)
