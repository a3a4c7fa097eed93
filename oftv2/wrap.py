"""``wrap_model`` and ``unwrap_model``: adapters on a whole model, and off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor, nn

from .base import DEFAULT_ADAPTER, OFTLayer
from .base_check import keep_sketches
from .checkpointing import add_hooks, remove_hooks
from .config import OFTConfig
from .deepspeed_engine import check_no_engine, serve_deepspeed
from .errors import AdapterError, itemized
from .gradient_check import check_gradients
from .grouping import check_groups, ungroup
from .grouping import group_projections as group
from .optimizer_check import watch_optimizers
from .partitioned import gathered
from .pretrained import present, unpresent
from .refused import allow_methods, refuse_methods, warn_of_saving
from .sharding import check_unsharded
from .state import (
    AdapterState,
    find_state,
    get_state,
    inner_model,
    oft_layers,
    persistent_buffers,
    plain_parameter,
    set_state,
)
from .targets import Target, find_targets, layer_class_for, saved_modules
from .together import add_pass_hooks, remove_pass_hooks
from .trained import (
    add_state_hooks,
    check_here,
    remove_state_hooks,
    restore_originals,
    set_trainable,
    warn_of_statistics,
)


def wrap_model(
    model: nn.Module,
    config: OFTConfig | None = None,
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    group_projections: bool = False,
    **fields: Any,
) -> nn.Module:
    """Puts a trainable orthogonal adapter on a model, in place, and freezes everything else.

    Everything is checked first: a model is either wrapped whole or left as it was.

    Args:
        model (nn.Module): any model, quantized or not.
        config (OFTConfig | None): what to adapt and how; the default adapts every linear layer but the output head
            with ``block_size=32``, and says in a :class:`TargetWarning` where that leaves experts out, or convolutions
            that are nearly all of the weights. (Others tell of frozen layers with running statistics, which change in
            training and go with no adapter, and of a ``save_pretrained`` that would stop a trainer.)
        adapter_name (str): the adapter's name.
        group_projections (bool): rotate the input of gate and up projections once for both, where their module does
            nothing else with it (Llama, Mistral, Qwen, Gemma and alike); on a GPU that saves passes over it. The
            result is the same. :func:`oftv2.group_projections` does it later, as after ``load_adapter``.
        **fields: fields of :class:`OFTConfig`, in place of ``config`` or on top of it, as in
            ``wrap_model(model, block_size=64)``; also under PEFT's names (``oft_block_size``, ``r``, which is a number
            of blocks and no rank, ``module_dropout``, ``use_cayley_neumann``, ``num_cayley_neumann_terms``,
            ``layers_to_transform``).

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: nothing to adapt, names that match nothing, sizes that do not divide, a layer that lets no
            gradient through, or a model that is wrapped already.
        ConfigError: a field that there is not, or with a value that is not allowed.
    """
    config = merged_config(config, fields)
    check_model(model, adapter_name)
    targets = find_targets(model, config)
    check_sizes(targets, config)
    check_gradients({target.name: target.module for target in targets})
    trained = trained_names(model, config, targets)
    check_here(model, trained)
    if group_projections:
        check_groups(model)
    warn_of_statistics(model, trained)
    warn_of_saving(model)
    install(model, config, targets, adapter_name, trained=trained)
    watch_optimizers(model)
    return group(model) if group_projections else model


def unwrap_model(model: nn.Module) -> nn.Module:
    """Takes the adapters off, in place: the base model as it was, its own trained parameters put back too.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: the model is not wrapped.
    """
    get_state(model)
    check_unsharded(model, "take the adapters off before, or save them and load them into another model")
    for _, layer in oft_layers(model):
        if layer.merged:
            layer.unmerge()
    restore_originals(model)
    uninstall(model)
    return model


def merged_config(config: OFTConfig | None, fields: dict[str, Any]) -> OFTConfig:
    """The configuration with ``fields``, under this library's names or PEFT's, in place of its own."""
    if config is not None and not isinstance(config, OFTConfig):
        raise AdapterError(
            f"config must be an oftv2.OFTConfig, and this is of {type(config)}; options go by their names, as in "
            "wrap_model(model, block_size=32), and oftv2.OFTConfig.from_peft(config) makes one of PEFT's"
        )
    fields = OFTConfig.with_own_names(fields)
    if config is None:
        return OFTConfig(**fields)
    if ("num_blocks" in fields) != ("block_size" in fields):
        fields = {"num_blocks": None, "block_size": None, **fields}  # the one given takes the place of the other
    return dataclasses.replace(config, **fields)


def check_sizes(targets: list[Target], config: OFTConfig) -> None:
    """Raises one AdapterError that names every target whose size the block size does not divide."""
    problems = []
    for target in targets:
        try:
            target.rotation(config)
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError(itemized(problems, most=5, indent=""))


def install(
    model: nn.Module, config: OFTConfig, targets: list[Target], adapter_name: str, *, trained: Sequence[str]
) -> None:
    """Replaces checked targets by adapted layers and freezes all but the base parameters named in ``trained``.

    What fails on the way, for lack of memory or by Ctrl-C, leaves the model as it was.
    """
    encoders = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoder)]
    state = AdapterState(
        configs={adapter_name: config},
        sequence=(adapter_name,),
        trainable_before=tuple(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad),
        trained={adapter_name: tuple(trained)},
        originals={name: _value(plain_parameter(model, name)) for name in trained},
        nested_encoders=tuple(name for name in encoders if model.get_submodule(name).use_nested_tensor),
    )
    set_state(model, state)
    try:
        model.requires_grad_(False)
        add_hooks(model)
        add_pass_hooks(model)
        add_state_hooks(model)
        put_on_targets(model, config, targets, adapter_name)
        for name in trained:
            set_trainable(plain_parameter(model, name), True)
        _use_nested_tensors(model, state, False)
        present(model)
        refuse_methods(model)
    except BaseException:
        uninstall(model)
        raise
    serve_deepspeed()


def put_on_targets(model: nn.Module, config: OFTConfig, targets: list[Target], adapter_name: str) -> None:
    """Gives each of the checked targets the adapter: inactive where a layer has others, active in a new layer."""
    keep_sketches({target.name: target.module for target in targets})
    present = {id(layer.base_layer): layer for _, layer in oft_layers(model)}
    for target in targets:
        if id(target.module) in present:
            present[id(target.module)].add(adapter_name, config, block_size=target.block_size)
            continue
        layer = target.layer_class(
            target.module, config, adapter_name=adapter_name, name=target.name, block_size=target.block_size
        )
        for path in target.paths:
            _replace(model, path, layer)
            _leave_fast_path(model, path, layer)


def release(model: nn.Module, layers: Container[OFTLayer]) -> None:
    """Puts the base layers of these adapted layers back in their places."""
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, OFTLayer) and layer in layers:
            _replace(model, path, layer.release_base())


def uninstall(model: nn.Module) -> None:
    """Puts the base layers (merged or not) back in place of the adapted ones, and forgets the adapters."""
    state = get_state(model)
    remove_hooks(model)
    remove_pass_hooks(model)
    remove_state_hooks(model)
    ungroup(model)
    _use_nested_tensors(model, state, True)
    release(model, {layer for _, layer in oft_layers(model)})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable_before)
    unpresent(model)
    allow_methods(model)
    set_state(model, None)


def check_model(model: nn.Module, adapter_name: str) -> None:
    """Refuses what cannot be wrapped: no model, a bare layer, or one with adapters."""
    if not isinstance(model, nn.Module):
        parts = [name for name, part in getattr(model, "__dict__", {}).items() if isinstance(part, nn.Module)]
        its = f"; pass what is in it ({', '.join(parts)}), before it is put in there" if parts else ""
        raise AdapterError(f"wrap_model takes a torch.nn.Module, and this is a {type(model).__name__}{its}")
    if inner := inner_model(model):
        raise AdapterError(
            f"the model is in a {type(model).__name__}: put the adapter on it first, and compile or distribute it "
            f"afterwards (the model inside is {inner})"
        )
    check_no_engine(model)
    if (layer_class := layer_class_for(model)) is not None:
        raise AdapterError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: use "
            f"{layer_class.__name__}(model, config)"
        )
    check_name(adapter_name)
    if (state := find_state(model)) is not None:
        raise AdapterError(
            f"this {type(model).__name__} is wrapped already (adapter {', '.join(map(repr, state.configs))}): "
            "add_adapter puts another adapter beside it; to wrap it again, call merge(model) to keep what it learned, "
            "or unwrap_model(model) to drop it, before"
        )
    inside = [name for name, module in model.named_modules() if isinstance(module, OFTLayer) or _is_peft_layer(module)]
    if inside or isinstance(model, OFTLayer):
        raise AdapterError(
            f"this {type(model).__name__} holds adapted layers already ({', '.join(inside[:3]) or 'itself'}): adapters "
            "are not nested; merge or remove those first"
        )


def check_name(adapter_name: str) -> None:
    """Refuses names that no adapter can have: it is a key of an ``nn.ParameterDict``, and part of parameters' names."""
    if not isinstance(adapter_name, str) or not adapter_name or set("./\\") & set(adapter_name):
        raise AdapterError(f"adapter_name={adapter_name!r} is not allowed: use a name without dots and slashes")
    if hasattr(nn.ParameterDict(), adapter_name):
        raise AdapterError(f"adapter_name={adapter_name!r} is not allowed: torch uses this name; choose another")


def _is_peft_layer(module: nn.Module) -> bool:
    return any(cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def trained_names(model: nn.Module, config: OFTConfig, targets: list[Target]) -> list[str]:
    """Names of the base parameters that train in full: those of ``modules_to_save`` with its buffers, and biases."""
    everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # a tied one by each name
    names: list[str] = []
    for top in saved_modules(model, config):
        inside = [name for name in everything if name.startswith(top + ".")]
        if not inside or not all(model.get_parameter(name).is_floating_point() for name in inside):
            what = "quantized weights, which cannot be trained" if inside else "no parameters to train"
            raise AdapterError(f"modules_to_save: {top} ({type(model.get_submodule(top)).__name__}) has {what}")
        inside += [name for name in persistent_buffers(model) if name.startswith(top + ".")]
        names += [name for name in inside if name not in names]
    if config.bias == "none":
        return names
    if config.bias == "all":
        biases = [name for name in everything if "bias" in name.split(".")[-1]]
    else:
        own = ((t.name, leaf) for t in targets for leaf, _ in t.module.named_parameters(recurse=False))
        biases = [f"{name}.{leaf}" for name, leaf in own if leaf == "bias" or leaf.endswith("_bias")]
    if not biases:
        raise AdapterError(f'bias={config.bias!r} would train nothing: there is no bias; use bias="none"')
    return names + [name for name in biases if name not in names]


def _value(parameter: Tensor) -> Tensor:
    with gathered([parameter]):
        return parameter.detach().clone()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent._modules.get(child)
    setattr(parent, child, module)
    for held in vars(parent).values():
        if isinstance(held, list):  # Mask2Former's heads go through their layers by a list of their own
            held[:] = [module if item is old else item for item in held]


def _leave_fast_path(model: nn.Module, path: str, layer: OFTLayer) -> None:
    """Keeps torch's fused encoder layer from reading ``linear1.weight`` past the rotation: hooks make it step aside."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and _no_operation not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_no_operation)


def _use_nested_tensors(model: nn.Module, state: AdapterState, use: bool) -> None:
    """The nested tensors of torch's fused encoders, which its ordinary layers do not take."""
    for name in state.nested_encoders:
        encoder: Any = model.get_submodule(name)
        encoder.use_nested_tensor = use


def _no_operation(module: nn.Module, args: Any) -> None:
    return None
