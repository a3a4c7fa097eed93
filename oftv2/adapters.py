"""Named adapters in one model: added, activated one at a time or in a sequence, and deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import OFTLayer
from .config import OFTConfig
from .deepspeed_engine import check_engine_trains, check_no_engine
from .errors import AdapterError
from .gradient_check import check_gradients
from .optimizer_check import watch_optimizers
from .pretrained import watch
from .refused import refuse_methods
from .sharding import check_unsharded
from .state import adapter_parameters, check_known, get_state, layers_of, oft_layers, plain_view, trained_parameters
from .targets import Target, find_targets
from .trained import check_here, check_together, exchange, forget, set_aside, set_trainable
from .wrap import check_name, check_sizes, merged_config, put_on_targets, release, trained_names


def add_adapter(model: nn.Module, adapter_name: str, config: OFTConfig | None = None, **fields: Any) -> nn.Module:
    """Adds a fresh adapter to a wrapped model, in place, beside those that it has.

    It may have other targets, block sizes and parametrizations than they. It is not active, and so neither changes
    the model's answers nor trains, before :func:`set_adapter` makes it.

    Args:
        model (nn.Module): a wrapped model.
        adapter_name (str): a name that no adapter of the model has yet.
        config (OFTConfig | None): as for :func:`oftv2.wrap_model`.
        **fields: as for :func:`oftv2.wrap_model`.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: a model that is not wrapped, merged, sharded or in a DeepSpeed engine, or within
            ``disable_adapter``; a name that is taken or not allowed; and whatever :func:`oftv2.wrap_model` refuses.
            Nothing is changed then.
        ConfigError: a field with a value that is not allowed.
    """
    config = merged_config(config, fields)
    check_addable(model, adapter_name)
    adapted = {layer.base_layer for _, layer in oft_layers(model)}
    with plain_view(model):
        targets = find_targets(model, config)
        check_sizes(targets, config)
        check_gradients({target.name: target.module for target in targets if target.module not in adapted})
        trained = trained_names(model, config, targets)
    check_here(model, trained)
    put(model, adapter_name, config, targets, trained)
    return model


def set_adapter(model: nn.Module, adapter_names: str | Sequence[str], *, trainable: bool = True) -> nn.Module:
    """Activates an adapter, or several that rotate one after the other, in place of those that are active.

    With ``["a", "b"]`` activations go through ``a`` first: ``x̂ = (x R_a) R_b``, as in PEFT's forward pass. Merging
    multiplies in the same order, ``W′ = W (R_a R_b)ᵀ = W R_bᵀ R_aᵀ``, so it gives the very same function. The product
    is computed in blocks of the least common multiple of the adapters' block sizes. A layer that lacks an adapter
    passes it over; one with none of them is its base layer.

    What an adapter trained in full besides (``modules_to_save``, biases) is exchanged too.

    Args:
        model (nn.Module): a wrapped model.
        adapter_names (str | Sequence[str]): one name, or several in the order in which they rotate.
        trainable (bool): whether they train from now on, as PEFT's ``set_adapter`` has it too. The others never do.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: not wrapped, merged, or within ``disable_adapter``; no name, an unknown one, or one twice; two
            adapters that train the same base parameter in full; with ``trainable=True``, a model in a DeepSpeed engine
            that would not train them. (Of an optimizer that would not, a warning tells at its second step, and
            DistributedDataParallel that was made before is refused in the next pass.)
    """
    names = check_sequence(model, adapter_names)
    check_changeable(model)
    if trainable:
        check_engine_trains(model, [p for name in names for p in adapter_parameters(model, name)])
    activate(model, names, trainable=trainable)
    watch_optimizers(model)
    return model


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters, in the order in which they rotate; AdapterError where a model has none."""
    return list(get_state(model).sequence)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a wrapped model, in the order in which they came."""
    return list(get_state(model).configs)


def delete_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Deletes an adapter that is not active, in place; layers without any other become their base layers again.

    Args:
        model (nn.Module): a wrapped model.
        adapter_name (str): which one.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: not wrapped, merged, or within ``disable_adapter``; no such adapter; an active one, or the only
            one, which :func:`oftv2.unwrap_model` takes off.
    """
    state = get_state(model)
    check_known(model, [adapter_name])
    check_changeable(model)
    check_unsharded(model, "delete adapters before")
    if len(state.configs) == 1:
        raise AdapterError(f"{adapter_name!r} is the only adapter of this model: unwrap_model(model) takes it off")
    if adapter_name in state.sequence:
        raise AdapterError(f"{adapter_name!r} is active: call set_adapter(model, …) with another one first")
    _take_off(model, adapter_name)
    return model


# ---------------------------------------------------------------------------------------------- steps of the above


def check_addable(model: nn.Module, adapter_name: str) -> None:
    """Raises AdapterError where no adapter of this name can be added."""
    state = get_state(model)
    check_name(adapter_name)
    if adapter_name in state.configs:
        raise AdapterError(
            f"there is an adapter {adapter_name!r} in this model already: choose another name, or delete_adapter first"
        )
    check_changeable(model)
    check_unsharded(model, "add and load adapters before")
    check_no_engine(model)


def put(model: nn.Module, adapter_name: str, config: OFTConfig, targets: list[Target], trained: Sequence[str]) -> None:
    """Adds an adapter, inactive, to checked targets; what fails on the way, for lack of memory, say, adds nothing."""
    state = get_state(model)
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    state.configs[adapter_name] = config
    try:
        put_on_targets(model, config, targets, adapter_name)
        set_aside(model, adapter_name, trained)
        for layer in layers_of(model, adapter_name).values():
            layer.activate(state.sequence)
            layer.generators[adapter_name].requires_grad_(False)
        watch(model)
        refuse_methods(model)
    except BaseException:
        _take_off(model, adapter_name)
        raise
    finally:
        for parameter, before in trains.items():  # a new layer freezes its base layer, of which something may train
            parameter.requires_grad_(before)


def _take_off(model: nn.Module, adapter_name: str) -> None:
    """Takes an inactive adapter off, as far as it is there."""
    layers = layers_of(model, adapter_name).values()
    for layer in layers:
        layer.remove(adapter_name)
    release(model, {layer for layer in layers if not layer.rotations})
    state = get_state(model)
    del state.configs[adapter_name]
    forget(state, adapter_name)
    watch(model)


def check_names(model: nn.Module, adapter_names: str | Sequence[str]) -> tuple[str, ...]:
    """The names of different adapters of a model or a layer, at least one; AdapterError where they are not."""
    names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    if not names:
        raise AdapterError("no adapter is named: to switch all of them off, use disable_adapter(model)")
    check_known(model, names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterError(f"the adapter {twice[0]!r} is named twice: once is enough")
    return names


def check_sequence(model: nn.Module, adapter_names: str | Sequence[str]) -> tuple[str, ...]:
    """The names of adapters of a model or a layer that can be active together; AdapterError where they cannot."""
    names = check_names(model, adapter_names)
    if not isinstance(model, OFTLayer):
        check_together(model, names)
    return names


def activate(model: nn.Module, names: tuple[str, ...], *, trainable: bool | None) -> None:
    """Activates checked adapters; ``trainable=None`` leaves it as it is which generators train."""
    state = get_state(model)
    exchange(model, names)
    state.sequence = names
    for _, layer in oft_layers(model):
        layer.activate(names, trainable=trainable)
    if trainable is not None:
        for parameter in [parameter for name in names for parameter in trained_parameters(model, name).values()]:
            set_trainable(parameter, trainable)


def check_unmerged(model: nn.Module) -> None:
    """Raises AdapterError where adapters are merged or switched off for a while, and so cannot be changed."""
    for _, layer in oft_layers(model):
        if layer.merged:
            raise AdapterError(f"{layer.name}: the adapter is merged: call unmerge(model) first")
        if not layer.enabled:
            raise AdapterError(f"{layer.name}: the adapter is disabled: leave disable_adapter(model) first")


def check_changeable(model: nn.Module) -> None:
    """As :func:`check_unmerged`, and where they are in use row by row."""
    check_unmerged(model)
    for _, layer in oft_layers(model):
        if layer.rows is not None:
            raise AdapterError(f"{layer.name}: its adapters are in use row by row: leave adapters_per_row(model) first")
