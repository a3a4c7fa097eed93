"""Whether a checkpoint of ``Trainer``'s belongs to the model that is to go on from it.

``Trainer`` loads values by their names alone, and generators of equal shapes may stand for other rotations, or belong
to another base. So checkpoints note what the values depend on, and it is compared before any is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from .adapter_file import TENSORS_FILE
from .base_check import compare_base
from .errors import listed, refuse
from .partitioned import is_partitioned
from .patching import replace_once
from .sharding import is_sharded
from .state import find_state, get_state
from .trained import base_values, trained_keys

CHECKPOINT_FILE = "model.safetensors"
NOTE = "oftv2_function"  # in the file's metadata
_FIELDS = ("parametrization", "neumann_terms", "constraint", "scale_generators")


def described(model: nn.Module) -> str:
    """What the function of a wrapped model depends on, beside its tensors: what its checkpoints note of it."""
    state = get_state(model)
    adapters = {name: {field: getattr(config, field) for field in _FIELDS} for name, config in state.configs.items()}
    return json.dumps({"active": state.sequence, "adapters": adapters})


def serve_resuming() -> None:
    """Has transformers' ``Trainer``, if it is imported, compare checkpoints with wrapped models."""
    module: Any = sys.modules.get("transformers.trainer")
    replace_once(getattr(module, "Trainer", None), "_load_from_checkpoint", _load_from_checkpoint)
    replace_once(module, "deepspeed_load_checkpoint", _load_of_deepspeed)


def _load_from_checkpoint(original: Any, trainer: Any, folder: str, *args: Any, **options: Any) -> Any:
    _check(trainer.accelerator.unwrap_model(trainer.model), folder)
    return original(trainer, folder, *args, **options)


def _load_of_deepspeed(original: Any, engine: Any, folder: str, *args: Any, **options: Any) -> Any:
    _check(engine.module, folder)
    return original(engine, folder, *args, **options)


def _check(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Raises AdapterError where a checkpoint notes another function than the model's, or has another base or layers."""
    state, path = find_state(model), Path(folder) / CHECKPOINT_FILE
    if state is None or not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        noted, names = (file.metadata() or {}).get(NOTE), set(file.keys())
    if noted is None:
        return
    there, here = json.loads(noted), json.loads(described(model))
    problems = [
        f"{field} of the adapter {name!r}: {value!r} there, {here['adapters'][name].get(field)!r} here"
        for name in there["adapters"].keys() & here["adapters"].keys()
        for field, value in there["adapters"][name].items()
        if value != here["adapters"][name].get(field)
    ]
    suffixes = tuple(f".generators.{name}" for name in state.sequence)
    if there["active"] != here["active"]:
        problems.append(f"active adapters: {there['active']} there, {here['active']} here")
    elif alone := sorted(key for key in names ^ set(trained_keys(model)) if key.endswith(suffixes)):
        problems.append(f"adapted in one of them alone: {listed(alone)}")
    problems = problems or _other_base(model, Path(folder) / TENSORS_FILE)
    refuse(f"the checkpoint {folder} is of another model than this one, and was not loaded", problems)


def _other_base(model: nn.Module, path: Path) -> list[str]:
    """Base weights that are not those of the adapter in a checkpoint, as far as this process has them whole."""
    if not path.is_file() or any(is_sharded(p) or is_partitioned(p) for p in model.parameters()):
        return []
    with safe_open(path, framework="pt") as file, base_values(model):
        return compare_base(model, json.loads(file.metadata()["oftv2"])["base"])
