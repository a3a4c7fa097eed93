"""The errors and warnings of the library, and how their messages list what there is much of."""

from __future__ import annotations

from collections.abc import Sequence


class AdapterError(ValueError):
    """An adapter that does not fit: its file, its model, a layer, or what is asked of it."""


class StabilityWarning(UserWarning):
    """Generators so large that the Cayley–Neumann series is about to diverge."""


class KernelWarning(UserWarning):
    """A GPU on which Triton's kernels do not start, so that plain torch is used."""


class OptimizerWarning(UserWarning):
    """An optimizer that trains nothing of the adapter, because it was made before the adapter was there."""


class TargetWarning(UserWarning):
    """What an adapter leaves out, though it matters: experts, running statistics, weights read or trained past it."""


class PeftFormatWarning(UserWarning):
    """An adapter that PEFT cannot read as it is, or one of PEFT's that reads otherwise here than there."""


class PeftRepairWarning(UserWarning):
    """A model of PEFT's that, as asked for, no longer computes what PEFT does."""


class RequantizationWarning(UserWarning):
    """What it cost to quantize a merged weight again."""


def listed(names: list[str]) -> str:
    """A few of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def itemized(problems: Sequence[str], *, most: int = 12, indent: str = "  ") -> str:
    """The first problems, a line each, and how many more there are."""
    more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join(indent + line for line in (*problems[:most], *more))


def refuse(title: str, problems: Sequence[str]) -> None:
    """Raises one AdapterError that lists the problems, if there are any."""
    if problems:
        raise AdapterError(f"{title}:\n{itemized(problems)}")
