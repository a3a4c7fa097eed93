"""``accelerate_peft(repair=True)``: what PEFT's OFT computes otherwise than it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from accelerated_pairs import LINEAR, D, N, linear, pair, pair_of_two_adapters, step
from conftest import assert_close, build
from oftv2 import PeftRepairWarning, accelerate_peft
from peers import fill, peft_model


def repaired(model: nn.Module) -> nn.Module:
    with pytest.warns(PeftRepairWarning, match="differs from PEFT on purpose"):
        return accelerate_peft(copy.deepcopy(model), repair=True)


class TestRepairs:
    def test_dropout_is_applied(self) -> None:
        theirs, _ = pair(linear(), oft_block_size=4, module_dropout=0.25)
        ours, rotation = repaired(theirs).train(), "base_model.model.0.oft_R.default"
        identity = [(ours.get_submodule(rotation).delta() == 0).flatten(1).all(1) for _ in range(20)]
        assert {blocks.sum().item() for blocks in identity} == {3}  # a quarter of twelve
        assert len({tuple(blocks.tolist()) for blocks in identity}) > 1
        x = torch.randn(5, D)
        assert not torch.equal(ours(x), ours(x))
        assert_close("eval", ours.eval()(x).detach(), theirs.eval()(x).detach(), 1e-6)

    def test_adapters_are_merged_in_the_order_of_the_forward_pass(self) -> None:
        theirs, _, x = pair_of_two_adapters()
        ours = repaired(theirs)
        for model in (theirs, ours):
            model.base_model.set_adapter(["default", "second"])
        expected = theirs(x).detach()
        theirs.merge_adapter()
        ours.merge_adapter()
        assert torch.linalg.norm(theirs(x) - expected) > 0.01 * torch.linalg.norm(expected)
        assert_close("merged", ours(x).detach(), expected, 1e-12)
        ours.unmerge_adapter()
        assert_close("unmerged", ours(x).detach(), expected, 1e-6)

    @pytest.mark.parametrize(
        "fields", [{}, {"stride": 2, "padding": 1, "padding_mode": "circular"}], ids=["", "strided"]
    )
    def test_convolutions_compute_what_they_are_merged_to(self, fields: dict[str, Any]) -> None:
        base = build(lambda: nn.Sequential(nn.Conv2d(6, N, 3, **fields)), torch.float64)
        theirs = peft_model(base, oft_block_size=18, target_modules=["0"])
        fill(theirs)
        ours, x = repaired(theirs).train(), torch.randn(2, 6, 7, 8, dtype=torch.float64)
        found = step(ours, x)
        assert all(value.any() for value in found.values())
        wrong = theirs(x)
        merged = theirs.merge_and_unload()(x).detach()
        assert_close("y", found["y"], merged, 1e-12)
        assert torch.linalg.norm(wrong - merged) > 0.5 * torch.linalg.norm(merged)

    @pytest.mark.parametrize(
        "make", [lambda: nn.Linear(D, N), lambda: nn.Embedding(11, D)], ids=["linear", "embedding"]
    )
    def test_four_dimensions(self, make: Callable[[], nn.Module]) -> None:
        theirs, _ = pair(build(lambda: nn.Sequential(make()), torch.float64))
        embedding = isinstance(make(), nn.Embedding)
        x = torch.randint(0, 11, (2, 3, 4)) if embedding else torch.randn(2, 3, 4, D, dtype=torch.float64)
        expected = theirs(x.flatten(0, 1)).detach()
        assert_close("y", repaired(theirs)(x).flatten(0, 1).detach(), expected, 1e-12)

    def test_repairs_reach_adapters_added_later(self) -> None:
        ours = repaired(pair(linear())[0])
        ours.add_adapter("second", peft.OFTConfig(module_dropout=0.5, **LINEAR))
        layer = ours.base_model.model[0]
        assert layer.repairs
        assert layer.oft_R["second"].dropout == 0.5
        assert not accelerate_peft(ours).base_model.model[0].repairs
