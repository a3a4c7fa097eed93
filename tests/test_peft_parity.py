"""PEFT as an independent oracle where it is right: equal generators give equal outputs and gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from conftest import randomize
from oftv2 import merge, wrap_model
from peers import (
    PEFT_TERMS,
    assert_equal_training,
    fill,
    our_generators,
    peft_generators,
    peft_model,
    relative,
)


class TestParity:
    @pytest.mark.parametrize(("t", "k"), PEFT_TERMS, ids=lambda value: str(value))
    def test_linear_neumann(self, t: int, k: int) -> None:
        base = nn.Sequential(nn.Linear(48, 20)).double()
        theirs = peft_model(base, oft_block_size=16, target_modules=["0"], num_cayley_neumann_terms=t)
        ours = wrap_model(base, block_size=16, target_modules=["0"], neumann_terms=k)
        fill(theirs)
        randomize(ours)
        assert_equal_training(ours, theirs, torch.randn(2, 7, 48, dtype=torch.float64))

    def test_linear_exact_cayley_of_negated_generators(self) -> None:
        base = nn.Sequential(nn.Linear(48, 20)).double()
        theirs = peft_model(base, oft_block_size=16, target_modules=["0"], use_cayley_neumann=False)
        ours = wrap_model(base, block_size=16, target_modules=["0"], parametrization="cayley")
        fill(theirs, std=0.3, sign=-1)
        randomize(ours, std=0.3)
        assert_equal_training(ours, theirs, torch.randn(7, 48, dtype=torch.float64), sign=-1)

    def test_linear_by_number_of_blocks(self) -> None:
        base = nn.Sequential(nn.Linear(48, 20)).double()
        theirs = peft_model(base, r=4, oft_block_size=0, target_modules=["0"], num_cayley_neumann_terms=6)
        ours = wrap_model(base, num_blocks=4, target_modules=["0"])
        fill(theirs)
        randomize(ours)
        assert ours[0].rotation.block_size == 12
        assert_equal_training(ours, theirs, torch.randn(7, 48, dtype=torch.float64))

    def test_linear_block_share(self) -> None:
        base = nn.Sequential(nn.Linear(48, 20)).double()
        theirs = peft_model(base, oft_block_size=16, target_modules=["0"], block_share=True, num_cayley_neumann_terms=6)
        ours = wrap_model(base, block_size=16, target_modules=["0"], block_share=True)
        fill(theirs)
        randomize(ours)
        assert our_generators(ours)["0"].shape == (1, 120)
        assert_equal_training(ours, theirs, torch.randn(7, 48, dtype=torch.float64))

    def test_constraint_that_binds_no_block(self) -> None:
        base = nn.Sequential(nn.Linear(64, 20)).double()
        theirs = peft_model(
            base, oft_block_size=16, target_modules=["0"], coft=True, eps=8.0, num_cayley_neumann_terms=6
        )
        ours = wrap_model(base, block_size=16, target_modules=["0"], constraint=8.0)
        fill(theirs)
        randomize(ours)
        assert_equal_training(ours, theirs, torch.randn(7, 64, dtype=torch.float64))

    def test_constraint_that_binds(self) -> None:
        """PEFT overwrites p by s·p before it differentiates; ours is also right about how s depends on p.

        With s = limit / ‖p‖ and u = p / ‖p‖ the chain rule makes of PEFT's gradient g: s · (g − u (u·g)).
        """
        base = nn.Sequential(nn.Linear(64, 20)).double()
        # 0.25 / √4 is exact in float32, in which PEFT computes its limit
        fields = {"coft": True, "eps": 0.25, "num_cayley_neumann_terms": 6}
        theirs = peft_model(base, oft_block_size=16, target_modules=["0"], **fields)
        ours = wrap_model(base, block_size=16, target_modules=["0"], constraint=0.25)
        fill(theirs)
        randomize(ours)
        x = torch.randn(7, 64, dtype=torch.float64)
        weights = torch.randn(7, 20, dtype=torch.float64)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(mine), theirs(other)
        (y * weights).sum().backward()
        (z * weights).sum().backward()
        assert relative(y, z) < 1e-12
        assert relative(mine.grad, other.grad) < 1e-12
        p, g = our_generators(ours)["0"], peft_generators(theirs)["0"].grad
        norm = torch.linalg.vector_norm(p.detach(), dim=1, keepdim=True)
        scale, u = 0.125 / math.sqrt(2) / norm, p.detach() / norm
        assert (scale < 1).all()
        assert relative(p.grad, scale * (g - u * (u * g).sum(1, keepdim=True))) < 1e-12

    def test_embedding(self) -> None:
        base = nn.Sequential(nn.Embedding(11, 48)).double()
        theirs = peft_model(base, oft_block_size=16, target_modules=["0"], num_cayley_neumann_terms=6)
        ours = wrap_model(base, block_size=16, target_modules=["0"])
        fill(theirs)
        randomize(ours)
        assert_equal_training(ours, theirs, torch.randint(0, 11, (3, 5)))

    @pytest.mark.parametrize("fields", [{}, {"stride": 2, "padding": 1}], ids=["plain", "stride-padding"])
    def test_conv2d_with_1x1_kernels(self, fields: dict[str, int]) -> None:
        base = nn.Sequential(nn.Conv2d(12, 5, 1, **fields)).double()
        theirs = peft_model(base, oft_block_size=6, target_modules=["0"], num_cayley_neumann_terms=6)
        ours = wrap_model(base, block_size=6, target_modules=["0"])
        fill(theirs)
        randomize(ours)
        assert_equal_training(ours, theirs, torch.randn(2, 12, 5, 4, dtype=torch.float64))

    def test_whole_llama(self, tiny_llama: Callable[..., nn.Module]) -> None:
        base = tiny_llama().double()
        theirs = peft_model(base, oft_block_size=16, target_modules="all-linear", num_cayley_neumann_terms=6)
        ours = wrap_model(base, block_size=16)
        fill(theirs)
        randomize(ours)
        assert len(our_generators(ours)) == 2 * 7
        assert_equal_training(ours, theirs, torch.randint(3, 128, (2, 9)))

    def test_merged_llama(self, tiny_llama: Callable[..., nn.Module]) -> None:
        base = tiny_llama().double()
        theirs = peft_model(base, oft_block_size=16, target_modules="all-linear", num_cayley_neumann_terms=6)
        ours = wrap_model(base, block_size=16)
        fill(theirs)
        randomize(ours)
        plain, other = merge(ours), theirs.merge_and_unload()
        expected = other.state_dict()
        assert plain.state_dict().keys() == expected.keys()
        for name, value in plain.state_dict().items():
            assert relative(value, expected[name]) < 1e-12, name


# ------------------------------------------------------------------------------------- where PEFT is wrong or weak
