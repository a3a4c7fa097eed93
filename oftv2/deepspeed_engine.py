"""DeepSpeed's engine around a wrapped model: generators stay in float32, and checkpoints leave the frozen base out.

transformers has the latter done for a ``PeftModel``, by arguments. A wrapped model is none, so the engine's class gets
other defaults for it; arguments that are given are honoured, and engines around other models stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .errors import AdapterError, listed
from .partitioned import gathered, has_master
from .patching import replace_once
from .state import find_state, oft_layers
from .trained import trained_keys

_engines: WeakSet[Any] = WeakSet()  # those that were made since their class was served


def serve_deepspeed() -> None:
    """Gives DeepSpeed's engine, if it is imported, other defaults where its model is wrapped."""
    engine_class: Any = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    for name, function in _SERVED.items():
        replace_once(engine_class, name, function)


def check_no_engine(model: nn.Module) -> None:
    """Raises AdapterError where a DeepSpeed engine trains the model, for it would not train what is added to it."""
    engines = [engine for engine in _engines if engine.module is model]
    if any(map(_trains, engines)) or any(map(has_master, model.parameters())):
        raise AdapterError(
            f"this {type(model).__name__} is in a DeepSpeed engine, whose optimizer would not train another adapter: "
            "wrap models, and add and load adapters, before deepspeed.initialize (or before the trainer starts)"
        )


def check_engine_trains(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raises AdapterError where some of these parameters are frozen, and in no optimizer of the model's engine."""
    engines = [engine for engine in _engines if engine.module is model and _trains(engine)]
    if not engines and not any(map(has_master, model.parameters())):
        return
    groups = [group for engine in engines for group in getattr(engine.basic_optimizer, "param_groups", ())]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if any(not (p.requires_grad or has_master(p) or id(p) in held) for p in parameters):
        raise AdapterError(
            f"this {type(model).__name__} is in a DeepSpeed engine, whose optimizer was made without some of what is "
            "to train now: call set_adapter before deepspeed.initialize (or before the trainer starts), or with "
            "trainable=False"
        )


def keeps_copies(model: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether a DeepSpeed engine keeps copies of these parameters, and writes them over the parameters at each step."""
    if any(map(has_master, parameters)):
        return True
    engines = [engine for engine in _engines if engine.module is model]
    return any(_trains(engine) and engine.optimizer is not engine.basic_optimizer for engine in engines)


def _trains(engine: Any) -> bool:
    return getattr(engine, "basic_optimizer", None) is not None


def _configure_model(original: Any, engine: Any, model: nn.Module) -> None:
    """Has engines be known, and generators keep their values where an engine casts its model to 16 bit."""
    _engines.add(engine)
    generators = [(p, p.data) for _, layer in oft_layers(model) for p in layer.generators.values()]
    broadcast = engine._broadcast_model

    def restore_and_broadcast() -> None:  # the model is cast by now, and no optimizer has copied anything
        for parameter, values in generators:
            parameter.data = values.to(parameter.device)
        broadcast()

    engine._broadcast_model = restore_and_broadcast
    try:
        original(engine, model)
    finally:
        del engine._broadcast_model


def _save_checkpoint(original: Any, engine: Any, *args: Any, **options: Any) -> Any:
    if find_state(engine.module) is not None and len(args) < 5:  # the fifth is this option
        options.setdefault("exclude_frozen_parameters", _can_leave_frozen_out(engine.module))
    return original(engine, *args, **options)


def _can_leave_frozen_out(model: nn.Module) -> bool:
    """Whether all that adapters have is saved then; of partitioned parameters, the optimizer saves those that train."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = [parameters[key] for key in trained_keys(model) if key in parameters]
    return all(parameter.requires_grad or not hasattr(parameter, "ds_id") for parameter in own)


def _module_state_dict(
    original: Any, engine: Any, *args: Any, exclude_frozen_parameters: bool = False, **options: Any
) -> Any:
    model = engine.module
    if not exclude_frozen_parameters or find_state(model) is None:
        return original(engine, *args, exclude_frozen_parameters=exclude_frozen_parameters, **options)
    # DeepSpeed would leave a tied weight in under its second name, and the scales of 4-bit weights.
    kept = {*trained_keys(model), *(name for name, _ in model.named_buffers())}
    return {key: value for key, value in original(engine, *args, **options).items() if key in kept}


def _load_module(original: Any, engine: Any, checkpoint: dict[str, Any], strict: bool = True, **options: Any) -> Any:
    if strict and find_state(engine.module) is not None:
        strict = not _is_without_base(engine.module, checkpoint["module"])
    return original(engine, checkpoint, strict=strict, **options)


def _is_without_base(model: nn.Module, saved: dict[str, Tensor]) -> bool:
    """Whether ``saved`` holds the model's adapters without their base; AdapterError where it lacks some of them."""
    own = set(trained_keys(model))
    if any(name in saved for name, _ in model.named_parameters() if name not in own):
        return False
    missing = sorted(own - set(saved))
    unknown = sorted(name for name in saved if ".generators." in name and name not in own)
    if missing or unknown:
        raise AdapterError(
            f"the checkpoint is of other adapters than this model's, and was not loaded: it lacks {listed(missing)} "
            f"and has {listed(unknown)} besides; wrap the model as it was wrapped when the checkpoint was saved"
        )
    return True


def _gathers(original: Any, engine: Any) -> bool:
    return find_state(engine.module) is not None or original(engine)


def _gathered_state_dict(original: Any, engine: Any, *args: Any, **options: Any) -> Any:
    if args or options or find_state(engine.module) is None:
        return original(engine, *args, **options)
    values = adapter_values(engine.module)
    return values if torch.distributed.get_rank() == 0 else None


_SERVED: dict[str, Callable[..., Any]] = {
    "_configure_distributed_model": _configure_model,
    "save_checkpoint": _save_checkpoint,
    "module_state_dict": _module_state_dict,
    "load_module_state_dict": _load_module,
    "zero_gather_16bit_weights_on_model_save": _gathers,
    "_zero3_consolidated_16bit_state_dict": _gathered_state_dict,
}


def adapter_values(model: nn.Module) -> dict[str, Tensor]:
    """All adapters' values by their keys in the model's state dictionary; a collective operation under ZeRO-3."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aside = model.state_dict()
    values = {}
    for key in trained_keys(model):
        tensor = parameters.get(key, aside.get(key))
        assert tensor is not None
        with gathered([tensor]):
            values[key] = tensor.detach().cpu().clone()
    return values
