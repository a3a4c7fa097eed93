"""``accelerate_peft``: PEFT's own OFT layers compute on our operators what they computed before."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.oft import OFTModel
from torch import Tensor, nn

import oftv2
from conftest import OperatorCounter, assert_close, build
from measure import saved_bytes
from oftv2 import AdapterError, PeftRepairWarning, accelerate_peft
from oftv2.__main__ import main
from oftv2.peft_acceleration import accelerate_all_if_asked
from peers import VIEWS, Operators, fill, output, peft_generators, peft_model
from quantized import quantized

D, N, B = 48, 20, 16
LINEAR = {"oft_block_size": B, "target_modules": ["0"]}


def pair(base: nn.Module, std: float = 0.05, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's OFT on a copy of ``base``, and the same accelerated."""
    theirs = peft_model(base, **{**LINEAR, **fields})
    fill(theirs, std=std)
    return theirs, accelerate_peft(copy.deepcopy(theirs))


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(D, N)), dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of a model, and every gradient."""
    own = x.clone().requires_grad_() if x.is_floating_point() else x
    y = output(model(own))
    model.zero_grad()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    (y * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found
    return {**found, "y": y.detach(), **({"x": own.grad} if x.is_floating_point() else {})}


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    mine, expected = step(ours, x), step(theirs, x)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name].dtype == value.dtype, name
        assert mine[name].shape == value.shape, name
        assert_close(name, mine[name], value, tolerance)


# ---------------------------------------------------------------------------------------------- the same results

FIELDS: dict[str, dict[str, Any]] = {
    **{f"t={t}": {"num_cayley_neumann_terms": t} for t in range(2, 9)},
    "exact": {"use_cayley_neumann": False},
    "blocks by number": {"r": 4, "oft_block_size": 0},
    "one block": {"r": 1, "oft_block_size": 0},
    "block_share": {"block_share": True},
    "exact block_share": {"block_share": True, "use_cayley_neumann": False},
    "constrained": {"coft": True, "eps": 0.25},
    "constrained block_share": {"coft": True, "eps": 0.25, "block_share": True},
    "module_dropout, which PEFT ignores": {"module_dropout": 0.5},
    "trained bias": {"bias": "oft_only"},
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(D, N), torch.randn(2, 7, D), {}),
    "embedding": (lambda: nn.Embedding(11, D), torch.tensor([[3, 5, 5], [0, 10, 1]]), {}),
    "conv 1x1": (lambda: nn.Conv2d(D, N, 1, stride=2, padding=1), torch.randn(2, D, 5, 4), {}),
    "conv 3x3": (lambda: nn.Conv2d(6, N, 3, padding=1), torch.randn(2, 6, 5, 4), {"oft_block_size": 18}),
}


class TestSameResults:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
    def test_linear(self, fields: dict[str, Any], training: bool) -> None:
        theirs, ours = pair(linear(torch.float64), **fields)
        x = torch.randn(2, 7, D, dtype=torch.float64)
        for _ in range(2):  # the second call of a constrained adapter sees what the first made of its parameters
            assert_same(ours.train(training), theirs.train(training), x)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name

    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("share", [False, True], ids=["", "block_share"])
    def test_kinds_of_layers(self, name: str, share: bool) -> None:
        make, x, fields = LAYERS[name]
        theirs, ours = pair(build(lambda: nn.Sequential(make()), torch.float64), block_share=share, **fields)
        x = x.double() if x.is_floating_point() else x
        assert_same(ours, theirs, x)
        with torch.no_grad():
            assert ours(x).stride() == theirs(x).stride()

    @pytest.mark.parametrize("tokens", [1, 5, 64, 300])
    def test_linear_in_every_form(self, tokens: int) -> None:
        theirs, ours = pair(linear())
        x = torch.randn(tokens, D)
        with OperatorCounter() as record:
            assert_same(ours, theirs, x, 1e-5)
        assert record.names
        with torch.no_grad():
            assert_close("no gradient", ours(x), theirs(x), 1e-6)

    def test_weight_form_runs_where_it_is_cheaper(self) -> None:
        theirs, ours = pair(build(lambda: nn.Sequential(nn.Linear(256, 32))), oft_block_size=32)
        with OperatorCounter() as record:
            assert_same(ours, theirs, torch.randn(1024, 256), 1e-5)
        assert record.names[:2] == ["cayley_neumann", "weight_form"]

    def test_whole_model(self, tiny_llama: Callable[..., nn.Module]) -> None:
        theirs, ours = pair(tiny_llama().double(), target_modules="all-linear")
        assert_same(ours, theirs, torch.randint(3, 128, (2, 9)))

    @pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
    def test_bitsandbytes(self, kind: str) -> None:
        theirs, ours = pair(nn.Sequential(quantized(kind)))
        assert_same(ours, theirs, torch.randn(3, 16, 128), 1e-5)

    def test_4_bit_weights_rotated_while_dequantized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The forms that a GPU's kernels compute, here by the operators' default implementations."""
        theirs, ours = pair(nn.Sequential(quantized("nf4")))
        monkeypatch.setattr(oftv2.functional, "runs_kernels", lambda device: True)
        x = torch.randn(512, 128)
        with OperatorCounter() as record:
            assert_same(ours, theirs, x, 1e-5)
        assert "weight_form_4bit" in record.names
        with OperatorCounter() as record, torch.no_grad():
            assert_close("no gradient", ours(x[:2]), theirs(x[:2]), 1e-5)
        assert "rotate_matmul_4bit" in record.names

    def test_gradient_checkpointing(self, tiny_llama: Callable[..., nn.Module]) -> None:
        theirs, ours = pair(tiny_llama().double(), target_modules="all-linear", coft=True, eps=0.25)
        for reentrant in (False, True):
            for model in (theirs, ours):
                model.enable_input_require_grads()
                model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert_same(ours, theirs, torch.randint(3, 128, (2, 9)))

    def test_constrained_layer_called_twice_before_the_backward_pass(self) -> None:
        theirs, ours = pair(linear(torch.float64), coft=True, eps=0.25)
        x, grads = torch.randn(7, D, dtype=torch.float64), []
        for model in (theirs, ours):
            (model(x).square().sum() + model(2 * x).sum()).backward()
            grads.append(peft_generators(model)["0"].grad)
        assert_close("generators", *grads[::-1], 1e-12)

    def test_compiled_whole(self) -> None:
        theirs, ours = pair(linear())
        x = torch.randn(5, D)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert_close("y", compiled(x).detach(), theirs(x).detach(), 1e-6)


class TestRounding:
    """In 16 bit our layers are as close to float64 as PEFT's, which take the way through float32."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_16_bit(self, name: str, dtype: torch.dtype) -> None:
        make, x, fields = LAYERS[name]
        theirs, ours = pair(build(lambda: nn.Sequential(make()), dtype), **fields)
        assert peft_generators(ours)["0"].dtype == torch.float32
        x = x.to(dtype) if x.is_floating_point() else x
        truth = step(copy.deepcopy(theirs).double(), x.double() if x.is_floating_point() else x)
        self.assert_no_worse(step(ours, x), step(theirs, x), truth)

    @pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast(self, input_dtype: torch.dtype) -> None:
        theirs, ours = pair(linear())
        x = torch.randn(2, 7, D).to(input_dtype)
        truth = step(copy.deepcopy(theirs).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            self.assert_no_worse(step(ours, x), step(theirs, x), truth)

    def test_generators_in_16_bit(self) -> None:
        base = build(lambda: nn.Sequential(nn.Linear(D, N)), torch.bfloat16)
        theirs = peft.get_peft_model(base, peft.OFTConfig(**LINEAR), autocast_adapter_dtype=False)
        fill(theirs)
        ours = accelerate_peft(copy.deepcopy(theirs))
        x = torch.randn(7, D, dtype=torch.bfloat16)
        truth = step(copy.deepcopy(theirs).double(), x.double())
        self.assert_no_worse(step(ours, x), step(theirs, x), truth)

    @staticmethod
    def assert_no_worse(mine: dict[str, Tensor], expected: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        for name, value in expected.items():
            assert mine[name].dtype == value.dtype, name
            error = torch.linalg.norm(value.double() - truth[name]) / torch.linalg.norm(truth[name])
            assert_close(name, mine[name], truth[name], 1.2 * error.item() + 1e-6)


# ---------------------------------------------------------------------------------------------- all else is PEFT's


class TestAdapters:
    def two(self) -> tuple[nn.Module, nn.Module, Tensor]:
        theirs = peft_model(build(lambda: nn.Sequential(nn.Linear(D, D), nn.Linear(D, N)), torch.float64), **LINEAR)
        ours = accelerate_peft(copy.deepcopy(theirs))
        for model in (theirs, ours):  # after acceleration: on the same layer, and on another
            model.add_adapter("second", peft.OFTConfig(oft_block_size=8, target_modules=["0", "1"], block_share=True))
            generator = torch.Generator().manual_seed(7)
            for name, parameter in model.named_parameters():
                if ".oft_R." in name:
                    parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return theirs, ours, torch.randn(5, D, dtype=torch.float64)

    def test_added_later_run_on_our_operators(self) -> None:
        _, ours, x = self.two()
        ours.set_adapter("second")
        with OperatorCounter() as record:
            ours(x)
        assert record.names.count("cayley_neumann") == 2

    def test_switched_disabled_deleted(self) -> None:
        theirs, ours, x = self.two()
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
        theirs, ours, x = self.two()
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        assert_same(ours, theirs, x)

    def test_both_active_in_16_bit_do_not_round_in_between(self) -> None:
        theirs, ours, x = self.two()
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
        theirs, ours, x = self.two()
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


# ---------------------------------------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------------------------------------- repairs


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
        theirs, _, x = TestAdapters().two()
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


# ---------------------------------------------------------------------------------------------- what it saves


class TestCosts:
    def test_fewer_operators_run(self) -> None:
        theirs, ours = pair(build(lambda: nn.Sequential(nn.Linear(256, 256))), oft_block_size=32)
        x = torch.randn(128, 256, requires_grad=True)
        names = {}
        for name, model in {"frozen": theirs.base_model.model[0].base_layer, "peft": theirs, "ours": ours}.items():
            with Operators() as record:
                model.train()(x).sum().backward()
            names[name] = [operator for operator in record.names if f"aten::{operator}" not in VIEWS]
        assert len(names["peft"]) > len(names["frozen"]) + 30
        assert len(names["ours"]) <= len(names["frozen"]) + 5
        own = [name for name in names["ours"] if name.startswith(("cayley", "rotate"))]
        assert own == ["cayley_neumann", "rotate", "rotate_backward", "cayley_neumann_backward"]

    def test_16_bit_activations_are_kept_once(self) -> None:
        theirs, ours = pair(build(lambda: nn.Sequential(nn.Linear(1024, 64)), torch.bfloat16), oft_block_size=32)
        x = torch.randn(512, 1024, dtype=torch.bfloat16, requires_grad=True)
        kept = {}
        for name, model in {"peft": theirs, "ours": ours}.items():
            with saved_bytes(model.train()) as storages:
                model(x)
            kept[name] = sum(storages.values())
        assert kept["ours"] == 2 * x.numel() + 4 * 1024 * 32  # x as it is, and Δ
        assert kept["peft"] > 2 * kept["ours"]


def test_results_are_never_stale() -> None:
    """R is made anew in every call, as PEFT does: also where a write in evaluation leaves no trace."""
    theirs, ours = pair(linear(torch.float64))
    x = torch.randn(5, D, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert_close("y", ours.eval()(x), theirs.eval()(x), 1e-12)
            for model in (theirs, ours):
                peft_generators(model)["0"].data.mul_(2)


# ---------------------------------------------------------------------------------------------- scripts as they are

SCRIPT = """
import json, sys, warnings
FIRST_IMPORT
early = "peft" in sys.modules
import peft, torch
from torch import nn

def model(**fields):
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0", "1"], **fields)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), config)

def kinds(model):
    return sorted({type(module).__module__ for module in model.modules() if "oft" in type(module).__module__})

trained = model(init_weights=False)
trained.save_pretrained(sys.argv[1])
base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
loaded = peft.PeftModel.from_pretrained(base, sys.argv[1], low_cpu_mem_usage=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    left = [kinds(model(num_cayley_neumann_terms=1)) for _ in range(2)]
print(json.dumps({
    "kinds": kinds(trained), "loaded": kinds(loaded), "left": left, "early": early, "argv": sys.argv[1:],
    "warnings": [str(warning.message) for warning in caught], "name": __name__, "path": sys.path[0],
    "y": loaded(torch.ones(3, 8)).shape,
}))
sys.exit(3)
"""
OURS, PEFTS = ["oftv2.peft_layers"], ["peft.tuners.oft.layer", "peft.tuners.oft.model"]
RUN = [sys.executable, "-m", "oftv2", "run"]
WAYS = {
    "variable": ("import oftv2", {"OFTV2_ACCELERATE_PEFT": "1"}, [sys.executable], True),
    "run": ("", {}, RUN, True),
    "run, switched off": ("", {"OFTV2_ACCELERATE_PEFT": "0"}, RUN, False),
}


@pytest.mark.parametrize(("first", "variables", "command", "faster"), WAYS.values(), ids=WAYS.keys())
def test_script_runs_as_it_stands(
    first: str, variables: dict[str, str], command: list[str], faster: bool, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT.replace("FIRST_IMPORT", first))
    environment = {name: value for name, value in os.environ.items() if name != "OFTV2_ACCELERATE_PEFT"}
    result = subprocess.run(
        [*command, "scripts/train.py", "adapter", "--lr", "1"],
        env={**environment, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["argv"] == ["adapter", "--lr", "1"]
    assert found["name"] == "__main__"
    assert Path(found["path"]).resolve() == (tmp_path / "scripts").resolve()
    assert found["y"] == [3, 2]
    assert not found["early"]  # nobody but the script imports peft
    # the tuner keeps its class here: it is PEFT's method for making layers that is another
    expected = [*OURS, PEFTS[1]] if faster else PEFTS
    assert found["kinds"] == found["loaded"] == expected
    assert found["left"] == [PEFTS, PEFTS]  # a series that is the identity
    about = [text for text in found["warnings"] if "PEFT's own stays" in text]
    assert len(about) == faster
    assert all("0, and all like it: adapter 'default': num_cayley_neumann_terms=1" in text for text in about)


def test_variable_with_peft_imported_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OFTModel, "_create_and_replace", OFTModel._create_and_replace)  # put back afterwards
    for value, module in {"0": "peft.tuners.oft.layer", "1": "oftv2.peft_layers"}.items():
        monkeypatch.setenv("OFTV2_ACCELERATE_PEFT", value)
        accelerate_all_if_asked()
        assert type(peft_model(linear(), **LINEAR).base_model.model[0]).__module__ == module


def test_run_without_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.py"]) == 2
    assert "there is no script nowhere.py" in capsys.readouterr().err
