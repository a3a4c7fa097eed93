"""Bytes and FLOPs of each kernel, of the frozen layer and of LoRA, and the time below which no GPU of a kind can go.

The bound is the larger of bytes over memory bandwidth and FLOPs over the dense bfloat16 rate: each byte moves once, and
nothing else takes time (no launches, no caches). Symbols: T tokens, d = in_features, n = out_features, b block size,
r = d/b blocks, in 16 bit (s = 2 bytes an element); Δ = R − I and the generators are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ELEMENT = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Machine:
    """A GPU's memory bandwidth, and its dense bfloat16 rate with float32 accumulation (data sheets)."""

    name: str
    bytes_per_second: float
    flops_per_second: float


H200 = Machine("H200", 4.8e12, 989e12)
A100 = Machine("A100", 2.039e12, 312e12)  # 80 GB SXM
RTX_4090 = Machine("RTX 4090", 1.008e12, 165e12)
MACHINES = (H200, A100, RTX_4090)


@dataclass(frozen=True)
class Cost:
    """What one kernel reads and writes, and computes."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        """One kernel that does both; kernels that run one after the other are a list."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def microseconds(self, machine: Machine) -> float:
        return 1e6 * max(self.bytes / machine.bytes_per_second, self.flops / machine.flops_per_second)


def microseconds(kernels: list[Cost], machine: Machine) -> float:
    """The bound of kernels that run one after the other."""
    return sum(kernel.microseconds(machine) for kernel in kernels)


# -------------------------------------------------------------------------------------------------- the frozen layer


def matmul(tokens: int, d: int, n: int) -> Cost:
    """y = x Wᵀ, and ĝ = g W, which moves and computes as much: s(Td + nd + Tn) bytes, 2Tnd FLOPs."""
    return Cost(ELEMENT * (tokens * d + n * d + tokens * n), 2 * tokens * n * d)


def nf4_bytes(d: int, n: int) -> int:
    """A 4-bit weight with double quantization: nd/2 codes, a byte per 64 of them, 4 bytes per 64 · 256, two tables."""
    return n * d // 2 + n * d // 64 + 4 * math.ceil(n * d / (64 * 256)) + 4 * (256 + 16)


def nf4_dequantize(d: int, n: int) -> Cost:
    """4-bit W to 16 bit: reads the codes, writes s·nd; a product for each weight."""
    return Cost(nf4_bytes(d, n) + ELEMENT * n * d, n * d)


def nf4_matmul(tokens: int, d: int, n: int) -> Cost:
    """y = x Wᵀ from the 4-bit W, which is never written out: the codes + s(Td + Tn) bytes, 2Tnd FLOPs."""
    return Cost(nf4_bytes(d, n) + ELEMENT * (tokens * d + tokens * n), 2 * tokens * n * d)


# --------------------------------------------------------------------------------------------------- the input form


def delta_bytes(d: int, b: int) -> int:
    """Δ in float32: 4·r·b² = 4db."""
    return 4 * d * b


def rotate_forward(tokens: int, d: int, b: int, group: int = 1) -> Cost:
    """x̂_g = x + xΔ_g: reads x once and each Δ_g, writes each x̂_g: s·Td(1 + G) + 4db·G bytes, 2Tdb·G FLOPs."""
    return Cost(ELEMENT * tokens * d * (1 + group) + group * delta_bytes(d, b), 2 * tokens * d * b * group)


def shares(d: int, b: int, multiprocessors: int = 132) -> int:
    """Shares the tokens are cut into, so that r blocks give four programs a multiprocessor: ⌈4 · 132 / r⌉."""
    return math.ceil(4 * multiprocessors * b / d)


def rotate_backward(tokens: int, d: int, b: int, group: int = 1, splits: int | None = None) -> Cost:
    """∂x = Σ(ĝ_g + ĝ_gΔ_gᵀ) and ∂Δ_g = xᵀĝ_g: reads x, each ĝ_g and Δ_g; writes ∂x and S float32 partial sums of
    each ∂Δ_g (the Cayley transform's backward reads them): s·Td(2 + G) + (4db + 4db·S)G bytes, 4Tdb·G FLOPs."""
    partials = delta_bytes(d, b) * (shares(d, b) if splits is None else splits)
    activations = ELEMENT * tokens * d * (2 + group)
    return Cost(activations + group * (delta_bytes(d, b) + partials), 4 * tokens * d * b * group)


def rotate_matmul(tokens: int, d: int, n: int, b: int, tile: int = 256) -> Cost:
    """y = (x + xΔ)Wᵀ without x̂ in memory: the bytes of the product and Δ. Every tile of ``tile`` columns of y rotates
    x again, which takes 2Tdb·⌈n/tile⌉ FLOPs where a kernel of its own takes 2Tdb."""
    rotation = Cost(delta_bytes(d, b), 2 * tokens * d * b * math.ceil(n / tile))
    return matmul(tokens, d, n) + rotation


def nf4_rotate_matmul(tokens: int, d: int, n: int, b: int) -> Cost:
    """The same from a 4-bit W, for few tokens, each rotated once: the bytes of the product and Δ, 2Tdb FLOPs more."""
    return nf4_matmul(tokens, d, n) + Cost(delta_bytes(d, b), 2 * tokens * d * b)


# -------------------------------------------------------------------------------------------------- the weight form


def weight_forward(d: int, n: int, b: int) -> Cost:
    """W′ = W + WΔᵀ: reads W and Δ, writes W′: 2s·nd + 4db bytes, 2ndb FLOPs."""
    return Cost(2 * ELEMENT * n * d + delta_bytes(d, b), 2 * n * d * b)


def weight_delta_grad(tokens: int, d: int, b: int, splits: int | None = None) -> Cost:
    """∂Δ from x and ∂x: 2s·Td bytes and S float32 partial sums, 2Tdb FLOPs (R⁻ᵀ on r blocks is next to nothing)."""
    partials = delta_bytes(d, b) * (shares(d, b) if splits is None else splits)
    return Cost(2 * ELEMENT * tokens * d + partials, 2 * tokens * d * b)


def nf4_dequantize_rotate(d: int, n: int, b: int) -> Cost:
    """W′ from a 4-bit W: the dequantization and Δ, 2ndb FLOPs more."""
    return nf4_dequantize(d, n) + Cost(delta_bytes(d, b), 2 * n * d * b)


# ---------------------------------------------------------------------------------------------------- the generators


def cayley_forward(d: int, b: int, terms: int = 4) -> Cost:
    """Δ of r blocks: reads 4·r·b(b−1)/2 bytes of generators, writes Δ; ⌊k/2⌋ + 1 products of 2b³ FLOPs a block.

    (In float32 to float32's accuracy, which takes three bfloat16 products' time or more; the launch outweighs it.)"""
    blocks = d // b
    return Cost(2 * blocks * b * (b - 1) + delta_bytes(d, b), blocks * (terms // 2 + 1) * 2 * b**3)


def cayley_backward(d: int, b: int, terms: int = 4, splits: int | None = None) -> Cost:
    """∂generators: reads the S partial sums of ∂Δ and the generators, writes as many gradients; a product a term."""
    blocks = d // b
    partials = delta_bytes(d, b) * (shares(d, b) if splits is None else splits)
    return Cost(partials + 4 * blocks * b * (b - 1), blocks * terms * 2 * b**3)


# --------------------------------------------------------------------------------------------------------------- LoRA


def lora_forward(tokens: int, d: int, n: int, rank: int = 16) -> list[Cost]:
    """y += (xAᵀ)Bᵀ: reads x and A, writes T×r; reads it and B, writes T×n; the addition reads that and writes y. (That
    it reads y too is left out, in LoRA's favour.)"""
    down = Cost(ELEMENT * (tokens * d + rank * d + tokens * rank), 2 * tokens * d * rank)
    up = Cost(ELEMENT * (tokens * rank + n * rank + tokens * n), 2 * tokens * n * rank)
    return [down, up, Cost(2 * ELEMENT * tokens * n, tokens * n)]


def lora_backward(tokens: int, d: int, n: int, rank: int = 16) -> list[Cost]:
    """∂B = gᵀ(xAᵀ), h = gB, ∂A = hᵀx and ∂x += hA: reads g twice, x once and T×r three times, writes h; the last
    product writes T×d, and the addition reads that and writes ∂x, counted as in the forward pass."""
    up = ELEMENT * (tokens * n + tokens * rank + n * rank)
    down = ELEMENT * (tokens * d + tokens * rank + d * rank)
    return [
        Cost(up, 2 * tokens * n * rank),
        Cost(up, 2 * tokens * n * rank),
        Cost(down, 2 * tokens * d * rank),
        Cost(down, 2 * tokens * d * rank),
        Cost(2 * ELEMENT * tokens * d, tokens * d),
    ]
