"""Means with intervals, differences between runs of one seed, and forgetting at equal quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from study_plan import Row

# Student's t, 97.5%, by degrees of freedom: a study has a handful of seeds.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95% confidence interval; no width (NaN) for a single value."""

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """The mean of up to ten values with its 95% t-interval.

    Raises:
        ValueError: there is no value, or more than ten.
    """
    n = len(values)
    if not 1 <= n <= 1 + max(T_975):
        raise ValueError(f"{n} values; an interval is made of 1 to {1 + max(T_975)}")
    half = T_975[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(statistics.fmean(values), half, n)


def paired(ours: Sequence[Row], theirs: Sequence[Row], figure: Callable[[Row], float]) -> Interval | None:
    """The mean difference, ours minus theirs, over the seeds that both have; None if there is none."""
    other = {row["seed"]: figure(row) for row in theirs}
    differences = [figure(row) - other[row["seed"]] for row in ours if row["seed"] in other]
    return interval(differences) if differences else None


def at_equal_loss(runs: dict[str, list[Row]], tolerance: float = 0.1) -> dict[str, Row]:
    """For each method, the run that forgot least among those about as good as what every method reaches.

    That level is the highest of the methods' lowest test losses, and a tenth more: held-out sets are small. The runs
    should be of one seed and all learning rates, so that it compares what each method offers, not one setting of it.
    """
    level = (1 + tolerance) * max(min(row["test"]["loss"] for row in rows) for rows in runs.values())
    return {
        name: min((row for row in rows if row["test"]["loss"] <= level), key=lambda row: row["prose_perplexity"])
        for name, rows in runs.items()
    }
