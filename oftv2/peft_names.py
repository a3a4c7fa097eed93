"""How PEFT finds modules by their names, and under which names it keeps what is trained in full."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from .adapter_file import PREFIX
from .config import OFTConfig
from .sharding import class_name, plain_path
from .state import get_state, layers_of, plain_view, trained_parameters
from .targets import saved_modules

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def module_names(model: nn.Module, name: str) -> tuple[list[str] | str, list[str], list[str]]:
    """PEFT's ``target_modules`` and ``modules_to_save`` for the adapter ``name``, and what keeps PEFT from it."""
    state, layers = get_state(model), list(layers_of(model, name))
    config, trained = state.configs[name], state.trained[name]
    with plain_view(model):
        plain = [plain_path(path) for path, _ in model.named_modules() if path]
        tops = [top for top in saved_modules(model, config) if any(path.startswith(top + ".") for path in trained)]
        problems = _saved_problems(model, tops)
    saved = _saved_names(plain, tops, config, layers)
    if saved is None:
        problems.append(f"modules_to_save: no names by which PEFT would find {', '.join(tops)} and nothing else")
    return _target_modules(plain, layers), saved or [], problems


def trained_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The base parameters that the adapter trained in full, by PEFT's names."""
    layers = layers_of(model, name)
    tensors: dict[str, Tensor] = {}
    for parameter, value in trained_parameters(model, name).items():
        parent, _, leaf = parameter.rpartition(".")
        key = f"{parent}.base_layer.{leaf}" if parent in layers else parameter
        tensors[PREFIX + key] = value
    return tensors


def base_description(model: nn.Module) -> dict[str, Any]:
    """What PEFT notes of the base model; by its class, where there is no task, ``AutoPeftModel`` loads it."""
    name = class_name(model)
    causal = name.endswith("ForCausalLM")
    library = next(cls.__module__ for cls in type(model).__mro__ if cls.__name__ == name)
    return {
        "auto_mapping": None if causal else {"base_model_class": name, "parent_library": library},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "task_type": "CAUSAL_LM" if causal else None,
    }


def _target_modules(names: list[str], layers: list[str]) -> list[str] | str:
    """The shortest list of names, or else the regular expression, that PEFT matches with these layers and no others."""
    for wanted in (sorted({layer.rpartition(".")[2] for layer in layers}), layers):
        ends = tuple("." + entry for entry in wanted)
        if {name for name in names if name in wanted or name.endswith(ends)} == set(layers):
            return wanted
    return "|".join(re.escape(layer) for layer in layers)


def _saved_names(names: list[str], tops: list[str], config: OFTConfig, layers: list[str]) -> list[str] | None:
    """Names for PEFT's ``modules_to_save``: it takes every path that ends with one, dot or no dot before it."""
    ends = sorted({top.rpartition(".")[2] for top in tops})
    for wanted in (list(config.modules_to_save or ends), ends, tops):
        found = {name for name in names if any(name.endswith(entry) for entry in wanted)}
        shadowed = any(re.match(rf"(^|.*\.){entry}($|\..*)", layer) for entry in wanted for layer in layers)
        if found == set(tops) and not shadowed:
            return wanted
    return None


def _saved_problems(model: nn.Module, tops: list[str]) -> list[str]:
    problems = []
    parameters = list(model.named_parameters(remove_duplicate=False))
    for top in tops:
        module, inside = model.get_submodule(top), top + "."
        own = {id(parameter) for name, parameter in parameters if name.startswith(inside)}
        tied = [name for name, parameter in parameters if id(parameter) in own and not name.startswith(inside)]
        if tied:
            problems.append(
                f"modules_to_save: {top} is tied to {tied[0]}: PEFT trains a copy of its own, this model "
                "the one that both use"
            )
        elif isinstance(module, _CONTAINERS):
            problems.append(f"modules_to_save: {top} is a {type(module).__name__}, which PEFT does not take")
    return problems
