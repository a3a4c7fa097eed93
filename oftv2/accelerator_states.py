"""Checkpoints of a loop on ``accelerate`` that hold the adapters and not the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .deepspeed_engine import serve_deepspeed
from .errors import AdapterError
from .fsdp_checkpoints import save_states_of_adapters_only
from .loading import load_adapter
from .saving import save_adapter
from .state import find_state, get_state

_FOLDER = "adapters"
_MARK = "_oftv2_saves_adapters_only"
_SHARDED = ("FSDP", "MEGATRON_LM")


def save_adapters_only(accelerator: Any) -> None:
    """Has ``accelerator.save_state`` write a wrapped model's adapters only, and ``load_state`` read them.

    An adapter is a folder in ``adapters/`` of the saved state, in this library's own format. Optimizers,
    schedules, random states and models that are not wrapped stay as they are; resuming is exact. A second call on the
    same accelerator changes nothing. With FSDP2, adapters are what accelerate saves of a model in its own format, whole
    or sharded. With DeepSpeed, states are checkpoints of its engine, which leave the base out anyway.

    Args:
        accelerator (accelerate.Accelerator): the loop's.

    Raises:
        AdapterError: here for FSDP1 and Megatron, which save models themselves; when a state is saved or
            loaded, what :func:`oftv2.save_adapter` and :func:`oftv2.load_adapter` refuse, and adapters of other names.
    """
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if kind == "DEEPSPEED":
        serve_deepspeed()  # whose checkpoints are the states
        return
    fsdp2 = kind == "FSDP" and getattr(accelerator, "is_fsdp2", False)
    if kind in _SHARDED and not fsdp2:
        name = "FSDP1" if kind == "FSDP" else kind
        raise AdapterError(f"{name} saves models itself, and a hook cannot leave the base out: use save_adapter")
    if hasattr(accelerator, _MARK):
        return
    setattr(accelerator, _MARK, True)
    if fsdp2:
        save_states_of_adapters_only(_MARK)
        return

    def save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        for index, model in _wrapped(accelerator, models):
            if accelerator.is_main_process:
                for name in get_state(model).configs:
                    save_adapter(model, _place(output_dir, index) / name, adapter_name=name, format="oftv2")
            del weights[index]

    def load(models: list[nn.Module], input_dir: str) -> None:
        for index, model in _wrapped(accelerator, models):
            folder, names = _place(input_dir, index), set(get_state(model).configs)
            saved = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            if saved != names:
                raise AdapterError(
                    f"{folder} holds the adapters {sorted(saved)}, and the model has {sorted(names)}: give the model "
                    "those of the saved state first, with wrap_model and add_adapter"
                )
            for name in names:
                load_adapter(model, folder / name, adapter_name=name)
            del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _wrapped(accelerator: Any, models: list[nn.Module]) -> list[tuple[int, nn.Module]]:
    """The wrapped models that an accelerator prepared with their places, the last first: lists get shorter."""
    plain = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]
    return [(index, model) for index, model in reversed(list(enumerate(plain))) if find_state(model)]


def _place(folder: str, index: int) -> Path:
    return Path(folder) / (f"{_FOLDER}_{index}" if index else _FOLDER)
