"""Linear layers of quantization libraries other than bitsandbytes, which all compute on a CPU in float32 here.

What they should compute needs no knowledge of their formats: a layer called on unit vectors, less its bias, gives its
weight. The products with ones and zeros are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import randomize
from oftv2 import OFTConfig, QuantOFTLinear, reference

B = 16


def torchao(config: Callable[[], object]) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        model = nn.Sequential(plain)
        quantize_(model, config())
        return model[0]

    return make


def torchao_config(name: str, **fields: object) -> Callable[[], object]:
    def config() -> object:
        import torchao.quantization as ao

        made = {key: value(ao) if callable(value) else value for key, value in fields.items()}
        return getattr(ao, name)(**made)

    return config


def unpacked(packed: Tensor, bits: int) -> Tensor:
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def quanto_library() -> ModuleType:
    """optimum-quanto, without the minute in which it compiles C++ for one operator at its first use."""
    from optimum import quanto
    from optimum.quanto.library.extensions import get_extension

    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpacked)
    return quanto


def quanto(qtype: str) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        library, model = quanto_library(), nn.Sequential(plain)
        library.quantize(model, weights=getattr(library, qtype))
        library.freeze(model)
        return model[0]

    return make


# How much of a Gaussian weight's norm each loses when it is quantized again, measured on these tests' layers.
REQUANTIZED = {
    "torchao-int8": (0.003, 0.01),
    "torchao-int8-groups": (0.002, 0.008),
    "torchao-float8": (0.02, 0.035),
    "torchao-int4": (0.05, 0.11),
    "torchao-int4-shifted": (0.05, 0.11),
    "torchao-int2": (0.3, 0.8),
    "quanto-int8": (0.003, 0.01),
    "quanto-int4": (0.05, 0.13),
    "quanto-float8": (0.02, 0.035),
}
MAKERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao-int8": torchao(torchao_config("Int8WeightOnlyConfig")),
    "torchao-int8-groups": torchao(torchao_config("Int8WeightOnlyConfig", granularity=lambda ao: ao.PerGroup(32))),
    "torchao-float8": torchao(torchao_config("Float8WeightOnlyConfig")),
    "torchao-int4": torchao(
        torchao_config("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda ao: ao.PerGroup(32))
    ),
    "torchao-int4-shifted": torchao(
        torchao_config(
            "IntxWeightOnlyConfig",
            weight_dtype=torch.int4,
            granularity=lambda ao: ao.PerGroup(32),
            mapping_type=lambda ao: ao.MappingType.ASYMMETRIC,
        )
    ),
    "torchao-int2": torchao(
        torchao_config("IntxWeightOnlyConfig", weight_dtype=torch.int2, granularity=lambda ao: ao.PerAxis(0))
    ),
    "quanto-int8": quanto("qint8"),
    "quanto-int4": quanto("qint4"),
    "quanto-float8": quanto("qfloat8"),
}
# Activations rounded on the way in, without a gradient.
DYNAMIC: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao-dynamic-int8": torchao(torchao_config("Int8DynamicActivationInt8WeightConfig")),
    "torchao-dynamic-int4": torchao(torchao_config("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4)),
}
each_maker = pytest.mark.parametrize("kind", MAKERS)


def dense(d: int = 128, n: int = 96, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The layer that those of all kinds are made from."""
    torch.manual_seed(0)
    return nn.Linear(d, n, bias=bias).to(dtype)


def quantized(kind: str, *sizes: int, **fields: Any) -> nn.Module:
    """A layer of one kind; the same for the same arguments, which are those of :func:`dense`."""
    return {**MAKERS, **DYNAMIC}[kind](dense(*sizes, **fields))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight ``(n, d)`` that a layer multiplies by, in float64, found by calling it."""
    with torch.no_grad():
        rows = layer(torch.eye(layer.in_features)).double()
        return (rows - layer(torch.zeros(1, layer.in_features)).double()).T


def adapted(base: nn.Module, std: float = 0.05) -> QuantOFTLinear:
    """An adapter with random generators on a quantized layer, in training mode."""
    layer = QuantOFTLinear(base, OFTConfig(block_size=B), name="proj").train()
    randomize(layer, std=std)
    return layer


def rotation_of(layer: QuantOFTLinear, packed: Tensor | None = None) -> Tensor:
    packed = layer.generators["default"].detach().double() if packed is None else packed
    return reference.cayley_neumann(reference.skew(packed, layer.rotation.block_size), layer.rotation.terms)


def parts(tensor: Tensor, name: str = "") -> list[tuple[str, Tensor]]:
    """The ordinary tensors that a tensor consists of, by their path in it: itself, or those inside a subclass."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    inner = tensor.__tensor_flatten__()[0]
    return [part for key in inner for part in parts(getattr(tensor, key), f"{name}.{key}")]


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a layer holds, inside tensor subclasses too, copied."""
    held = (*module.named_parameters(), *module.named_buffers())
    return {path: part.detach().clone() for name, tensor in held for path, part in parts(tensor, name)}


def assert_same_bits(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = stored(module)
    assert before
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
