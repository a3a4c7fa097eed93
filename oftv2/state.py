"""What a wrapped model remembers of its adapters, and how to walk its adapted layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from .base import DEFAULT_ADAPTER, OFTLayer
from .config import OFTConfig
from .errors import AdapterError
from .sharding import plain_path

_ATTRIBUTE = "_oftv2"


@dataclass
class AdapterState:
    """Kept on the wrapped model; deep-copied and pickled with it.

    Attributes:
        configs: the configuration of each adapter by its name.
        sequence: the active adapters, in the order in which activations go through them.
        trainable_before: names of the parameters that trained before the model was wrapped; of tied ones each, for
            merging may make two of them.
        trained: by adapter, the base parameters that it trains in full (``modules_to_save`` and biases), under the
            names they have in the plain model, and the buffers of those modules (running statistics).
        originals: the values of all those in the base model, by name.
        aside: by inactive adapter, its own parameters in place of those; an active one's are in the model.
        disabled_by: the thread that is within ``disable_adapter``.
        nested_encoders: paths of the ``nn.TransformerEncoder`` whose nested tensors are off while it is wrapped.
    """

    configs: dict[str, OFTConfig]
    sequence: tuple[str, ...] = (DEFAULT_ADAPTER,)
    trainable_before: tuple[str, ...] = ()
    trained: dict[str, tuple[str, ...]] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    aside: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    disabled_by: int | None = None
    nested_encoders: tuple[str, ...] = ()

    @property
    def active(self) -> str:
        """The active adapter; AdapterError where several are."""
        if len(self.sequence) > 1:
            raise AdapterError(
                f"the adapters {_quoted(self.sequence)} are active together, and this takes one: give its name, or "
                "call set_adapter(model, name) first"
            )
        return self.sequence[0]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def set_state(model: nn.Module, state: AdapterState | None) -> None:
    """Puts the state on the model, or takes it off."""
    if state is None:
        delattr(model, _ATTRIBUTE)
    else:
        setattr(model, _ATTRIBUTE, state)


def find_state(model: nn.Module) -> AdapterState | None:
    """The state of a wrapped model, or None of a plain one.

    Raises:
        AdapterError: this is no model, as where arguments changed places.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"the first argument is the model, a torch.nn.Module, and this is a {type(model).__name__}")
    return model.__dict__.get(_ATTRIBUTE)


def inner_model(model: nn.Module) -> str | None:
    """How to reach the model inside what ``torch.compile`` or data parallelism made of it; None of any other."""
    if "_orig_mod" in model._modules:
        return "model._orig_mod"
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return "model.module" if parallel or "_fsdp_wrapped_module" in model._modules else None


def get_state(model: nn.Module) -> AdapterState:
    """The state of a wrapped model.

    Raises:
        AdapterError: the model is not wrapped.
    """
    state = find_state(model)
    if state is None:
        inside = next((path for path, module in model.named_modules() if _ATTRIBUTE in vars(module)), None)
        inner = inner_model(model) or (inside and f'model.get_submodule("{inside}")')
        same = f"the model inside it here: {inner}" if inner else "the same model object here (not a part of it)"
        raise AdapterError(
            f"this {type(model).__name__} has no oftv2 adapter: call wrap_model or load_adapter first, and pass {same}"
            "; merge and unwrap_model take the adapter off, so save it before"
        )
    return state


def oft_layers(model: nn.Module) -> Iterator[tuple[str, OFTLayer]]:
    """The adapted layers with their paths, each once."""
    return ((plain_path(name), module) for name, module in model.named_modules() if isinstance(module, OFTLayer))


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Raises AdapterError for names of adapters that a wrapped model, or an adapted layer, does not have."""
    known: Iterable[str] = model.rotations if isinstance(model, OFTLayer) else get_state(model).configs
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(f"there is no adapter {_quoted(unknown)} in this model; it has {_quoted(known)}")


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, OFTLayer]:
    """The layers, by their paths, that have this adapter."""
    return {path: layer for path, layer in oft_layers(model) if adapter_name in layer.rotations}


@contextmanager
def plain_view(model: nn.Module) -> Iterator[None]:
    """Within the context the base layers stand in the places of the adapted ones, for code that reads a plain model."""
    places = [
        (parent._modules, name, layer)
        for parent in model.modules()
        for name, layer in parent._modules.items()
        if isinstance(layer, OFTLayer)
    ]
    try:
        for modules, name, layer in places:
            modules[name] = layer.base_layer
        yield
    finally:
        for modules, name, layer in places:
            modules[name] = layer


def plain_parameter(model: nn.Module, name: str) -> Tensor:
    """The parameter, or buffer, of this name in the plain model; adapted layers pass through to their base layer."""
    module: nn.Module = model
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, leaf)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state dictionary, under each of their names."""
    return {
        f"{path}.{leaf}" if path else leaf: buffer
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
    }


def trained_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter, active or not, made of the base parameters that it trains in full (and of the buffers beside
    them), by their plain names."""
    state = get_state(model)
    if adapter_name in state.sequence:
        return {name: plain_parameter(model, name) for name in state.trained[adapter_name]}
    return state.aside[adapter_name]


def active_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What active adapters train in full, by plain names; nothing of a model that is not wrapped."""
    state = find_state(model)
    names = [name for adapter in state.sequence for name in state.trained[adapter]] if state is not None else []
    return {name: plain_parameter(model, name) for name in names}


def adapter_parameters(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """All that an adapter trains: its generators, and the base parameters that it trains in full."""
    generators = [layer.generators[adapter_name] for layer in layers_of(model, adapter_name).values()]
    return [*generators, *trained_parameters(model, adapter_name).values()]


def plain_name(name: str) -> str:
    """A parameter's name in the plain model from its name in the wrapped one."""
    return name.replace(".base_layer.", ".")
