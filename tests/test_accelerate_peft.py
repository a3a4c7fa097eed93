"""``accelerate_peft``: PEFT's own OFT layers compute on our operators what they computed before, in fewer of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import oftv2
from accelerated_pairs import LINEAR, D, N, assert_same, linear, pair, step
from conftest import OperatorCounter, assert_close, build
from measure import saved_bytes
from oftv2 import accelerate_peft
from peers import VIEWS, Operators, fill, peft_generators
from quantized import quantized

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
