"""What ``Trainer`` saves of a wrapped model under FSDP, and resumes from: the adapters, and not the base.

It asks accelerate to save "the adapter only", and accelerate does so for peft's models alone; of any other it would put
the whole base into every checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from torch import nn

from .errors import AdapterError
from .patching import replace_once
from .sharding import plain_path, whole
from .state import find_state
from .trained import keys_within


def serve_accelerate() -> None:
    """Has accelerate, if it is imported, take a wrapped model's adapters for the part that it saves on its own."""
    module: Any = sys.modules.get("accelerate.utils.fsdp_utils")
    replace_once(module, "_get_model_state_dict", _get)
    replace_once(module, "_set_model_state_dict", _set)


def save_states_of_adapters_only(mark: str) -> None:
    """Has ``save_state`` and ``load_state`` of accelerators with this attribute ask for "the adapter only" too."""
    import accelerate.accelerator as module

    serve_accelerate()
    for name in ("save_fsdp_model", "load_fsdp_model"):
        replace_once(module, name, functools.partial(_ask, mark))


def _ask(mark: str, original: Any, plugin: Any, accelerator: Any, model: nn.Module, *args: Any, **options: Any) -> Any:
    if hasattr(accelerator, mark) and _names(model):
        options["adapter_only"] = True
    return original(plugin, accelerator, model, *args, **options)


def _get(original: Any, model: nn.Module, adapter_only: bool = False, sd_options: Any = None) -> Any:
    """The adapters' part of a model's state dictionary, sharded or gathered as is asked for."""
    if not (adapter_only and (names := _names(model))):
        return original(model, adapter_only=adapter_only, sd_options=sd_options)
    tensors = {plain_path(name): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name in names}
    if sd_options is not None and sd_options.full_state_dict:  # FSDP1 has gathered them by now
        return {name: whole(tensor).cpu() for name, tensor in tensors.items()}
    return tensors


def _set(
    original: Any, model: nn.Module, state_dict: dict[str, Any], adapter_only: bool = False, sd_options: Any = None
) -> Any:
    """Loads what :func:`_get` returned; processes that get nothing are sent it by the first one."""
    if not (adapter_only and (names := _names(model))):
        return original(model, state_dict, adapter_only=adapter_only, sd_options=sd_options)
    if state_dict and state_dict.keys() != names:
        differ = sorted(state_dict.keys() ^ names)
        raise AdapterError(
            f"the checkpoint is not of this model's adapters: {differ[0]} is in one of them alone ({len(differ)} such "
            "names in all); wrap the model as it was wrapped when the checkpoint was saved"
        )
    if sd_options is None:
        return model.load_state_dict(state_dict, strict=False)
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    return set_model_state_dict(model, state_dict, options=dataclasses.replace(sd_options, strict=False))


def _names(model: Any) -> set[str]:
    """The state dictionary's keys of the adapters in a model that FSDP shards; none of a model that is not wrapped."""
    from accelerate.utils.other import extract_model_from_parallel

    state = find_state(extract_model_from_parallel(model, keep_torch_compile=False))
    return set() if state is None else set(keys_within(model, state))
