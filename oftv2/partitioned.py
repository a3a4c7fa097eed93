"""Parameters that DeepSpeed's ZeRO-3 keeps in parts: their sizes, and their values for a while.

Between uses such a parameter is an empty tensor of shape ``(0,)``, with its real shape in ``ds_shape``. Its values come
together in a collective operation: every process has to take part. Nothing here imports DeepSpeed unless a parameter is
DeepSpeed's, so its being there is certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter as a whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_partitioned(parameter: Tensor | None) -> bool:
    """Whether a parameter is an empty tensor in place of its values."""
    return parameter is not None and full_shape(parameter) != parameter.shape


def has_master(parameter: Tensor) -> bool:
    """Whether a DeepSpeed engine keeps a copy of a parameter, from which the next step would write it anew."""
    return getattr(parameter, "_hp_mapping", None) is not None or hasattr(parameter, "_z3_optimizer")


@contextmanager
def gathered(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Within the context, partitioned parameters have their values, which takes a collective operation.

    Args:
        parameters (Iterable[torch.Tensor]): of any kind; those that are not DeepSpeed's are left alone.
        write (bool): what the first process writes to them is kept, by every process.
    """
    chosen = [p for p in parameters if (hasattr(p, "ds_id") if write else is_partitioned(p))]
    if not chosen:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0 if write else None):
        yield


@contextmanager
def filled(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the context, partitioned parameters have values that were gathered before, by name; no collective.

    Raises:
        AdapterError: there are none for one of them.
    """
    chosen = {name: parameter for name, parameter in parameters.items() if is_partitioned(parameter)}
    for name, parameter in chosen.items():
        if values is None or name not in values or values[name].shape != full_shape(parameter):
            raise AdapterError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, and its values are not at hand: call "
                "oftv2.save_adapter(model, folder) in every process, or pass "
                "state_dict=accelerator.get_state_dict(engine), which every process has to call"
            )
    parts: dict[str, Any] = {name: parameter.data for name, parameter in chosen.items()}
    try:
        for name, parameter in chosen.items():
            assert values is not None
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in chosen.items():
            parameter.data = parts[name]


def refuse_partitioned(parameters: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises AdapterError that names the first parameter which ZeRO-3 partitions.

    Args:
        parameters (Iterable[tuple[str, torch.Tensor]]): by name.
        what (str): what is not possible, and what to do.
    """
    for name, parameter in parameters:
        if hasattr(parameter, "ds_id"):
            raise AdapterError(f"{name} is partitioned by DeepSpeed ZeRO-3: {what}")
