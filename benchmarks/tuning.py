"""What ``gpu_tune.py`` tries: launches of the kernels, and for each the settings that it could run with.

A setting is a patch of the launcher's own table or plan, so that what is timed is what would be shipped. The first
candidate of every launch patches nothing: it is what is shipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from oftv2.kernels import cayley, nf4, rotate, rotate_matmul
from oftv2.kernels.tiles import tile_size

Settings = dict[str, int]
TERMS = 4
_SETS = 4  # of inputs that are taken in turn, so that none is found in the cache


class Sizes(NamedTuple):
    """Of one launch."""

    tokens: int
    features: int
    outputs: int


@dataclass(frozen=True)
class Candidate:
    """Settings by name, and the attributes of modules that put them in force."""

    settings: Settings
    patches: tuple[tuple[Any, str, Any], ...] = ()

    def applied(self) -> contextlib.ExitStack:
        """Within this context, launches go by these settings."""
        stack = contextlib.ExitStack()
        for launcher in (rotate, rotate_matmul):  # what they keep is what is shipped
            stack.enter_context(mock.patch.object(launcher, "_plan", launcher._plan.__wrapped__))
        for module, name, value in self.patches:
            stack.enter_context(mock.patch.object(module, name, value))
        return stack


@dataclass(frozen=True)
class Launch:
    """A launcher with inputs, and what it could run with.

    Attributes:
        prepare: makes inputs on a device, and returns what runs the launcher on the set of the given number.
        moved: bytes that it cannot do without reading or writing.
    """

    name: str
    prepare: Callable[[torch.device], Callable[[int], Any]]
    candidates: list[Candidate]
    moved: int


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers; without memory on the device ``meta``."""
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def small(device: torch.device, *shape: int) -> Tensor:
    """Generators or Δ of a small rotation."""
    return 0.01 * random(device, *shape, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------------- rotations


def rotations(sizes: Sizes) -> Iterator[Launch]:
    """Forward and backward, of Δ and from generators, one and two at a time."""
    cases = [(b, 1, 0) for b in (16, 32, 64, 128)] + [(32, 1, TERMS), (32, 2, 0)]
    for (b, group, terms), backward in itertools.product(cases, (False, True)):
        name = f"rotate {'backward' if backward else 'forward'} b={b}" + f" group={group}" * (group > 1)
        moved = 2 * sizes.tokens * sizes.features * (2 + group if backward else 1 + group)
        yield Launch(
            name + f" terms={terms}" * (terms > 0),
            _rotation(sizes, b, group, terms, backward),
            [Candidate({}), *_rotation_candidates(b, terms, backward)],
            moved,
        )


def _rotation(sizes: Sizes, b: int, group: int, terms: int, backward: bool) -> Any:
    def prepare(device: torch.device) -> Callable[[int], Any]:
        d = sizes.features // b * b
        shape = (d // b, b * (b - 1) // 2) if terms else (d // b, b, b)
        sources = [small(device, *shape) for _ in range(group)]
        xs = [random(device, sizes.tokens, d) for _ in range(_SETS)]
        if not backward:
            return lambda i: rotate.rotate(xs[i % _SETS], sources, b, terms)
        grads = [[random(device, sizes.tokens, d) for _ in range(group)] for _ in range(_SETS)]

        def run(i: int) -> list[Tensor | None]:
            grad_x, partials = rotate.rotate_backward(grads[i % _SETS], xs[i % _SETS], sources, b, terms)
            return [grad_x, *(partial.sum(0) for partial in partials)]

        return run

    return prepare


def _rotation_candidates(b: int, terms: int, backward: bool) -> Iterator[Candidate]:
    table = "_BACKWARD_16_BIT" if backward else "_FORWARD_16_BIT"
    least = tile_size(b)
    for tile in sorted({least} if terms else {least, max(least, 64), max(least, 128)}):
        for width, block_t, warps, stages, programs in itertools.product(
            sorted({tile, max(32, tile // 2)} & set(range(tile + 1))),
            (16, 32, 64, 128, 256),
            (4, 8),
            (2, 3, 4),
            (2, 4, 8),
        ):
            stage = 2 * block_t * tile * (2 if backward else 1)  # bytes
            if stage < 2048 or stage * (stages - 1) > 96 * 1024:
                continue
            yield Candidate(
                {
                    "TILE": tile,
                    "WIDTH": width,
                    "BLOCK_T": block_t,
                    "warps": warps,
                    "stages": stages,
                    "per_sm": programs,
                },
                (
                    (rotate, "tile_size", lambda _, tile=tile: tile),
                    (rotate, table, {tile: (width, block_t, warps, stages)}),
                    (rotate, "_PROGRAMS_PER_MULTIPROCESSOR", {tile: programs}),
                ),
            )


# ------------------------------------------------------------------------------------------ products, and 4-bit weights


def products(sizes: Sizes) -> Iterator[Launch]:
    """The rotation on its way into the product, for few tokens, some, and many."""
    for b, tokens in itertools.product((32, 128), (1, 16, 64, 1024)):
        name = "_FEW_TOKENS" if tokens <= 16 else "_SOME_TOKENS" if tokens <= 64 else "_MANY_TOKENS"
        moved = 2 * (tokens * (sizes.features + sizes.outputs) + sizes.features * sizes.outputs)
        candidates = [Candidate({}), *_product_candidates(b, name)]
        yield Launch(f"rotate_matmul b={b} T={tokens}", _product(sizes, b, tokens), candidates, moved)


def _product(sizes: Sizes, b: int, tokens: int) -> Any:
    def prepare(device: torch.device) -> Callable[[int], Any]:
        d = sizes.features // b * b
        x, delta = random(device, tokens, d), small(device, d // b, b, b).bfloat16()
        weights = [random(device, sizes.outputs, d) for _ in range(_SETS)]
        return lambda i: rotate_matmul.rotate_matmul(x, delta, weights[i % _SETS])

    return prepare


def _product_candidates(b: int, table: str) -> Iterator[Candidate]:
    tokens = {"_FEW_TOKENS": (16,), "_SOME_TOKENS": (16, 32, 64), "_MANY_TOKENS": (64, 128, 256)}[table]
    splits = (8, 16, 32) if table == "_FEW_TOKENS" else (32,)
    key = (2, max(64, tile_size(b)))
    for block_t, block_n, warps, stages, most in itertools.product(
        tokens, (32, 64, 128, 256), (4, 8), (2, 3, 4, 5), splits
    ):
        settings = {"BLOCK_T": block_t, "BLOCK_N": block_n, "warps": warps, "stages": stages, "splits": most}
        entry = {key: (block_t, block_n, warps, stages)}
        tables = {table: entry} if table == "_MANY_TOKENS" else {table: entry, "_MANY_TOKENS": {}}
        patches = [(rotate_matmul, name, value) for name, value in (tables | {"_MAX_SPLITS": most}).items()]
        yield Candidate(settings, tuple(patches))


def dequantizations(sizes: Sizes) -> Iterator[Launch]:
    """A 4-bit weight, rotated while it is dequantized."""
    for b in (32, 64, 128):
        moved = int(sizes.outputs * sizes.features * (0.5 + 4 / 64 + 2))
        yield Launch(f"nf4 b={b}", _dequantization(sizes, b), [Candidate({}), *_dequantization_candidates()], moved)


def _dequantization(sizes: Sizes, b: int) -> Any:
    def prepare(device: torch.device) -> Callable[[int], Any]:
        n, d = sizes.outputs, sizes.features // b * b
        packed = [torch.randint(256, (n * d // 2,), device=device, dtype=torch.uint8) for _ in range(_SETS)]
        code, absmax = torch.linspace(-1, 1, 16, device=device), small(device, n * d // 64)
        delta = small(device, d // b, b, b)
        return lambda i: nf4.dequantize_rotate(packed[i % _SETS], absmax, code, (n, d), 64, delta, torch.bfloat16)

    return prepare


def _dequantization_candidates() -> Iterator[Candidate]:
    shipped = nf4.plan
    for rows, stages, share in itertools.product((16, 32, 64, 128), (2, 3, 4), (256, 512, 1024)):

        def plan(n: int, *rest: Any, rows: int = rows, stages: int = stages) -> nf4.Launch:
            launch = shipped(n, *rest)
            length = triton.cdiv(launch.share, rows) * rows
            constants = {**launch.constants, "ROWS": rows, "num_stages": stages}
            grid = (launch.grid[0], triton.cdiv(n, length))
            return dataclasses.replace(launch, grid=grid, share=length, constants=constants)

        yield Candidate({"ROWS": rows, "stages": stages, "share": share}, ((nf4, "plan", plan), (nf4, "_SHARE", share)))


def transforms(sizes: Sizes) -> Iterator[Launch]:
    """Generators to Δ, and back."""
    shipped = cayley._launch
    candidates = [Candidate({})]
    for warps in (1, 2, 8):

        def launch(*args: int, warps: int = warps) -> tuple[tuple[int], dict[str, int]]:
            grid, constants = shipped(*args)
            return grid, {**constants, "num_warps": warps}

        candidates.append(Candidate({"warps": warps}, ((cayley, "_launch", launch),)))
    for b in (16, 32):
        r = sizes.features // b
        moved = 4 * r * (b * b + b * (b - 1) // 2)

        def forward(device: torch.device, b: int = b, r: int = r) -> Callable[[int], Any]:
            packed = small(device, r, b * (b - 1) // 2)
            return lambda i: cayley.cayley_neumann(packed, b, TERMS)

        def backward(device: torch.device, b: int = b, r: int = r) -> Callable[[int], Any]:
            packed, grad = small(device, r, b * (b - 1) // 2), small(device, 16, r, b, b)
            return lambda i: cayley.cayley_neumann_backward(grad, packed, b, TERMS)

        yield Launch(f"cayley forward b={b}", forward, candidates, moved)
        yield Launch(f"cayley backward b={b}", backward, candidates, moved + 4 * 15 * r * b * b)


def launches(sizes: Sizes) -> list[Launch]:
    """All, the most used first."""
    return [*rotations(sizes), *dequantizations(sizes), *products(sizes), *transforms(sizes)]
