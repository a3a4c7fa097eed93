"""PEFT's OFT beside ours, and what operators and memory a call takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import oftv2
from oftv2 import wrap_model

PEFT_SUFFIXES = (".oft_R.default.weight", ".oft_embedding_R.default.weight")
# PEFT counts t terms where k is the last power of the series: I + 2Q + … + 2Q^(t−2) + Q^(t−1) is k = t − 2 from t = 5
# on, and t = 3 and t = 4 are both k = 2.
PEFT_TERMS = [(3, 2), (4, 2), (5, 3), (6, 4), (8, 6)]


def peft_model(base: nn.Module, **fields: Any) -> nn.Module:
    """PEFT's OFT on a copy of ``base``, in the base's mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(**fields))
    return model.train(base.training)


def from_peft(base: nn.Module, folder: Path | str) -> nn.Module:
    """PEFT's model, loaded without a warning of any kind, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers', about what PEFT calls there
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # where PEFT has to adjust it
        return peft.PeftModel.from_pretrained(base, folder).eval()


def peft_generators(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's generators by the path of their layer in the plain model."""
    return {
        name.removeprefix("base_model.model.").removesuffix(suffix): parameter
        for name, parameter in model.named_parameters()
        for suffix in PEFT_SUFFIXES
        if name.endswith(suffix)
    }


def our_generators(model: nn.Module) -> dict[str, nn.Parameter]:
    """This library's generators by the path of their layer in the plain model."""
    suffix = ".generators.default"
    return {name.removesuffix(suffix): value for name, value in model.named_parameters() if name.endswith(suffix)}


def fill(model: nn.Module, std: float = 0.05, sign: int = 1) -> None:
    """Gives PEFT's generators the numbers that ``randomize`` gives ours, times ``sign``."""
    generator = torch.Generator().manual_seed(3)
    for parameter in peft_generators(model).values():
        parameter.data.copy_(sign * torch.randn(parameter.shape, generator=generator) * std)


def relative(actual: Tensor, expected: Tensor) -> float:
    return (torch.linalg.norm((actual - expected).double()) / torch.linalg.norm(expected.double())).item()


def output(result: Any) -> Tensor:
    return result.logits if hasattr(result, "logits") else result


def assert_equal_training(ours: nn.Module, theirs: nn.Module, x: Tensor, *, sign: int = 1) -> None:
    """Outputs, input gradient and every generator's gradient agree; ``sign`` relates PEFT's generators to ours."""
    outputs, inputs = [], []
    for model in (ours, theirs):
        own = x.clone().requires_grad_() if x.is_floating_point() else x
        y = output(model(own))
        (y * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))).sum().backward()
        outputs.append(y.detach())
        inputs.append(own.grad)
    assert relative(*outputs) < 1e-12
    if x.is_floating_point():
        assert relative(*inputs) < 1e-12
    mine, other = our_generators(ours), peft_generators(theirs)
    assert mine.keys() == other.keys()
    assert mine
    for name, parameter in mine.items():
        assert relative(parameter.grad, sign * other[name].grad) < 1e-12, name


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().split("::")[-1].split(".")[0])
        return func(*args, **(kwargs or {}))


# Operators that move no data.
VIEWS = {
    f"aten::{name}"
    for name in [
        "view",
        "reshape",
        "transpose",
        "t",
        "expand",
        "expand_as",
        "permute",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "slice",
        "select",
        "alias",
        "_unsafe_view",
        "detach",
        "_reshape_alias",
        "unfold",
        "flatten",
        "diagonal",
        "to",
        "empty",
        "empty_like",
        "empty_strided",
        "resize_",
        "resolve_conj",
        "resolve_neg",
    ]
}


def data_operators(function: Callable[[], Any]) -> list[str]:
    """The innermost ATen operators that read or write data, also those within this library's own operators."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    aten = [event for event in record.events() if event.name.startswith("aten::") and event.name not in VIEWS]
    inner = {id(event) for event in aten}
    return [event.name for event in aten if not any(id(child) in inner for child in event.cpu_children)]


def largest_allocation(function: Callable[[], Any]) -> int:
    """Bytes of the largest single allocation, within operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def linear_pair(d: int = 64, n: int = 24, b: int = 16, **ours: Any) -> tuple[nn.Module, nn.Module]:
    """This library's adapter and PEFT's default one on the same linear layer, in a model of it alone."""
    base = nn.Sequential(nn.Linear(d, n))
    theirs = peft_model(base, oft_block_size=b, target_modules=["0"])
    return wrap_model(base, target_modules=["0"], **{"block_size": b, **ours}), theirs


def peft_rotation(model: nn.Module, exact: bool = False) -> Tensor:
    """PEFT's blocks R of the one layer of a model."""
    module = model.base_model.model[0].oft_R["default"]
    terms = module.num_cayley_neumann_terms
    return module._cayley_batch(module.weight.detach(), module.block_size, not exact, terms)


def our_rotation(layer: oftv2.OFTLayer) -> Tensor:
    delta = layer.rotation.delta(layer.generators["default"].detach())
    return delta + torch.eye(delta.shape[-1], dtype=delta.dtype)


def orthogonality_error(R: Tensor) -> float:
    R = R.double()
    return torch.linalg.matrix_norm(R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype)).amax().item()
