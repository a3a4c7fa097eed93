"""``accelerate_peft``: adapters, files, copies and reports are PEFT's own, there and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from accelerated_pairs import LINEAR, D, N, assert_same, linear, pair, pair_of_two_adapters
from conftest import OperatorCounter, assert_close, build
from oftv2 import PeftRepairWarning, accelerate_peft
from peers import peft_generators


class TestAdapters:
    def test_added_later_run_on_our_operators(self) -> None:
        _, ours, x = pair_of_two_adapters()
        ours.set_adapter("second")
        with OperatorCounter() as record:
            ours(x)
        assert record.names.count("cayley_neumann") == 2

    def test_switched_disabled_deleted(self) -> None:
        theirs, ours, x = pair_of_two_adapters()
        for name in ("default", "second"):
            for model in (theirs, ours):
                model.set_adapter(name)
            assert_same(ours, theirs, x)
        with theirs.disable_adapter(), ours.disable_adapter():
            assert torch.equal(ours(x), theirs(x))
        for model in (theirs, ours):
            model.delete_adapter("default")
            model.set_adapter("second")
        assert_same(ours, theirs, x)

    @pytest.mark.parametrize("names", [["default", "second"], ["second", "default"]], ids="-".join)
    def test_both_active(self, names: list[str]) -> None:
        theirs, ours, x = pair_of_two_adapters()
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        assert_same(ours, theirs, x)

    def test_both_active_in_16_bit_do_not_round_in_between(self) -> None:
        theirs, ours, x = pair_of_two_adapters()
        for model in (theirs, ours):
            model.to(torch.bfloat16)
            model.base_model.set_adapter(["default", "second"])
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.float() if "oft_" in name else parameter.data
        with torch.no_grad():
            seen = [list[Tensor](), list[Tensor]()]
            for model, inputs in zip((theirs, ours), seen, strict=True):
                layer = model.base_model.model[0]
                layer.oft_R["second"].register_forward_hook(lambda _, args, y, inputs=inputs: inputs.append(args[0]))
                model(x.bfloat16())
        assert seen[0][0].dtype == seen[1][0].dtype == torch.float32
        assert_close("between", seen[1][0], seen[0][0], 1e-6)

    def test_merged_and_unloaded(self) -> None:
        theirs, ours, x = pair_of_two_adapters()
        for model in (theirs, ours):
            model.merge_adapter(["default", "second"])
        assert torch.equal(ours(x), theirs(x))
        for model in (theirs, ours):
            model.unmerge_adapter()
        assert torch.equal(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))

    def test_beside_lora_in_a_mixed_model(self) -> None:
        base = build(lambda: nn.Sequential(nn.Linear(D, N)), torch.float64)
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            mixed = peft.PeftMixedModel(copy.deepcopy(base), peft.OFTConfig(**LINEAR), "turn")
            mixed.add_adapter("low", peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
            mixed.set_adapter(["turn", "low"])
            for name, parameter in mixed.named_parameters():
                if ".oft_R." in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            models.append(mixed)
        assert_same(accelerate_peft(models[1]), models[0], torch.randn(5, D, dtype=torch.float64))

    def test_injected_without_a_peft_model(self) -> None:
        theirs = peft.inject_adapter_in_model(peft.OFTConfig(init_weights=False, **LINEAR), linear(torch.float64))
        ours = accelerate_peft(copy.deepcopy(theirs))
        assert_same(ours, theirs, torch.randn(5, D, dtype=torch.float64))


class TestFilesAndCopies:
    def test_files_are_equal_byte_for_byte(self, tmp_path: Path) -> None:
        theirs, ours = pair(linear())
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
        assert "adapter_model.safetensors" in names
        assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
        for name in names:
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
        ours.load_adapter(tmp_path / "theirs", "again")
        ours.set_adapter("again")
        x = torch.randn(5, D)
        assert_close("loaded", ours(x).detach(), theirs(x).detach(), 1e-6)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
    )
    def test_copies_stay_accelerated_and_apart(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        theirs, ours = pair(linear(torch.float64))
        other = copied(ours)
        peft_generators(ours)["0"].data.zero_()
        with OperatorCounter() as record:
            assert_same(other, theirs, torch.randn(5, D, dtype=torch.float64))
        assert "cayley_neumann" in record.names

    def test_reports_of_peft_are_the_same(self) -> None:
        theirs, ours = pair(linear())
        assert ours.get_layer_status() == theirs.get_layer_status()
        assert ours.get_model_status() == theirs.get_model_status()
        assert repr(ours) == repr(theirs)


class TestThereAndBack:
    def test_undone_is_as_before(self) -> None:
        theirs, ours = pair(nn.Sequential(nn.Linear(D, N)))
        with pytest.warns(PeftRepairWarning):
            assert accelerate_peft(ours, repair=True) is ours
        assert accelerate_peft(ours, enabled=False) is ours
        for (name, mine), (_, expected) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
            assert type(mine) is type(expected), name
            assert mine.__dict__.keys() == expected.__dict__.keys(), name
        x = torch.randn(5, D)
        with OperatorCounter() as record:
            assert torch.equal(ours(x), theirs(x))
        assert record.names == []
        assert accelerate_peft(ours, enabled=False) is ours
        with OperatorCounter() as record:
            accelerate_peft(accelerate_peft(ours))(x)
        assert record.names

    def test_other_models_are_left_alone(self) -> None:
        theirs, _ = pair(linear())
        with OperatorCounter() as record:
            theirs(torch.randn(5, D))
        assert record.names == []
