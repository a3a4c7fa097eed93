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
from .adapters import check_addable, check_unmerged, put
from .base import DEFAULT_ADAPTER
from .base_check import compare_base, describe_base
from .errors import AdapterError, PeftFormatWarning
from .fitting import check_tensors, check_trained, compare_plain, compare_wrapped, listed, without_copies
from .model_card import write_card
from .peft_format import peft_layout
from .reading import read_adapter
from .single_file import located
from .state import adapter_parameters, check_known, find_state, get_state, layers_of, plain_view, trained_parameters
from .trained import base_values
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
        adapter_name (str | None): which adapter, active or not; the active one by default.
        format (str | None): ``"peft"`` or ``"oftv2"``, no other; ``None`` takes the first that can hold the adapter.

    Returns:
        Path: the folder.

    Raises:
        AdapterError: not wrapped, merged, disabled, sharded, or several adapters active and none named; an adapter with
            NaN or Inf, which is not written over a good one; ``format="peft"`` and one that PEFT cannot express.
    """
    if format not in (None, "peft", "oftv2"):
        raise AdapterError(f'format={format!r} is not allowed: use "peft", "oftv2" or None')
    state = get_state(model)
    name = adapter_name or state.active
    check_known(model, [name])
    check_unmerged(model)
    layers, trained = layers_of(model, name), trained_parameters(model, name)
    tensors = {PREFIX + path + GENERATORS: layer.generators[name] for path, layer in layers.items()}
    tensors |= {PREFIX + path: parameter for path, parameter in trained.items()}
    sharded = [key for key, tensor in tensors.items() if hasattr(tensor, "full_tensor")]
    if sharded:
        raise AdapterError(f"not saved: sharded (FSDP) are {listed(sharded)}; call unshard() on those modules first")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError(f"not saved: NaN or Inf in {listed(bad)}")
    description, layout = None, "oftv2"
    if format != "oftv2" and (found := _in_peft_layout(model, name, refuse=format == "peft")) is not None:
        description, tensors, layout = *found, "peft"
    with base_values(model):
        base = describe_base(model, {path: layer.base_layer for path, layer in layers.items()})
    manifest = {
        "format_version": FORMAT_VERSION,
        "library": "oftv2",
        "layout": layout,
        "config": state.configs[name].to_dict(),
        "block_sizes": {path: layer.rotations[name].block_size for path, layer in layers.items()},
        "trained_parameters": list(trained),
        "base": base,
    }
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
    adapter_name: str | None = None,
    trainable: bool | None = None,
    check_base: bool = True,
    as_trained: bool = False,
) -> nn.Module:
    """Loads an adapter, this library's or PEFT's, into its base model, in place.

    Everything is checked before the model is touched: an adapter is loaded whole or not at all. Into a wrapped model,
    it is loaded over the adapter of the same name, which has to be alike; or, under a new name, beside the others,
    where :func:`oftv2.set_adapter` makes it active.

    Args:
        model (nn.Module): the base model that the adapter was trained on, quantized or not; or a wrapped one.
        folder (str | os.PathLike): what :func:`save_adapter` or PEFT (an OFT of 0.16 or later) wrote; or a single
            safetensors file of OneTrainer's or sd-scripts'.
        adapter_name (str | None): the name it gets; ``None`` is ``"default"``, and adds no further adapter.
        trainable (bool | None): whether to go on training it. ``None``: as the adapter of this name was, else no.
        check_base (bool): compare a sketch of the base weights with that of the model it was trained on.
            PEFT's files have none.
        as_trained (bool): of adapters that PEFT wrote before 0.18: with the series that they were trained with, and not
            with the slightly different one that later PEFTs read them with.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: one error that lists all that is wrong: unreadable or truncated files, missing and unexpected
            tensors, shapes, NaN or Inf, layers that the model lacks, other base weights.
    """
    adapter = _read_for(model, folder, as_trained)
    state = find_state(model)
    if adapter_name is None and state is not None and DEFAULT_ADAPTER not in state.configs:
        raise AdapterError(
            f"this model is wrapped, but has no adapter {DEFAULT_ADAPTER!r}: give the adapter in {folder} a name with "
            f"adapter_name=…, a new one, or one of {', '.join(map(repr, state.configs))} to load it over that one"
        )
    adapter_name = adapter_name or DEFAULT_ADAPTER
    if trainable and state is not None and adapter_name not in state.sequence:
        raise AdapterError(
            f"trainable=True, and only active adapters train: load {adapter_name!r} without it, and then call "
            f"set_adapter(model, {adapter_name!r})"
        )
    if state is not None and adapter_name in state.configs:
        problems = compare_wrapped(model, adapter, adapter_name) + check_trained(model, adapter, adapter_name)
        _check_fit(model, adapter, folder, problems, check_base)
    elif state is not None:
        check_addable(model, adapter_name)
        with plain_view(model):
            problems, targets = compare_plain(model, adapter)
        _check_fit(model, adapter, folder, problems + check_trained(model, adapter), check_base)
        put(model, adapter_name, adapter.config, targets, adapter.trained)
    else:
        check_model(model, adapter_name)
        problems, targets = compare_plain(model, adapter)
        _check_fit(model, adapter, folder, problems + check_trained(model, adapter), check_base)
        install(model, adapter.config, targets, adapter_name, trained=adapter.trained)
        trainable = bool(trainable)
    _copy(model, adapter, adapter_name)
    if trainable is not None:
        for parameter in adapter_parameters(model, adapter_name):
            parameter.requires_grad_(trainable)
    _warn_of_notes(adapter, folder)
    return model


def hotswap_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    check_base: bool = True,
    as_trained: bool = False,
) -> nn.Module:
    """Puts the values of another adapter into the place of one that a wrapped model has, active or not.

    The same parameters in the same memory get other values, so a compiled model is not compiled again, and a captured
    CUDA graph goes on to be right. Layers that the new adapter lacks become the identity, and what it did not train in
    full gets the base model's values.

    Args:
        model (nn.Module): a wrapped model.
        folder (str | os.PathLike): as for :func:`load_adapter`.
        adapter_name (str): which of the model's adapters.
        check_base, as_trained: as for :func:`load_adapter`.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: what :func:`load_adapter` refuses; a layer that the adapter in the model does not have, or that
            has another block size or other settings there. Nothing is changed then.
    """
    check_known(model, [adapter_name])
    adapter = _read_for(model, folder, as_trained)
    problems = compare_wrapped(model, adapter, adapter_name, subset=True)
    problems += check_trained(model, adapter, adapter_name, subset=True)
    _check_fit(model, adapter, folder, problems, check_base)
    _copy(model, adapter, adapter_name)
    for layer in layers_of(model, adapter_name).values():
        layer.refresh()
    _warn_of_notes(adapter, folder)
    return model


def _read_for(model: nn.Module, folder: str | os.PathLike[str], as_trained: bool) -> AdapterFile:
    """The adapter under the names that its layers have in ``model``."""
    adapter = read_adapter(folder, as_trained=as_trained)
    if adapter.origin not in ("oftv2", "PEFT"):
        adapter = located(adapter, model)
    return without_copies(adapter, model) if adapter.origin == "PEFT" else adapter


def _check_fit(
    model: nn.Module, adapter: AdapterFile, folder: str | os.PathLike[str], problems: list[str], check_base: bool
) -> None:
    """Raises one AdapterError for all that keeps the adapter from fitting."""
    problems = check_tensors(adapter) + problems
    if check_base and not problems:
        with base_values(model):
            problems += compare_base(model, adapter.base)
    if problems:
        more = f"\n  … and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        lines = "\n  ".join(problems[:_MAX_LISTED])
        raise AdapterError(f"the adapter in {folder} does not fit, and nothing was loaded:\n  {lines}{more}")


@torch.no_grad()
def _copy(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> None:
    """Copies the values in; what the adapter lacks gets the identity and the base model's values."""
    originals = get_state(model).originals
    for path, layer in layers_of(model, adapter_name).items():
        parameter = layer.generators[adapter_name]
        parameter.copy_(adapter.generators(path)) if path in adapter.block_sizes else parameter.zero_()
    for name, parameter in trained_parameters(model, adapter_name).items():
        parameter.copy_(adapter.parameter(name) if name in adapter.trained else originals[name])


def _warn_of_notes(adapter: AdapterFile, folder: str | os.PathLike[str]) -> None:
    for note in adapter.notes:
        warnings.warn(f"{folder}: {note}", PeftFormatWarning, stacklevel=3)
