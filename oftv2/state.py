"""What a wrapped model remembers of its adapters, and how to walk its adapted layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .base import DEFAULT_ADAPTER, OFTLayer
from .config import OFTConfig
from .errors import AdapterError

_ATTRIBUTE = "_oftv2"


@dataclass
class AdapterState:
    """Kept on the wrapped model; deep-copied and pickled with it.

    Attributes:
        configs: the configuration of each adapter by its name.
        active: the adapter in use.
        trainable_before: names of the parameters that trained before the model was wrapped.
        originals: by adapter, the values before training of the base parameters that it trains in full
            (``modules_to_save`` and biases), under the names they have in the plain model.
        nested_encoders: paths of the ``nn.TransformerEncoder`` whose nested tensors are off while it is wrapped.
    """

    configs: dict[str, OFTConfig]
    active: str = DEFAULT_ADAPTER
    trainable_before: tuple[str, ...] = ()
    originals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    nested_encoders: tuple[str, ...] = ()


def set_state(model: nn.Module, state: AdapterState | None) -> None:
    """Puts the state on the model, or takes it off."""
    if state is None:
        delattr(model, _ATTRIBUTE)
    else:
        setattr(model, _ATTRIBUTE, state)


def find_state(model: nn.Module) -> AdapterState | None:
    """The state of a wrapped model, or None of a plain one."""
    return model.__dict__.get(_ATTRIBUTE)


def get_state(model: nn.Module) -> AdapterState:
    """The state of a wrapped model.

    Raises:
        AdapterError: the model is not wrapped.
    """
    state = find_state(model)
    if state is None:
        raise AdapterError(
            f"this {type(model).__name__} has no oftv2 adapter: call wrap_model or load_adapter first, and pass the "
            "same model object here (not a part of it)"
        )
    return state


def oft_layers(model: nn.Module) -> Iterator[tuple[str, OFTLayer]]:
    """The adapted layers with their paths, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, OFTLayer))


def plain_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that has this name in the plain model; adapted layers pass through to their base layer."""
    module: nn.Module = model
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, leaf)


def plain_name(name: str) -> str:
    """A parameter's name in the plain model from its name in the wrapped one."""
    return name.replace(".base_layer.", ".")
