"""Which form of an adapted layer costs least, from the bytes it moves, the operations it does and its launches.

Everything is counted beyond the frozen layer, whose own products are the same in every form. With ``T`` tokens, ``d``
inputs, ``n`` outputs, blocks of ``b`` and ``s`` bytes an element (forward; backward):

    form      bytes                                     operations
    input     2·T·d·s; 3·T·d·s                          2·T·d·b; 4·T·d·b          rotate x; rotate ĝ, reduce x and ĝ
    weight    2·n·d·s; 2·n·d·s + 2·T·d·s                2·n·d·b; 2·n·d·b + 2·T·d·b   rotate W twice; reduce x and ∂x
              a 4-bit W is dequantized in any case, so there its own 2·n·d·s, twice, are not extra
    fused     Δ again for every tile of outputs         2·T·d·b for every tile of outputs   no gradient
              on a 4-bit W: 2·T·d·s, less the 16-bit W that the base layer would write and read for several tokens

A step takes the longer of its time for bytes and its time for operations, and each launch adds its latency.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

INPUT, WEIGHT, FUSED = "input", "weight", "fused"


@dataclass(frozen=True)
class Machine:
    """What a device does: bytes a second, operations a second in a rotation's products, seconds a launch.

    ``source`` says where the numbers come from: measured by this project, or a data sheet's times 0.9.
    """

    name: str
    bandwidth: float
    operations: float
    launch: float
    source: str


# Two threads, float32, b = 32. Milliseconds of a training step over the frozen one in the input and the weight form:
# d = n = 1024, 3.5 and 3.9 at T = 1024, 4.8 and 4.8 at 1536; d = 576, n = 1536, 3.8 and 3.7 at 2048; d = 1536, n = 576,
# 8.9 and 5.5 at 2048. So passes over memory count, and the forms cross at about T = 1.4 n.
CPU = Machine("CPU", 14e9, 150e9, 15e-6, "measured on two cores, float32: benchmarks/run.py layer")
GPUS = (
    Machine("H200", 4.3e12, 400e12, 4e-6, "copy measured on an H200; operations and latency estimated"),
    Machine("H100", 3.0e12, 400e12, 4e-6, "data sheet"),
    Machine("B200", 7.2e12, 800e12, 4e-6, "data sheet"),
    Machine("A100", 1.8e12, 200e12, 4e-6, "data sheet"),
    Machine("4090", 0.9e12, 120e12, 4e-6, "data sheet"),
)
OTHER_GPU = Machine("another GPU", 0.9e12, 100e12, 5e-6, "a guess")
# Outputs that a program of the fused kernel owns when there are few tokens, and tokens that one on a 4-bit W takes.
_FUSED_OUTPUTS = 128
_FUSED_TOKENS_4_BIT = 16


def machine(device: torch.device) -> Machine:
    """The numbers for a device."""
    if device.type != "cuda":
        return CPU
    return _gpu(torch.cuda.get_device_name(device))


@functools.lru_cache(maxsize=16)
def _gpu(name: str) -> Machine:
    return next((known for known in GPUS if known.name in name), OTHER_GPU)


class Problem(NamedTuple):
    """One call of an adapted layer: ``T``, ``d``, ``n``, ``b``, bytes of an activation, whether a backward pass
    follows, and whether the base layer dequantizes its weight in every pass.
    """

    tokens: int
    inputs: int
    outputs: int
    block_size: int
    itemsize: int
    gradient: bool
    quantized: bool = False


def costs(problem: Problem, forms: tuple[str, ...], on: Machine) -> dict[str, float]:
    """Seconds beyond the frozen layer of each of ``forms``."""
    estimate = {INPUT: _input, WEIGHT: _weight, FUSED: _fused}
    return {form: estimate[form](problem, on) for form in forms}


@functools.lru_cache(maxsize=4096)
def cheapest(problem: Problem, forms: tuple[str, ...], on: Machine) -> str:
    """The form of the least cost; the first of ``forms`` where they are equal."""
    found = costs(problem, forms, on)
    return min(forms, key=found.__getitem__)


def _step(on: Machine, moved: float, operations: float, launches: int) -> float:
    return max(moved / on.bandwidth, operations / on.operations) + launches * on.launch


def _input(p: Problem, on: Machine) -> float:
    size, products = p.tokens * p.inputs * p.itemsize, p.tokens * p.inputs * p.block_size
    seconds = _step(on, 2 * size, 2 * products, 1)
    return seconds + _step(on, 3 * size, 4 * products, 2) if p.gradient else seconds


def _weight(p: Problem, on: Machine) -> float:
    size = 0 if p.quantized else p.outputs * p.inputs * p.itemsize
    products, reduced = p.outputs * p.inputs * p.block_size, p.tokens * p.inputs
    launches = 1 if p.quantized else 2
    seconds = _step(on, 2 * size, 2 * products, launches)
    if not p.gradient:
        return seconds
    moved, operations = 2 * size + 2 * reduced * p.itemsize, 2 * products + 2 * reduced * p.block_size
    return seconds + _step(on, moved, operations, launches + 4)  # Δ, ∂Δ, its sum, times R⁻ᵀ, to the generators


def _fused(p: Problem, on: Machine) -> float:
    if not p.quantized:
        tiles = -(-p.outputs // _FUSED_OUTPUTS)
        moved = tiles * p.inputs * p.block_size * p.itemsize
        return _step(on, moved, 2 * tiles * p.tokens * p.inputs * p.block_size, 1)  # the launch adds partial sums up
    weight = p.outputs * p.inputs
    spared = 2 * weight * p.itemsize if p.tokens > 1 else 0  # for one token the base layer has such a kernel itself
    repeated = (-(-p.tokens // _FUSED_TOKENS_4_BIT) - 1) * 2 * weight  # it is bound by unpacking, not by reading
    return _input(p, on) + (repeated - spared) / on.bandwidth
