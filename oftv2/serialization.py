"""Saving adapters and loading them: safetensors, atomic, and checked whole before a model is touched."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

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
    read_adapter,
    write_atomically,
)
from .base import DEFAULT_ADAPTER
from .base_check import compare_base, describe_base
from .errors import AdapterError
from .model_card import write_card
from .rotation import Rotation
from .state import find_state, get_state, oft_layers, plain_parameter
from .targets import Target, layer_class_for
from .wrap import check_model, install

_MAX_LISTED = 12


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str | None = None) -> Path:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``, which is made if needed, and a
    model card beside them, unless there is one that was edited.

    The safetensors file holds everything, the configuration too, and replaces an older one in a single step: whoever
    stops the program at any moment finds the old adapter or the new one. The JSON beside it is for people and tools.

    Args:
        model (nn.Module): a wrapped model.
        folder (str | os.PathLike): where to.
        adapter_name (str | None): which adapter; the active one by default.

    Returns:
        Path: the folder.

    Raises:
        AdapterError: not wrapped, merged, sharded, or an adapter with NaN or Inf, which is not written over a good one.
    """
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
        raise AdapterError(f"not saved: sharded (FSDP) are {_listed(sharded)}; call unshard() on those modules first")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError(f"not saved: NaN or Inf in {_listed(bad)}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "library": "oftv2",
        "config": state.configs[name].to_dict(),
        "block_sizes": {path: layer.rotations[name].block_size for path, layer in layers.items()},
        "trained_parameters": list(trained),
        "base": describe_base(model, {path: layer.base_layer for path, layer in layers.items()}),
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
    write_atomically(target / CONFIG_FILE, (json.dumps(manifest, indent=2) + "\n").encode())
    write_card(target, manifest)
    return target


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    trainable: bool | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Loads an adapter into its base model, or into a model already wrapped alike, in place.

    Everything is checked before the model is touched: an adapter is loaded whole or not at all.

    Args:
        model (nn.Module): the base model that the adapter was trained on, quantized or not; or a wrapped one.
        folder (str | os.PathLike): what :func:`save_adapter` wrote.
        adapter_name (str): the name it gets.
        trainable (bool | None): whether to go on training it. ``None``: as it was in a wrapped model, else no.
        check_base (bool): compare a sketch of the base weights with that of the model it was trained on.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: one error that lists all that is wrong: unreadable or truncated files, missing and unexpected
            tensors, shapes, NaN or Inf, layers that the model lacks, other base weights.
    """
    adapter = read_adapter(folder)
    wrapped = find_state(model) is not None
    if wrapped:
        problems, targets = _compare_wrapped(model, adapter, adapter_name), list[Target]()
    else:
        check_model(model, adapter_name)
        problems, targets = _compare_plain(model, adapter)
    problems = _check_tensors(adapter) + problems + _check_trained(model, adapter)
    if check_base and not problems:
        problems += compare_base(model, adapter.base)
    if problems:
        more = f"\n  … and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        lines = "\n  ".join(problems[:_MAX_LISTED])
        raise AdapterError(f"the adapter in {folder} does not fit, and nothing was loaded:\n  {lines}{more}")
    if not wrapped:
        install(model, adapter.config, targets, adapter_name, trained=adapter.trained)
    _copy(model, adapter, adapter_name, trainable if trainable is not None or wrapped else False)
    return model


def _check_tensors(adapter: AdapterFile) -> list[str]:
    expected, found = adapter.expected_keys(), set(adapter.tensors)
    problems = [f"missing tensor {key}" for key in sorted(expected - found)]
    problems += [f"unexpected tensor {key}" for key in sorted(found - expected)]
    for key in sorted(expected & found):
        tensor = adapter.tensors[key]
        if not tensor.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, not a floating-point tensor")
        elif not tensor.isfinite().all():
            problems.append(f"{key} holds NaN or Inf")
    return problems


def _compare_plain(model: nn.Module, adapter: AdapterFile) -> tuple[list[str], list[Target]]:
    """What keeps the adapter from fitting a plain model, and where it goes if nothing does."""
    problems, targets = [], []
    paths: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    for name, block_size in adapter.block_sizes.items():
        module = modules.get(name)
        layer_class = layer_class_for(module, named=True) if module is not None else None
        if module is None or layer_class is None:
            what = "has no such module" if module is None else f"has a {type(module).__name__} there"
            problems.append(f"{name}: this {type(model).__name__} {what}")
            continue
        features, groups = layer_class.rotated_features(module)
        try:
            rotation = Rotation.resolve(adapter.config, features, name, groups=groups, block_size=block_size)
        except AdapterError:
            problems.append(
                f"{name}: saved with block size {block_size}, which does not divide {features} features here"
            )
            continue
        problems += _check_shape(adapter, name, rotation)
        targets.append(Target(name, tuple(paths[id(module)]), module, layer_class, block_size))
    return problems, targets


def _compare_wrapped(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> list[str]:
    layers = dict(oft_layers(model))
    if adapter_name not in get_state(model).configs:
        return [f"this model is wrapped, but has no adapter {adapter_name!r}"]
    problems = [f"{name}: in the file, not adapted in this model" for name in adapter.block_sizes if name not in layers]
    problems += [
        f"{name}: adapted in this model, not in the file" for name in layers if name not in adapter.block_sizes
    ]
    if any(layer.merged for layer in layers.values()):
        problems.append("the model's adapter is merged: call unmerge first")
    for name in set(layers) & set(adapter.block_sizes):
        here = layers[name].rotations[adapter_name]
        features, groups = layers[name].rotated_features(layers[name].base_layer)
        try:
            saved = Rotation.resolve(
                adapter.config, features, name, groups=groups, block_size=adapter.block_sizes[name]
            )
        except AdapterError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{name}: {field.name} is {getattr(saved, field.name)!r} in the file, {getattr(here, field.name)!r} here"
            for field in dataclasses.fields(Rotation)
            if getattr(saved, field.name) != getattr(here, field.name) and field.name != "dropout"
        ]
        problems += _check_shape(adapter, name, saved)
    return problems


def _check_shape(adapter: AdapterFile, name: str, rotation: Rotation) -> list[str]:
    tensor = adapter.tensors.get(PREFIX + name + GENERATORS)
    if tensor is None or tuple(tensor.shape) == rotation.shape:
        return []
    return [f"{name}: generators of shape {tuple(tensor.shape)} in the file, {rotation.shape} needed here"]


def _check_trained(model: nn.Module, adapter: AdapterFile) -> list[str]:
    state = find_state(model)
    problems = []
    if state is not None and set(state.originals[state.active]) != set(adapter.trained):
        other = sorted(set(state.originals[state.active]) ^ set(adapter.trained))
        problems.append(f"parameters trained in full differ between the file and this model: {_listed(other)}")
    for name in adapter.trained:
        try:
            here = tuple(plain_parameter(model, name).shape)
        except AttributeError:
            problems.append(f"{name}: this {type(model).__name__} has no such parameter")
            continue
        tensor = adapter.tensors.get(PREFIX + name)
        if tensor is not None and tuple(tensor.shape) != here:
            problems.append(f"{name}: shape {tuple(tensor.shape)} in the file, {here} here")
    return problems


@torch.no_grad()
def _copy(model: nn.Module, adapter: AdapterFile, adapter_name: str, trainable: bool | None) -> None:
    parameters = [(layer.generators[adapter_name], adapter.generators(path)) for path, layer in oft_layers(model)]
    parameters += [(plain_parameter(model, name), adapter.parameter(name)) for name in adapter.trained]
    for parameter, value in parameters:
        parameter.copy_(value)
        if trainable is not None:
            parameter.requires_grad_(trainable)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
