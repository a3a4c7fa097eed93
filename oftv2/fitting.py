"""Whether an adapter fits a model: everything is compared before the model is touched."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .adapter_file import GENERATORS, PREFIX, AdapterFile
from .backends import find_backend
from .errors import AdapterError, listed
from .merging import scaled_rows
from .partitioned import full_shape
from .rotation import Rotation
from .state import find_state, get_state, layers_of, plain_name, plain_parameter
from .targets import Target, all_modules, layer_class_for


def check_tensors(adapter: AdapterFile) -> list[str]:
    """Tensors that are missing, unexpected, or hold no finite numbers."""
    expected, found = adapter.expected_keys(), set(adapter.tensors)
    problems = [f"missing tensor {key}" for key in sorted(expected - found)]
    problems += [f"unexpected tensor {key}" for key in sorted(found - expected)]
    for key in sorted(expected & found):
        tensor = adapter.tensors[key]
        if not tensor.is_floating_point() and key.endswith(GENERATORS):
            problems.append(f"{key} is {tensor.dtype}, not a floating-point tensor")
        elif not tensor.isfinite().all():
            problems.append(f"{key} holds NaN or Inf")
    return problems


def compare_plain(model: nn.Module, adapter: AdapterFile) -> tuple[list[str], list[Target]]:
    """What keeps the adapter from fitting a plain model, and where it goes if nothing does."""
    problems, targets = [], []
    modules, paths = all_modules(model)
    for name, block_size in adapter.block_sizes.items():
        module = modules.get(name)
        layer_class = layer_class_for(module, named=True) if module is not None else None
        if module is None or layer_class is None:
            what = "has no such module" if module is None else f"has a {type(module).__name__} there"
            problems.append(f"{name}: this {type(model).__name__} {what}")
            continue
        target = Target(name, tuple(paths[id(module)]), module, layer_class, block_size)
        try:
            rotation = target.rotation(adapter.config)
        except AdapterError:
            features, _ = layer_class.rotated_features(module)
            problems.append(
                f"{name}: saved with block size {block_size}, which does not divide {features} features here"
            )
            continue
        problems += _check_shape(adapter, name, rotation) + _check_scale(adapter, name, module)
        targets.append(target)
    return problems, targets


def compare_wrapped(model: nn.Module, adapter: AdapterFile, adapter_name: str, *, subset: bool = False) -> list[str]:
    """What keeps the adapter from taking the place of one that a model has; with ``subset`` it may lack layers."""
    layers = layers_of(model, adapter_name)
    problems = [f"{name}: in the file, not adapted in this model" for name in adapter.block_sizes if name not in layers]
    if not subset:
        problems += [
            f"{name}: adapted in this model, not in the file" for name in layers if name not in adapter.block_sizes
        ]
    if any(layer.merged for layer in layers.values()):
        problems.append("the model's adapter is merged: call unmerge first")
    if not all(layer.enabled for layer in layers.values()):
        problems.append("the model's adapter is disabled: leave disable_adapter first")
    for name in (name for name in layers if name in adapter.block_sizes):
        layer = layers[name]
        here = layer.rotations[adapter_name]
        try:
            saved = layer.resolve(layer.base_layer, adapter.config, name, adapter.block_sizes[name])
        except AdapterError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{name}: {field.name} is {getattr(saved, field.name)!r} in the file, {getattr(here, field.name)!r} here"
            for field in dataclasses.fields(Rotation)
            if getattr(saved, field.name) != getattr(here, field.name) and field.name != "dropout"
        ]
        problems += _check_shape(adapter, name, saved) + _check_scale(adapter, name, layer.base_layer)
    return problems


def _check_shape(adapter: AdapterFile, name: str, rotation: Rotation) -> list[str]:
    tensor = adapter.tensors.get(PREFIX + name + GENERATORS)
    if tensor is None or tuple(tensor.shape) == rotation.shape:
        return []
    return [f"{name}: generators of shape {tuple(tensor.shape)} in the file, {rotation.shape} needed here"]


def _check_scale(adapter: AdapterFile, name: str, base: nn.Module) -> list[str]:
    scale = adapter.output_scales.get(name)
    if scale is None or _can_be_scaled(base, scale):
        return []
    return [
        f"{name}: the adapter scales {len(scale)} outputs too (PEFT 0.14 and 0.15 did), which takes a Linear or Conv2d "
        f"of as many that is not quantized, and here is {base}"
    ]


def _can_be_scaled(base: nn.Module, scale: Tensor) -> bool:
    if not isinstance(base, (nn.Linear, nn.Conv2d)) or find_backend(base) is not None:
        return False
    return full_shape(base.weight)[:1] == scale.shape


def check_trained(
    model: nn.Module, adapter: AdapterFile, adapter_name: str | None = None, *, subset: bool = False
) -> list[str]:
    """What is wrong with the base parameters that were trained in full; ``adapter_name``: whose place it is to take."""
    problems = []
    here_too = adapter.trained if adapter_name is None else get_state(model).trained[adapter_name]
    other = sorted(set(adapter.trained) - set(here_too) if subset else set(adapter.trained) ^ set(here_too))
    if other:
        problems.append(f"parameters trained in full differ between the file and this model: {listed(other)}")
    for name in adapter.trained:
        try:
            parameter = plain_parameter(model, name)
        except AttributeError:
            problems.append(f"{name}: this {type(model).__name__} has no such parameter")
            continue
        here, tensor = tuple(full_shape(parameter)), adapter.tensors.get(PREFIX + name)
        if tensor is not None and tuple(tensor.shape) != here:
            rows = f"resize_token_embeddings({len(tensor)}) or num_labels={len(tensor)}"
            hint = f" (as trained, it had {rows})" if tensor.dim() == 2 and tensor.shape[1:] == here[1:] else ""
            problems.append(f"{name}: shape {tuple(tensor.shape)} in the file, {here} here{hint}")
        if tensor is not None and tensor.is_floating_point() != parameter.is_floating_point():
            problems.append(f"{name}: {tensor.dtype} in the file, {parameter.dtype} here")
    return problems + _check_tied(model, adapter)


def _check_tied(model: nn.Module, adapter: AdapterFile) -> list[str]:
    """What was trained as a copy of its own cannot be loaded into a weight that something else uses too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return [
        f"{name} was trained apart from {', '.join(other for other in tied if other != name)}, and here they are tied: "
        "untie them first (give the module a copy of its weight, and set config.tie_word_embeddings=False)"
        for tied in names.values()
        for name in tied
        if len(tied) > 1 and name in adapter.apart
    ]


@torch.no_grad()
def with_scaled_weights(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """With output scales made part of weights that belong to the adapter, wherever they fit those of ``model``."""
    state = find_state(model)
    originals = {} if state is None else state.originals
    scaled, modules = {}, dict(model.named_modules(remove_duplicate=False)) if adapter.output_scales else {}
    for layer, scale in adapter.output_scales.items():
        module = modules.get(layer)
        base = getattr(module, "base_layer", module)
        if base is not None and _can_be_scaled(base, scale):
            name = f"{layer}.weight"
            scaled[name] = scaled_rows(originals.get(name, base.weight.detach()), scale).to(base.weight.dtype)
    return dataclasses.replace(
        adapter,
        trained=(*adapter.trained, *scaled),
        apart=(*adapter.apart, *scaled),
        tensors=adapter.tensors | {PREFIX + name: weight for name, weight in scaled.items()},
    )


def without_copies(adapter: AdapterFile, model: nn.Module, adapter_name: str) -> AdapterFile:
    """Without the embeddings that PEFT saves beside an adapter though it does not train them."""

    state = find_state(model)
    originals = {} if state is None else state.originals
    wanted = () if state is None else state.trained.get(adapter_name, ())

    def is_copy(name: str) -> bool:
        try:
            here = originals.get(name, plain_parameter(model, name))
        except AttributeError:
            return False
        saved = adapter.parameter(name)
        return name not in adapter.apart and here.shape == saved.shape and bool((here.cpu() == saved).all())

    trained = tuple(name for name in adapter.trained if name in wanted or not is_copy(name))
    dropped = {PREFIX + name for name in set(adapter.trained) - set(trained)}
    tensors = {key: value for key, value in adapter.tensors.items() if key not in dropped}
    return dataclasses.replace(adapter, trained=trained, tensors=tensors)
