"""What a layer costs beside PEFT's OFT: operators, memory kept, the drift of merging."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oftv2
from conftest import randomize
from measure import saved_bytes
from oftv2 import merge, unmerge, wrap_model
from peers import (
    Operators,
    data_operators,
    fill,
    largest_allocation,
    linear_pair,
    our_generators,
    peft_model,
    relative,
)


def test_rotation_is_cached_in_evaluation() -> None:
    ours, theirs = linear_pair(d=256, n=256, b=32)
    randomize(ours)
    fill(theirs)
    x = torch.randn(128, 256)
    counts = {}
    for name, model in {"frozen": ours[0].base_layer, "peft": theirs, "ours": ours}.items():
        model.eval()
        with torch.no_grad():
            model(x)
            counts[name] = data_operators(lambda model=model: model(x))
    assert counts["peft"].count("aten::bmm") >= 4  # the products of the Neumann series, and the rotation
    assert len(counts["peft"]) > 15
    # beyond the frozen layer's own: x + x Δ, one product (counted below), and copies for its strides
    assert "aten::bmm" not in counts["ours"]
    assert len(counts["ours"]) <= len(counts["frozen"]) + 5

    with torch.no_grad(), Operators() as cached:
        before = ours(x)
    assert [name for name in cached.names if name in ("cayley_neumann", "baddbmm")] == ["baddbmm"]
    with torch.no_grad():
        our_generators(ours)["0"].mul_(2)
        with Operators() as rebuilt:
            after = ours(x)
    assert rebuilt.names.count("cayley_neumann") == 1  # changed generators are noticed
    assert not torch.allclose(before, after)


def test_training_dispatches_four_operators_per_layer() -> None:
    """One to build R and one to rotate, and one backward of each: what a fused backend has to launch."""
    ours, _ = linear_pair(d=256, n=256, b=32)
    randomize(ours)
    x = torch.randn(16, 256, requires_grad=True)
    with Operators() as record:
        ours.train()(x).sum().backward()
    own = [name for name in record.names if name.startswith(("cayley", "rotate"))]
    assert own == ["cayley_neumann", "rotate", "rotate_backward", "cayley_neumann_backward"]


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def test_bf16_activations_are_kept_once() -> None:
    """At T = 512, d = 1024: 7.5 MiB in PEFT, 1 MiB for x and 0.375 MiB for three Δ here."""
    base, (T, d, b) = Attention(1024).bfloat16(), (512, 1024, 32)
    x = torch.randn(1, T, d, dtype=torch.bfloat16, requires_grad=True)
    theirs = peft_model(base, oft_block_size=b, target_modules=["q", "k", "v"]).train()
    with saved_bytes(theirs) as kept:
        theirs(x)
    assert sum(kept.values()) == 7.5 * 2**20

    ours = wrap_model(base, target_modules=["q", "k", "v"], block_size=b).train()
    with saved_bytes(ours) as kept:
        ours(x)
    activations, deltas = 2 * T * d, 3 * 4 * d * b
    assert kept[x.untyped_storage().data_ptr()] == activations  # x itself, in the dtype it arrived in, once
    assert sum(kept.values()) == activations + deltas


def test_merge_builds_no_square_matrix() -> None:
    d, n, b = 2048, 8, 32
    ours, theirs = linear_pair(d=d, n=n, b=b)
    randomize(ours)
    fill(theirs)
    assert largest_allocation(theirs.merge_adapter) >= 4 * d * d
    assert largest_allocation(theirs.unmerge_adapter) >= 4 * d * d
    # the largest things needed: the blocks (d · b, also in float64 for their inverse) and the weight (n · d)
    assert largest_allocation(lambda: merge(ours, unload=False)) <= 8 * d * b
    assert largest_allocation(lambda: unmerge(ours)) <= 8 * d * b


def round_trip_drifts(std: float, dtype: torch.dtype, **fields: Any) -> tuple[float, float]:
    """How far ten merges and unmerges take a weight: ours, PEFT's."""
    base = nn.Linear(128, 64, bias=False).to(dtype)
    theirs = peft_model(nn.Sequential(base), oft_block_size=32, target_modules=["0"])
    fill(theirs, std=std)
    original = base.weight.detach().clone()
    ours = wrap_model(nn.Sequential(base), target_modules=["0"])
    randomize(ours, std=std)
    for _ in range(10):
        merge(ours, unload=False, **fields)
        unmerge(ours)
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    return relative(ours[0].weight, original), relative(theirs.base_model.model[0].base_layer.weight, original)


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1])
def test_round_trips_in_float32_do_not_drift(std: float) -> None:
    """Twenty roundings of the weight (2⁻²⁴ relative, √20 of them) are 3e-7 at most."""
    ours, theirs = round_trip_drifts(std, torch.float32)
    assert ours < theirs
    assert ours < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_round_trips_with_kept_originals_are_exact(dtype: torch.dtype) -> None:
    ours, theirs = round_trip_drifts(0.05, dtype, keep_original=True)
    assert ours == 0.0
    assert theirs > (1e-7 if dtype is torch.float32 else 1e-4)


def test_merging_into_4_bit_and_back_is_exact() -> None:
    from bitsandbytes.nn import Linear4bit

    plain = nn.Linear(128, 96, bias=False)
    layer = Linear4bit(128, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    base = nn.Sequential(layer.to("cpu")).train()
    x = torch.randn(16, 128)
    expected = base(x).detach()

    theirs = peft_model(base, oft_block_size=32, target_modules=["0"])
    fill(theirs)
    errors = []
    for _ in range(5):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        with theirs.disable_adapter():
            errors.append(relative(theirs(x).detach(), expected))
    assert errors[0] > 0.05
    assert errors[4] > 1.5 * errors[0]

    ours = wrap_model(base, target_modules=["0"])
    randomize(ours)
    data, absmax = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    for requantize in (False, True) * 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oftv2.RequantizationWarning)
            merge(ours, unload=False, requantize=requantize)
        unmerge(ours)
    assert torch.equal(ours[0].base_layer.weight.data, data)
    assert torch.equal(ours[0].base_layer.weight.quant_state.absmax, absmax)
    with oftv2.disable_adapter(ours):
        assert torch.equal(ours(x), expected)
