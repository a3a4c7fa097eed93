"""Which adapters are in a model's weights, noted in its configuration, so that none gets there twice.

transformers keeps what it does not know in ``config.json``, and other programs pass over it. The base check cannot see
a small adapter, whose rotation changes the weights less than rounding may.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_file import AdapterFile
from .state import layers_of

FIELD = "oftv2_merged"  # in a configuration: the fingerprints of the adapters that were merged


def note_merged(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Notes in a transformers model's configuration that these adapters of its own get merged for good."""
    if not config_of(model):
        return
    for name in adapter_names:
        found = _fingerprint(layer.generators[name] for layer in layers_of(model, name).values())
        setattr(model.config, FIELD, [*_noted(config_of(model)), *found])


def config_of(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` of a transformers model would hold; nothing of any other model."""
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def with_adapter(config: dict[str, Any], adapter: AdapterFile) -> dict[str, Any]:
    """What ``config.json`` of a model holds with this adapter in the weights."""
    return {**config, FIELD: [*_noted(config), *_fingerprint(map(adapter.generators, adapter.block_sizes))]}


def merged_before(config: dict[str, Any], adapter: AdapterFile) -> list[str]:
    """What to say of a model of this configuration if the adapter is in its weights already."""
    found = _fingerprint(map(adapter.generators, adapter.block_sizes))
    if not set(found) & set(_noted(config)):
        return []
    return [f"this very adapter is merged into these weights already, as {FIELD} in config.json says"]


def _noted(config: dict[str, Any]) -> list[str]:
    return config.get(FIELD) or []


def _fingerprint(generators: Iterable[Tensor]) -> list[str]:
    """One digest of an adapter's generators, whatever its layers are called; none if they are all zero."""
    trained = [values.detach().to("cpu", torch.float32).contiguous() for values in generators if values.any()]
    digests = sorted(hashlib.sha256(values.numpy().tobytes()).digest() for values in trained)
    return [hashlib.sha256(b"".join(digests)).hexdigest()[:16]] if digests else []
