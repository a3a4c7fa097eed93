"""How often each row of a batch is there: once, but for the beams and return sequences that ``generate`` makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import AdapterError

_PACK = "init_continuous_batching"  # with what generate_batch begins
_EXPAND = "_expand_inputs_for_generation"  # with what generate repeats rows


@dataclass
class Repeats:
    """How many times each row may be there, one after the other: once, or ``number`` times, or any number of times."""

    number: int = 1
    any_number: bool = False

    def allow(self, number: int) -> bool:
        """Whether every row may come this many times."""
        return self.any_number or number in (0, 1, self.number)


@contextmanager
def following_generate(module: nn.Module, repeats: Repeats) -> Iterator[None]:
    """Within the context, ``module.generate`` says in ``repeats`` how many times it repeats rows while it runs."""
    if not hasattr(module, _EXPAND):
        yield
        return
    stand_ins = {"generate": _Generate, _EXPAND: _Expand, _PACK: _Pack}
    own = {name: vars(module).get(name) for name in stand_ins if hasattr(module, name)}
    for name, function in own.items():
        setattr(module, name, stand_ins[name](module, name, function, repeats))
    try:
        yield
    finally:
        for name, function in own.items():
            if function is None:
                delattr(module, name)
            else:
                setattr(module, name, function)


@dataclass(eq=False)
class _StandIn:
    """Takes the place of a method. It knows its module, and not the bound method: a copy of a model copies both."""

    module: nn.Module
    name: str
    own: Callable[..., Any] | None  # what the module had in place of its class's
    repeats: Repeats

    def method(self) -> Callable[..., Any]:
        return self.own or inspect.getattr_static(type(self.module), self.name).__get__(self.module)


class _Generate(_StandIn):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.repeats.number
        try:
            return self.method()(*args, **kwargs)
        finally:
            self.repeats.number = before


class _Expand(_StandIn):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self.method()
        self.repeats.number = inspect.signature(method).bind(*args, **kwargs).arguments.get("expand_size", 1)
        return method(*args, **kwargs)


class _Pack(_StandIn):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AdapterError(
            f"this {type(self.module).__name__} is within adapters_per_row, and continuous batching (generate_batch) "
            "lays out all requests in one row, where no layer can tell them apart: call generate, or set_adapter and "
            "then generate_batch for each adapter"
        )
