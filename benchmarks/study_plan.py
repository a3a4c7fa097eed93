"""What the study trains, and in which order: the first runs are the most informative, and every method gets its turn.

Any prefix of the order is a fair comparison: a learning rate is tried by every method before the next one is, and every
method is given as many learning rates and as many seeds as the others, and one rate more where its best is the highest
or the lowest of them. OFT and LoRA of the usual sizes are given three seeds more: their differences are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

Row = dict[str, Any]

TASKS = ("sums", "reversal", "fractions", "sorting", "shakespeare")
SEEDS = (0, 1, 2)  # the learning rates are tried with the first
MORE_SEEDS = (3, 4, 5)  # of the methods that are compared head to head
STEPS, ABLATION_STEPS = 60, 40

# Three learning rates for each kind, a factor of two apart, around what suited it in pilot runs: middle, higher, lower.
LEARNING_RATES = {
    "oft": (5e-4, 1e-3, 2.5e-4),
    "lora": (1e-3, 2e-3, 5e-4),
    "dora": (1e-3, 2e-3, 5e-4),
    "full": (1e-4, 2e-4, 5e-5),
}


@dataclass(frozen=True)
class Method:
    """A way to finetune: OFT of a block size, LoRA or DoRA of a rank, or all weights, on a base of some type."""

    kind: str  # oft, lora, dora or full
    size: int = 0  # block size or rank
    base: str = "float32"  # float32, bfloat16 or nf4
    options: tuple[tuple[str, Any], ...] = ()  # further fields of OFTConfig

    @property
    def name(self) -> str:
        """Such as ``oft-32`` or ``lora-16/nf4`` or ``oft-32/neumann_terms=3``."""
        parts = [f"{self.kind}-{self.size}" if self.size else self.kind]
        parts += [] if self.base == "float32" else [self.base]
        return "/".join([*parts, *(f"{key}={value}" for key, value in self.options)])


@dataclass(frozen=True)
class Run:
    """One training run; ``lr`` is None where the best of a sweep is to be taken that is not finished."""

    study: str  # quality, neumann, scaling, stability
    task: str
    method: Method
    seed: int
    lr: float | None
    steps: int = field(default=STEPS)

    @property
    def key(self) -> str:
        """What the run is known by in the results."""
        lr = "best" if self.lr is None else f"{self.lr:g}"
        return f"{self.study}/{self.task}/{self.method.name}/lr={lr}/seed={self.seed}/steps={self.steps}"


OFT, LORA = Method("oft", 32), Method("lora", 16)
HEAD_TO_HEAD = (OFT, LORA, replace(OFT, base="nf4"), replace(LORA, base="nf4"))
CORE = (*HEAD_TO_HEAD, Method("full"))
SIZES = (Method("oft", 16), Method("lora", 8), Method("oft", 64), Method("lora", 4), Method("dora", 16))
BF16 = (replace(OFT, base="bfloat16"), replace(LORA, base="bfloat16"))  # slow on CPUs: last
METHODS = (*CORE, *SIZES, *BF16)


def tried_lrs(rows: Iterable[Row], run: Run) -> dict[float, float]:
    """The validation loss by learning rate in the sweep of the run's method on its task; infinite where it diverged."""
    return {
        row["lr"]: row["validation"]["loss"] if not row["diverged"] else float("inf")
        for row in rows
        if (row["study"], row["task"], row["method"]) == ("quality", run.task, run.method.name)
        and (row["seed"], row["steps"]) == (SEEDS[0], run.steps)
    }


def best_lr(rows: Iterable[Row], run: Run) -> float | None:
    """The learning rate of the lowest validation loss in the sweep of the run's method on its task, or None before the
    grid is done."""
    tried = tried_lrs(rows, run)
    return min(tried, key=tried.__getitem__) if set(LEARNING_RATES[run.method.kind]) <= set(tried) else None


def beyond_edge(rows: Iterable[Row], run: Run) -> float | None:
    """The next learning rate outside the grid, on the side where its best one is the last; None where there is none."""
    grid = LEARNING_RATES[run.method.kind]
    tried = {lr: loss for lr, loss in tried_lrs(rows, run).items() if lr in grid}
    if set(tried) != set(grid):
        return None
    best = min(tried, key=tried.__getitem__)
    return {max(grid): 2 * best, min(grid): best / 2}.get(best)


def compare(rows: list[Row], task: str, methods: tuple[Method, ...]) -> Iterator[Run]:
    """Every learning rate with the first seed, one beyond the edge, then the other seeds at each method's best one."""
    for turn in range(3):
        for method in methods:
            yield Run("quality", task, method, SEEDS[0], LEARNING_RATES[method.kind][turn])
    for method in methods:
        run = Run("quality", task, method, SEEDS[0], None)
        if (lr := beyond_edge(rows, run)) is not None:
            yield replace(run, lr=lr)
    yield from at_best(rows, task, methods, SEEDS[1:])


def at_best(rows: list[Row], task: str, methods: tuple[Method, ...], seeds: tuple[int, ...]) -> Iterator[Run]:
    """Each method at its best learning rate, seed by seed."""
    for seed in seeds:
        for method in methods:
            run = Run("quality", task, method, seed, None)
            yield replace(run, lr=best_lr(rows, run))


def neumann(task: str, lr: float) -> Iterator[Run]:
    """One to eight terms and the exact transform."""
    exact = replace(OFT, options=(("parametrization", "cayley"),))
    series = [replace(OFT, options=(("neumann_terms", k),)) for k in (4, 1, 2, 3, 5, 6, 7, 8)]
    for method in (exact, *series):
        yield Run("neumann", task, method, SEEDS[0], lr)


def scaling(task: str) -> Iterator[Run]:
    """Plain and scaled generators on one grid of learning rates, for three block sizes."""
    for lr in (1e-3, 5e-4, 2e-3, 2.5e-4):
        for size in (32, 16, 64):
            yield Run("scaling", task, Method("oft", size), SEEDS[0], lr, ABLATION_STEPS)
            scaled = Method("oft", size, options=(("scale_generators", True),))
            yield Run("scaling", task, scaled, SEEDS[0], 10 * lr, ABLATION_STEPS)


def stability(task: str) -> Iterator[Run]:
    """Learning rates far above the useful ones."""
    exact = replace(OFT, options=(("parametrization", "cayley"),))
    for factor in (4, 16, 64):
        for method in (OFT, exact, LORA, Method("full")):
            yield Run("stability", task, method, SEEDS[0], factor * LEARNING_RATES[method.kind][0], ABLATION_STEPS)


def plan(rows: list[Row]) -> list[Run]:
    """Every run of the study in order; what depends on a sweep that ``rows`` do not hold has no learning rate yet."""
    first, *others = TASKS
    runs: list[Run] = []
    for task in TASKS:
        runs += compare(rows, task, CORE)
    runs += compare(rows, first, SIZES)
    runs += neumann(first, LEARNING_RATES["oft"][0])
    runs += scaling(first)
    runs += stability(first)
    for task in TASKS:
        runs += at_best(rows, task, HEAD_TO_HEAD, MORE_SEEDS)
    for task in others:
        runs += compare(rows, task, SIZES)
    runs += compare(rows, first, BF16)
    return runs
