"""Loading adapters: checked whole before a model is touched."""

from __future__ import annotations

import os
import warnings

import torch
from torch import nn

from .adapter_file import AdapterFile
from .adapters import check_addable, put
from .base import DEFAULT_ADAPTER, OFTLayer
from .base_check import compare_base, keep_sketches
from .deepspeed_engine import keeps_copies
from .errors import AdapterError, PeftFormatWarning, refuse
from .fitting import (
    check_tensors,
    check_trained,
    compare_plain,
    compare_wrapped,
    with_scaled_weights,
    without_copies,
)
from .gradient_check import check_gradients
from .merged_before import config_of, merged_before
from .merging import placement
from .optimizer_check import watch_optimizers
from .partitioned import gathered, refuse_partitioned
from .reading import read_adapter
from .sharding import check_unsharded, is_distributed
from .single_file import located
from .state import adapter_parameters, check_known, find_state, get_state, layers_of, plain_view, trained_parameters
from .trained import base_values, check_here, set_trainable
from .wrap import check_model, install


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
        folder (str | os.PathLike): what :func:`save_adapter` or PEFT (0.14 or later) wrote; or a single safetensors
            file of OneTrainer's or sd-scripts'.
        adapter_name (str | None): the name it gets; ``None`` is ``"default"``, and adds no further adapter.
        trainable (bool | None): whether to go on training it. ``None``: as the adapter of this name was, else no.
        check_base (bool): refuse a model whose weights are not those that the adapter was trained on, by a sketch of
            them (PEFT's files have none), or that has this adapter merged into them already.
        as_trained (bool): of adapters that PEFT wrote before 0.18: with the series that they were trained with, and not
            with the slightly different one that later PEFTs read them with.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: one error that lists all that is wrong: unreadable or truncated files, missing and unexpected
            tensors, shapes, NaN or Inf, layers that the model lacks or has on the meta device, other base weights. With
            ``trainable=True`` also a layer that lets no gradient through.
    """
    state = find_state(model)
    adapter = _read_for(model, folder, as_trained, adapter_name or DEFAULT_ADAPTER)
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
        check_unsharded(model, "load adapters before")
        _check_writable(model, adapter_name)
        problems = compare_wrapped(model, adapter, adapter_name) + check_trained(model, adapter, adapter_name)
        _check_fit(model, adapter, folder, problems, check_base)
        if trainable:
            check_gradients({path: layer.base_layer for path, layer in layers_of(model, adapter_name).items()})
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
        if trainable:
            check_gradients({target.name: target.module for target in targets})
        install(model, adapter.config, targets, adapter_name, trained=adapter.trained)
        trainable = bool(trainable)
    _copy(model, adapter, adapter_name)
    if trainable is not None:
        for parameter in adapter_parameters(model, adapter_name):
            set_trainable(parameter, trainable)
    if trainable:
        watch_optimizers(model)
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
    check_unsharded(model, "load adapters before")
    adapter = _read_for(model, folder, as_trained, adapter_name)
    _check_writable(model, adapter_name)
    problems = compare_wrapped(model, adapter, adapter_name, subset=True)
    problems += check_trained(model, adapter, adapter_name, subset=True)
    _check_fit(model, adapter, folder, problems, check_base)
    _copy(model, adapter, adapter_name)
    for layer in layers_of(model, adapter_name).values():
        layer.refresh()
    _warn_of_notes(adapter, folder)
    return model


def _check_writable(model: nn.Module, adapter_name: str) -> None:
    """Raises AdapterError where a DeepSpeed engine would write its own copy over what is loaded."""
    if keeps_copies(model, adapter_parameters(model, adapter_name)):
        raise AdapterError(
            f"the adapter {adapter_name!r} is in a DeepSpeed engine, whose next step would write its own copy over "
            "what is loaded: load the adapter before deepspeed.initialize (or before the trainer starts), or one of "
            "the engine's checkpoints with its load_checkpoint"
        )


def _read_for(model: nn.Module, folder: str | os.PathLike[str], as_trained: bool, adapter_name: str) -> AdapterFile:
    """The adapter under the names that its layers have in ``model``, where it is to be ``adapter_name``."""
    adapter = located(read_adapter(folder, as_trained=as_trained), model)
    if adapter.origin == "PEFT":
        refuse_partitioned(
            [(name, p) for name, p in model.named_parameters() if name in adapter.trained],
            "PEFT's copy of it cannot be compared with it; load the adapter in a process without ZeRO-3, and save it "
            "with oftv2.save_adapter",
        )
        adapter = with_scaled_weights(without_copies(adapter, model, adapter_name), model)
    return adapter


def _check_fit(
    model: nn.Module, adapter: AdapterFile, folder: str | os.PathLike[str], problems: list[str], check_base: bool
) -> None:
    """Raises one AdapterError for all that keeps the adapter from fitting."""
    problems = check_tensors(adapter) + problems
    if not problems:
        _check_has_values(model, adapter)
        check_here(model, adapter.trained)
    if check_base and not problems:
        sketched = {name: model.get_submodule(name) for name in adapter.base.get("sketches", {})}
        keep_sketches({name: getattr(module, "base_layer", module) for name, module in sketched.items()})
        with base_values(model):
            found = merged_before(config_of(model), adapter) or compare_base(model, adapter.base)
        problems += [f"{problem}; check_base=False loads it all the same" for problem in found]
    refuse(f"the adapter in {folder} does not fit, and nothing was loaded", problems)


def _check_has_values(model: nn.Module, adapter: AdapterFile) -> None:
    """Raises AdapterError where generators would be on the meta device; see :func:`oftv2.trained.check_here`."""
    for path in adapter.block_sizes:
        module = model.get_submodule(path)
        generators = module.generators.values() if isinstance(module, OFTLayer) else ()
        where = {parameter.device.type for parameter in generators} or {placement(module)[0].type}
        if "meta" in where and not is_distributed():
            raise AdapterError(
                f"{path} is on the meta device, where the adapter's values would be lost, and nothing was loaded: give "
                "the base model its weights first (from_pretrained, or to_empty and load_state_dict)"
            )


@torch.no_grad()
def _copy(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> None:
    """Copies the values in; what the adapter lacks gets the identity and the base model's values."""
    originals = get_state(model).originals
    with gathered(adapter_parameters(model, adapter_name), write=True):
        for path, layer in layers_of(model, adapter_name).items():
            parameter = layer.generators[adapter_name]
            parameter.copy_(adapter.generators(path)) if path in adapter.block_sizes else parameter.zero_()
        for name, parameter in trained_parameters(model, adapter_name).items():
            parameter.copy_(adapter.parameter(name) if name in adapter.trained else originals[name])


def _warn_of_notes(adapter: AdapterFile, folder: str | os.PathLike[str]) -> None:
    for note in adapter.notes:
        warnings.warn(f"{folder}: {note}", PeftFormatWarning, stacklevel=3)
