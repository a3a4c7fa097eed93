"""``accelerate_peft``: what it refuses, and leaves as it was."""

from __future__ import annotations

import sys
from typing import Any

import peft
import pytest
import torch
from torch import nn

import oftv2
from accelerated_pairs import LINEAR, B, D, N, linear, pair
from conftest import assert_close
from oftv2 import AdapterError, accelerate_peft
from peers import peft_model


class TestRefused:
    def refused(self, model: nn.Module, match: str, **options: Any) -> None:
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(AdapterError, match=match):
            accelerate_peft(model, **options)
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_no_layers_of_pefts(self) -> None:
        self.refused(linear(), "holds no OFT layers of PEFT's")
        self.refused(oftv2.wrap_model(linear(), target_modules=["0"], block_size=B), "holds no OFT layers of PEFT's")

    def test_identity_series(self) -> None:
        base = nn.Sequential(nn.Linear(D, D), nn.Linear(D, N))
        model = peft_model(base, oft_block_size=B, target_modules=["0"])
        model.add_adapter("still", peft.OFTConfig(oft_block_size=B, target_modules=["1"], num_cayley_neumann_terms=1))
        self.refused(model, r"base_model\.model\.1: adapter 'still': num_cayley_neumann_terms=1")

    def test_blocks_of_one(self) -> None:
        model = peft_model(nn.Sequential(nn.Linear(7, 3)), oft_block_size=2, target_modules=["0"])
        self.refused(model, "a block size of 1 rotates nothing")

    @pytest.mark.parametrize("where", ["", ".oft_R.default"], ids=["layer", "rotation"])
    def test_replaced_forward(self, where: str) -> None:
        model, _ = pair(linear())
        module = model.get_submodule("base_model.model.0" + where)
        module.forward = module.forward
        self.refused(model, "forward of its .* was replaced on the instance")

    def test_foreign_rotation(self) -> None:
        model, _ = pair(linear())
        held = model.base_model.model[0].oft_R
        held["default"] = nn.Sequential(held["default"])
        self.refused(model, "its rotation is a Sequential")

    def test_unknown_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from oftv2 import peft_layers

        model, _ = pair(linear())
        peft_layers._agrees_with_peft.cache_clear()
        with monkeypatch.context() as patch:
            original = peft_layers.OFTRotationModule._cayley_batch
            patch.setattr(peft_layers.OFTRotationModule, "_cayley_batch", lambda *a: original(*a) ** 2)
            self.refused(model, "this PEFT computes another rotation")
        peft_layers._agrees_with_peft.cache_clear()
        assert accelerate_peft(model) is model

    def test_peft_without_what_is_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs, ours = pair(linear())
        monkeypatch.delattr(oftv2, "peft_layers")
        monkeypatch.setitem(sys.modules, "oftv2.peft_layers", None)
        self.refused(theirs, "written with PEFT 0.19 to 0.21")
        with pytest.warns(UserWarning, match=r"PEFT's own stays.*written with PEFT 0.19 to 0.21"):
            ours.add_adapter("second", peft.OFTConfig(**LINEAR))

    def test_repair_of_what_cannot_be(self) -> None:
        grouped = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2))
        model = peft_model(grouped, oft_block_size=6, target_modules=["0"])
        self.refused(model, "repair=True rotates its kernels", repair=True)
        self.refused(model, "repair=True goes with enabled=True", repair=True, enabled=False)

    def test_adapter_added_later_is_left_to_peft(self) -> None:
        theirs, ours = pair(linear(torch.float64))
        still = peft.OFTConfig(num_cayley_neumann_terms=1, **LINEAR)
        with pytest.warns(UserWarning, match=r"PEFT's own stays: 0, and all like it: .*num_cayley_neumann_terms=1"):
            ours.add_adapter("still", still)
        theirs.add_adapter("still", still)
        for model in (theirs, ours):
            model.base_model.set_adapter(["default", "still"])
        x = torch.randn(5, D, dtype=torch.float64)
        assert_close("y", ours(x).detach(), theirs(x).detach(), 1e-12)

    def test_images_in_linear_layers_crash_as_in_peft(self) -> None:
        for model in pair(linear()):
            with pytest.raises((RuntimeError, ValueError)):
                model(torch.randn(2, 3, 4, D))
