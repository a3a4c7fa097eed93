"""State dictionaries of PEFT's, of the same adapter, loaded into a wrapped transformers model.

sentence-transformers' trainers resume, and restore the best checkpoint, by loading it as a model of its own.
transformers does that with PEFT, whose names the state dictionary has that they then pass to the wrapped model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .state import get_state, oft_layers


def add_peft_hook(model: nn.Module) -> None:
    """Has the model understand PEFT's names when it, or what it is part of, loads a state dictionary."""
    model.register_load_state_dict_pre_hook(_take_peft)


def remove_peft_hook(model: nn.Module) -> None:
    """Takes the hook off again."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _take_peft]:
        del hooks[key]


def _take_peft(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Gives what is PEFT's under ``prefix`` this library's names and values, in place."""
    if not any(".oft_R." in key for key in state_dict):
        return
    for path, layer in oft_layers(module):
        for name, rotation in layer.rotations.items():
            packed = state_dict.pop(f"{prefix}{path}.oft_R.{name}.weight", None)
            if packed is None:
                continue
            if rotation.scale:
                packed = packed * (2 * (rotation.block_size - 1) ** 0.5)
            sign = -1 if rotation.parametrization == "cayley" else 1
            state_dict[f"{prefix}{path}.generators.{name}"] = sign * packed
    for name in get_state(module).sequence:
        kept = f".modules_to_save.{name}."
        for key in [key for key in state_dict if key.startswith(prefix) and kept in key]:
            state_dict[key.replace(kept, ".")] = state_dict.pop(key)
    for key in [key for key in state_dict if key.startswith(prefix) and ".original_module." in key]:
        del state_dict[key]
