"""What a suite of ``run.py`` is told."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from methods import METHODS, Sizes


@dataclass(frozen=True)
class Options:
    """Where, what and how much to measure.

    Attributes:
        methods: those asked for, or ``None`` for a suite's own.
        model: ``"smollm2"``, ``"tiny"``, a name of ``models.SIZES`` (random weights) or what ``from_pretrained`` takes.
        rounds: that count, at most; ``seconds``: time for one group, once five rounds are there.
        only: a regular expression that the names of groups have to contain.
        done: groups that are there already.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    quick: bool = False
    methods: tuple[str, ...] | None = None
    model: str = "smollm2"
    sizes: Sizes = field(default_factory=Sizes)
    rounds: int = 21
    seconds: float = 20.0
    seed: int = 0
    only: str = ""
    done: Collection[str] = ()

    def to_json(self) -> dict[str, Any]:
        """What a process of its own is told of them: :meth:`of` takes it."""
        told = {name: getattr(self, name) for name in ("quick", "model", "seed")}
        return {**told, "device": str(self.device), "dtype": self.dtype_name, "sizes": asdict(self.sizes)}

    @classmethod
    def of(cls, told: dict[str, Any]) -> Options:
        device, dtype, sizes = torch.device(told["device"]), getattr(torch, told["dtype"]), Sizes(**told["sizes"])
        return cls(**{**told, "device": device, "dtype": dtype, "sizes": sizes})

    def wanted(self, group: str) -> bool:
        """Whether a group is to be measured now."""
        return group not in self.done and re.search(self.only, group) is not None

    def choose(self, own: list[str]) -> list[str]:
        """The methods asked for among a suite's own, in its order, and what the ratios divide by."""
        asked = own if self.methods is None else [name for name in own if name in self.methods]
        references = {METHODS[name].reference for name in asked}
        return [name for name in own if name in asked or name in references]

    @property
    def effort(self) -> dict[str, float]:
        """How long to measure: arguments of :func:`measure.interleave`."""
        return {"rounds": self.rounds, "seconds": self.seconds}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")
