"""Models whose parameters FSDP spreads over several processes: whole values for saving, and what is refused.

FSDP2 (``fully_shard``) makes every parameter a DTensor while its module does not compute, and FSDP1 a piece of a flat
one. Gathering a DTensor is a collective operation: every process has to take part at the same point.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch import Tensor, nn

from .errors import AdapterError

PATIENCE = 60.0  # seconds; gathering an adapter takes a few
_IN_PATHS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_path(path: str) -> str:
    """A module's or parameter's path without what FSDP1, checkpoint wrappers and ``torch.compile`` put into it."""
    for part in _IN_PATHS:
        path = path.replace(part, "")
    return path


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of the tensor, as far as the tensor knows."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; a DTensor is gathered, on every process at once."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.to(tensor.device_mesh.device_type)  # type: ignore[attr-defined]  # not there where offloaded
    return sharded.full_tensor()


def whole_generators(layer: Any, adapter_name: str) -> Tensor:
    """An adapted layer's generators as :func:`whole` gives them; AdapterError where FSDP1 left only a part."""
    generators = whole(layer.generators[adapter_name])
    if generators.shape != layer.rotations[adapter_name].shape:
        raise AdapterError(
            f"{layer.name}: this process has a part of the generators (FSDP1): call this on the model inside, within "
            "FSDP.summon_full_params(model), or use FSDP2"
        )
    return generators


@contextmanager
def unsharded(
    model: nn.Module, parameters: Iterable[Tensor], values: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the context, the model has whole tensors in the places of those of ``parameters`` that are sharded.

    Args:
        model (nn.Module): the model.
        parameters (Iterable[torch.Tensor]): which of its parameters.
        values (Mapping[str, torch.Tensor] | None): a state dictionary that was gathered already, from which the whole
            tensors are taken in this process alone. ``None``: they are gathered, on every process at once.

    Raises:
        AdapterError: a sharded parameter that is not in ``values``.
    """
    wanted = {id(parameter) for parameter in parameters}
    replaced: dict[int, nn.Parameter] = {}
    places = []
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in wanted:
                continue
            name = plain_path(f"{path}.{leaf}" if path else leaf)
            value = None if values is None else values.get(name)
            if not is_sharded(parameter) and (value is None or value.shape == parameter.shape):
                continue
            if id(parameter) not in replaced:  # tied parameters stay one
                if values is not None and (value is None or is_sharded(value)):
                    raise AdapterError(
                        f"{name} is sharded (FSDP), and the given state_dict does not hold it whole: give that of "
                        "accelerator.get_state_dict(model), or none"
                    )
                plain = whole(parameter) if value is None else value.detach()
                replaced[id(parameter)] = nn.Parameter(plain, requires_grad=False)
            places.append((module._parameters, leaf, parameter))
    try:
        for registry, leaf, parameter in places:
            registry[leaf] = replaced[id(parameter)]
        yield
    finally:
        for registry, leaf, parameter in places:
            registry[leaf] = parameter


@contextmanager
def warning_of_waits(call: str) -> Iterator[None]:
    """Around what all processes do together: one that waits long for the others says so.

    It cannot know whether they are late or were never told to come, and torch waits for as long as the process group's
    timeout says (10 minutes or more), so this warns and raises nothing.

    Args:
        call (str): what every process has to call.
    """
    text = (
        f"{call} has waited {PATIENCE:g} s for other processes: the model is sharded, and all of them gather it "
        f"together. Every process has to call {call}, and not only the first one"
    )
    timer = threading.Timer(PATIENCE, warnings.warn, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_distributed() -> bool:
    """Whether several processes work together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_writer() -> bool:
    """Whether this is the process that writes what all of them gathered."""
    return torch.distributed.get_rank() == 0


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP looks after the module, of either version."""
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)


def check_unsharded(model: nn.Module, instead: str) -> None:
    """Raises AdapterError, with what to do instead, where FSDP spreads the model over processes."""
    for path, module in model.named_modules():
        if is_fsdp(module):
            raise AdapterError(f"{plain_path(path) or class_name(model)} is sharded (FSDP): {instead}")


def class_name(model: nn.Module) -> str:
    """The name of a model's class, without what ``fully_shard`` puts in front of it."""
    names = [cls.__name__ for cls in type(model).__mro__]
    after = names.index("FSDPModule") + 1 if "FSDPModule" in names else 0
    return names[after]
