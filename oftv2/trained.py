"""Base parameters that adapters train in full (``modules_to_save``, biases): each adapter has its own.

With them go the buffers of those modules, such as running statistics, which a training pass writes.

Those of the active adapters are in the model, where the base model's would be; those of the others are set aside, and
belong to the model's state dictionary under names of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, TargetWarning
from .partitioned import refuse_partitioned
from .sharding import is_distributed, is_fsdp, is_sharded, plain_path
from .state import (
    AdapterState,
    active_parameters,
    find_state,
    get_state,
    persistent_buffers,
    plain_name,
    plain_parameter,
    trained_parameters,
)

PREFIX = "_oftv2."


def warn_of_statistics(model: nn.Module, trained: Sequence[str]) -> None:
    """A TargetWarning where training passes write running statistics that are not among ``trained``."""
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and f"{path}.running_mean" not in trained
    ]
    if found:
        name = found[0].rpartition(".")[2]
        warnings.warn(
            f"training passes change the running statistics of {len(found)} frozen layers ({found[0]}, a "
            f"{type(model.get_submodule(found[0])).__name__}, …), and no adapter holds them: name these layers in "
            f"modules_to_save, as in modules_to_save=[{name!r}], or keep them in eval mode",
            TargetWarning,
            stacklevel=3,
        )


def check_together(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raises AdapterError where two of the adapters train the same base parameter, or it cannot be exchanged."""
    state = get_state(model)
    owners: dict[int, str] = {}
    for adapter in adapter_names:
        for parameter, name in {id(plain_parameter(model, name)): name for name in state.trained[adapter]}.items():
            if parameter in owners:
                raise AdapterError(
                    f"the adapters {owners[parameter]!r} and {adapter!r} both train {name} in full, so they cannot be "
                    "active together: a parameter has one value"
                )
            owners[parameter] = adapter
    if set(adapter_names) == set(state.sequence):
        return
    exchanged = {name for adapter in {*adapter_names, *state.sequence} for name in state.trained[adapter]}
    refuse_partitioned(
        [(name, plain_parameter(model, name)) for name in sorted(exchanged)],
        "another adapter's values cannot take its place; call set_adapter on a model without ZeRO-3",
    )
    sharded = [name for name in sorted(exchanged) if is_sharded(plain_parameter(model, name))]
    if sharded:
        raise AdapterError(
            f"{sharded[0]} is sharded (FSDP), so another adapter's values cannot take its place: call set_adapter "
            "before the model is sharded"
        )


def check_here(model: nn.Module, names: Iterable[str]) -> None:
    """Raises AdapterError where a parameter that is to train in full has no values here: what is written is lost.

    Processes that get their values from another one are let through: FSDP has rank 0 alone load a model.
    """
    offloads = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not offloads and is_distributed():
        return
    for name in names:
        if plain_parameter(model, name).is_meta:
            raise AdapterError(
                f"{name} is offloaded, and an adapter that trains it in full (modules_to_save, bias) would lose its "
                "values: give its module a device of its own in device_map, or load the base without offloading"
                if offloads
                else f"{name} is on the meta device, and an adapter that trains it in full (modules_to_save, bias) "
                "has to know the base model's values: load these first, or leave it out"
            )


def set_aside(model: nn.Module, adapter_name: str, names: Sequence[str]) -> None:
    """Gives a new, inactive adapter its own copies of the base model's parameters ``names``, frozen."""
    state = get_state(model)
    bases = {id(plain_parameter(model, name)): value for name, value in state.originals.items()}
    copies: dict[int, Tensor] = {}
    for name in names:
        parameter = plain_parameter(model, name)
        base = state.originals.setdefault(name, bases.get(id(parameter), parameter.detach()))
        if id(parameter) not in copies:  # tied parameters stay one
            copies[id(parameter)] = _frozen(base.clone(), parameter)
    state.trained[adapter_name] = tuple(names)
    state.aside[adapter_name] = {name: copies[id(plain_parameter(model, name))] for name in names}


def exchange(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Puts the parameters of these adapters into the model, and sets those of the active ones aside; checked before."""
    state = get_state(model)
    wanted: dict[str, Tensor] = {}
    leaving = {name: trained_parameters(model, name) for name in state.sequence if name not in adapter_names}
    for parameters in leaving.values():
        wanted |= {name: _frozen(state.originals[name], present) for name, present in parameters.items()}
    for adapter in adapter_names:
        wanted |= state.aside.get(adapter, {})
    _place(model, wanted)
    for parameter in (parameter for parameters in leaving.values() for parameter in parameters.values()):
        set_trainable(parameter, False)
    state.aside = {name: own for name, own in (state.aside | leaving).items() if name not in adapter_names}


def set_trainable(parameter: Tensor, trainable: bool) -> None:
    """Whether a parameter trains; a buffer never does."""
    if isinstance(parameter, nn.Parameter):
        parameter.requires_grad_(trainable)


def _frozen(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as a parameter, or of a buffer a copy, which training passes may write to."""
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value.clone()


def _place(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Puts parameters into the model, wherever those of these names are used, on their devices and in their dtypes."""
    exchanged: dict[int, Tensor] = {}
    for name, parameter in parameters.items():
        present = plain_parameter(model, name)
        if parameter.device != present.device or parameter.dtype != present.dtype:
            parameter.data, parameter.grad = parameter.data.to(present.device, present.dtype), None
        exchanged[id(present)] = parameter
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for leaf, present_here in registry.items():
                if id(present_here) in exchanged:
                    registry[leaf] = exchanged[id(present_here)]


@contextmanager
def base_values(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Within the context, the base parameters that active adapters train in full have the base model's values.

    Args:
        model (nn.Module): a wrapped model, or one that is not, of which nothing changes.
        values (Mapping[str, torch.Tensor] | None): other values for them, by name.

    Raises:
        AdapterError: FSDP has put a part of one of them in its place, or somebody a larger one.
    """
    if values is None:
        state = find_state(model)
        values = {} if state is None else state.originals
    parameters = {name: parameter for name, parameter in active_parameters(model).items() if name in values}
    for name, parameter in parameters.items():
        if is_sharded(parameter) or parameter.shape != values[name].shape:
            raise AdapterError(
                f"{name} is trained in full and sharded (FSDP), or was resized, so the base model's value cannot take "
                "its place: use DDP and resize before wrapping, or leave out modules_to_save and bias"
            )
    trained = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            written = not isinstance(parameter, nn.Parameter)  # a buffer may be, in a training pass
            parameter.data = values[name].to(parameter.device, parameter.dtype, copy=written)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = trained[name]


def restore_originals(model: nn.Module) -> None:
    """Gives the model the base values back."""
    for name, value in get_state(model).originals.items():
        plain_parameter(model, name).data.copy_(value)


def forget(state: AdapterState, adapter_name: str) -> None:
    """Forgets an inactive adapter's parameters, and the base values that no other adapter has its own of."""
    state.aside.pop(adapter_name, None)
    state.trained.pop(adapter_name, None)
    used = {name for names in state.trained.values() for name in names}
    state.originals = {name: value for name, value in state.originals.items() if name in used}


# ---------------------------------------------------------------------------------------------- state dictionaries


def trained_keys(model: nn.Module) -> list[str]:
    """The state dictionary's keys of all adapters' generators, and of what they train in full."""
    return [*keys_within(model, get_state(model)), *aside_by_key(model)]


def keys_within(model: nn.Module, state: AdapterState) -> list[str]:
    """Those of ``trained_keys`` that are not set aside, of a model with this state or of what distributes it."""
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    names = [plain_path(name) for name in (*parameters, *persistent_buffers(model))]
    return [name for name in names if ".generators." in name or plain_name(name) in state.originals]


def add_state_hooks(model: nn.Module) -> None:
    """Has what is set aside saved and loaded with the model's state dictionary."""
    model.register_state_dict_post_hook(_add_aside)
    model.register_load_state_dict_pre_hook(_take_aside)


def remove_state_hooks(model: nn.Module) -> None:
    """Takes the hooks off again."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_add_aside, _take_aside)]:
            del hooks[key]


def aside_by_key(model: nn.Module) -> dict[str, Tensor]:
    """What is set aside, by its key in the model's state dictionary.

    None of it where FSDP2 shards the model: torch looks for a parameter under each key, and it stays as it is there.
    """
    state = find_state(model)
    aside = {} if state is None or any(map(is_fsdp, model.modules())) else state.aside
    return {f"{PREFIX}{adapter}.{name}": p for adapter, own in aside.items() for name, p in own.items()}


def _add_aside(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict |= {prefix + key: parameter.detach() for key, parameter in aside_by_key(module).items()}


@torch.no_grad()
def _take_aside(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    for key, parameter in aside_by_key(module).items():
        value = state_dict.pop(prefix + key, None)
        if value is None:
            missing_keys.append(prefix + key)
        elif value.shape != parameter.shape:
            errors.append(f"{prefix + key}: shape {tuple(value.shape)}, and {tuple(parameter.shape)} is needed")
        else:
            parameter.copy_(value)
    if strict:
        unexpected_keys += [key for key in state_dict if key.startswith(prefix + PREFIX)]
