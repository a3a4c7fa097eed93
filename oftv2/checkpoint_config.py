"""The configuration of a merged model: labels, tied weights, class and dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter_file import AdapterFile
from .checkpoint_names import empty_model
from .errors import listed


@dataclass(frozen=True)
class Changes:
    """What becomes different in ``config.json``.

    Attributes:
        dtype: of the weights, or None if it stays.
        untied: whether tied weights became two.
        architecture: the model's class, or None if it stays.
        labels: how many labels a new head has.
    """

    dtype: torch.dtype | None = None
    untied: bool = False
    architecture: str | None = None
    labels: int = 0


def with_labels(cls: Any, config: Any, adapter: AdapterFile) -> tuple[Any, nn.Module]:
    """The configuration with as many labels as the trained head has, and the empty model of it."""
    model = empty_model(cls, config)
    heads = {
        adapter.parameter(name).shape[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in adapter.trained
        and adapter.parameter(name).dim()
        and parameter.shape[0] == config.num_labels != adapter.parameter(name).shape[0]
        and parameter.shape[1:] == adapter.parameter(name).shape[1:]
    }
    if len(heads) != 1:
        return config, model
    config = copy.deepcopy(config)
    config.num_labels = heads.pop()
    return config, empty_model(cls, config)


def class_notes(cls: Any, config: Any, added: list[str], dropped: list[str]) -> list[str]:
    """What to say of a model that got another head."""
    notes = [f"{listed(added)} added: the merged model is a {cls.__name__}"]
    if dropped:
        notes.append(f"{listed(dropped)} left out, which a {cls.__name__} has no use for")
    notes.append(
        f"an adapter holds no settings of the model it was trained in: see in config.json that id2label "
        f"({config.num_labels} labels), problem_type and pad_token_id are right"
    )
    return notes


def merged_config(config: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """``config.json`` of the merged model."""
    config = copy.deepcopy(config)
    if changes.dtype is not None:
        name = str(changes.dtype).removeprefix("torch.")
        if not _set_dtype(config, name):
            config["torch_dtype"] = name  # read by every transformers
    if changes.untied:
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section["tie_word_embeddings"] = False
    if changes.architecture:
        config["architectures"] = [changes.architecture]
        if len(config.get("id2label", (0, 1))) != changes.labels:
            config["id2label"] = {str(label): f"LABEL_{label}" for label in range(changes.labels)}
            config["label2id"] = {f"LABEL_{label}": label for label in range(changes.labels)}
    return config


def _set_dtype(section: dict[str, Any], name: str) -> bool:
    """Replaces the dtype, also of nested configurations; whether there was one at the top."""
    for value in section.values():
        if isinstance(value, dict):
            _set_dtype(value, name)
    present = [key for key in ("dtype", "torch_dtype") if isinstance(section.get(key), str)]
    for key in present:
        section[key] = name
    return bool(present)
