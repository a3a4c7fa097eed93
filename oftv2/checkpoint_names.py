"""Which model a checkpoint is of, and which tensor in it is which parameter; the model has no weights in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_file import AdapterFile
from .errors import AdapterError
from .state import persistent_buffers

# Tasks whose heads a base checkpoint lacks; PEFT notes the task, and not the class.
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class StoredNames:
    """Names of a checkpoint's tensors.

    Attributes:
        keys: by the parameter's name in the model, the tensor that is loaded into it as it is.
        parameters: by the tensor, the parameter's name, for tensors that are loaded as they are.
        converted: tensors that transformers takes apart, joins or reorders on loading.
        loads_as_named: names of parameters under which a checkpoint can hold them.
    """

    keys: dict[str, str]
    parameters: dict[str, str]
    converted: frozenset[str]
    loads_as_named: frozenset[str]


def load_config(folder: Path) -> Any:
    """The configuration in a model's folder, as transformers reads it.

    Raises:
        AdapterError: transformers is missing, or does not know such a model without code from the folder.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise AdapterError("merging checkpoints needs transformers: pip install transformers accelerate") from error
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(
            f"the model in {folder} is none of transformers' own, which alone are merged: {error}"
        ) from error


def model_class(config: Any, adapter: AdapterFile) -> type:
    """The class of the model that the adapter was trained on, or else that of the checkpoint.

    Raises:
        AdapterError: a class that transformers lacks, or one for another kind of model.
    """
    import transformers

    own = (config.architectures or ["AutoModel"])[0]
    task = _TASKS.get(adapter.base.get("task", ""))
    found = getattr(transformers, adapter.base["class"], None) if adapter.base["class"] else None
    if found is None and task is not None:
        found = getattr(transformers, task)._model_mapping.get(type(config), None)
    if found is None:
        found = getattr(transformers, own, None)
    if not isinstance(found, type) or not hasattr(found, "config_class"):
        raise AdapterError(f"the checkpoint is of a {own}, which is none of transformers' own models")
    if not isinstance(config, found.config_class):
        raise AdapterError(f"the adapter was trained on a {found.__name__}, and this checkpoint is of a {own}")
    return found


def empty_model(cls: Any, config: Any) -> nn.Module:
    """The model without any memory for its weights."""
    with torch.device("meta"):
        return cls(copy.deepcopy(config)).eval()


def stored_names(model: Any, keys: Iterable[str]) -> StoredNames:
    """Which parameter of ``model`` each tensor of a checkpoint is loaded into, as transformers decides it."""
    rename = _renaming(model)
    names: dict[str, str] = {}
    parameters, converted = {}, []
    for key in keys:
        name, is_converted = rename(key)
        if is_converted:
            converted.append(key)
        elif name in names:
            raise AdapterError(f"{names[name]} and {key} in the checkpoint are the same parameter, {name}")
        else:
            names[name], parameters[key] = key, name
    own = {*(name for name, _ in model.named_parameters(remove_duplicate=False)), *persistent_buffers(model)}
    loads = frozenset(name for name in own if rename(name) == (name, False))
    return StoredNames(names, parameters, frozenset(converted), loads)


def _renaming(model: Any) -> Any:
    """A function from a tensor's name to ``(parameter, whether the tensor is converted too)``."""
    import transformers

    state = model.state_dict()
    renamings: list[Any] = []
    converters: list[Any] = []
    if int(transformers.__version__.partition(".")[0]) >= 5:
        try:
            from transformers import core_model_loading as loading
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError as error:
            raise AdapterError(
                f"transformers {transformers.__version__} keeps its renaming of weights elsewhere: {error}"
            ) from error
        for transform in get_model_conversion_mapping(model):
            (converters if isinstance(transform, loading.WeightConverter) else renamings).append(transform)

        def renamed(key: str) -> tuple[str, bool]:
            name, converter = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:
                return key, False
            return name, converter is not None

        return renamed
    prefix = model.base_model_prefix + "."

    def prefixed(key: str) -> tuple[str, bool]:
        """transformers 4 renames old models' tensors further; those are then not found, and refused."""
        if key in state or not model.base_model_prefix:
            return key, False
        shorter = key.removeprefix(prefix)
        return (shorter if shorter in state else prefix + key if prefix + key in state else key), False

    return prefixed
