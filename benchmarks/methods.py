"""The methods that benchmarks compare, by name: each makes a model, or a layer, trainable in its own way.

    frozen      nothing trains; gradients flow through to the input          frozen-nf4   the same on a 4-bit base
    oft         this library                                                 qoft
    oft-input, oft-weight   the same, forced into one form of the layer
    peft-oft    PEFT's OFT with its defaults and the same block size         peft-qoft
    lora, dora  PEFT's, alpha = 2 · rank                                     qlora
    oftv1       the original OFT: dense products, inverses (oftv1.py)
    full        every weight trains

The second column is on bitsandbytes' NF4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import oftv1
import oftv2
from measure import MissingError, require


@dataclass(frozen=True)
class Sizes:
    """The size of an adapter: of OFT's blocks, and LoRA's rank."""

    block_size: int = 32
    rank: int = 16


Attach = Callable[[nn.Module, Sizes, "str | list[str]"], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way to finetune. ``needs`` are packages, ``reference`` the method with the same base that trains nothing."""

    attach: Attach
    nf4: bool = False
    needs: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        return "frozen-nf4" if self.nf4 else "frozen"

    @property
    def ratios(self) -> dict[str, str]:
        """The methods that this one's figures are divided by, by column."""
        lora, peft_oft = ("qlora", "peft-qoft") if self.nf4 else ("lora", "peft-oft")
        return {"over_frozen": self.reference, "over_lora": lora, "over_peft_oft": peft_oft}


def _frozen(model: nn.Module, sizes: Sizes, targets: str | list[str]) -> nn.Module:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return model.requires_grad_(False)


def _full(model: nn.Module, sizes: Sizes, targets: str | list[str]) -> nn.Module:
    return model.requires_grad_(True)


def _oft(form: str | None = None) -> Attach:
    def attach(model: nn.Module, sizes: Sizes, targets: str | list[str]) -> nn.Module:
        oftv2.wrap_model(model, block_size=sizes.block_size, target_modules=targets)
        for module in model.modules():
            if form and isinstance(module, oftv2.OFTLinear):
                module.form = form
        return model

    return attach


def _peft_oft(model: nn.Module, sizes: Sizes, targets: str | list[str]) -> nn.Module:
    import peft

    config = peft.OFTConfig(oft_block_size=sizes.block_size, use_cayley_neumann=True, target_modules=targets)
    return peft.get_peft_model(model, config)


def _lora(**options: Any) -> Attach:
    def attach(model: nn.Module, sizes: Sizes, targets: str | list[str]) -> nn.Module:
        import peft

        config = peft.LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=targets, **options)
        return peft.get_peft_model(model, config)

    return attach


def _oftv1(model: nn.Module, sizes: Sizes, targets: str | list[str]) -> nn.Module:
    return oftv1.wrap(model, sizes.block_size)


_PEFT, _NF4 = ("peft",), ("bitsandbytes",)
METHODS = {
    "frozen": Method(_frozen),
    "oft": Method(_oft()),
    "oft-input": Method(_oft("input")),
    "oft-weight": Method(_oft("weight")),
    "peft-oft": Method(_peft_oft, needs=_PEFT),
    "lora": Method(_lora(), needs=_PEFT),
    "dora": Method(_lora(use_dora=True), needs=_PEFT),
    "oftv1": Method(_oftv1),
    "full": Method(_full),
    "frozen-nf4": Method(_frozen, nf4=True, needs=_NF4),
    "qoft": Method(_oft(), nf4=True, needs=_NF4),
    "peft-qoft": Method(_peft_oft, nf4=True, needs=_NF4 + _PEFT),
    "qlora": Method(_lora(), nf4=True, needs=_NF4 + _PEFT),
}


def attach(name: str, model: nn.Module, sizes: Sizes, targets: str | list[str] = "all-linear") -> nn.Module:
    """Makes ``model`` trainable by a method, in place; an NF4 method wants a model that is quantized already.

    Raises:
        MissingError: a package that the method needs is not there.
    """
    require(*METHODS[name].needs)
    return METHODS[name].attach(model, sizes, targets)


def available(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those that can run here, and of the others what is missing."""
    missing = {}
    for name in names:
        try:
            require(*METHODS[name].needs)
        except MissingError as error:
            missing[name] = str(error)
    return [name for name in names if name not in missing], missing


def linear_nf4(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """bitsandbytes' NF4 layer of an existing weight."""
    require("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer: nn.Module = Linear4bit(
            *reversed(weight.shape), bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
        )
    layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=layer)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.to(weight.device)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An ordinary layer around an existing weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def on_layer(name: str, base: nn.Module, sizes: Sizes) -> nn.Module:
    """The layer of one method around ``base``, with small random adapter weights."""
    alone: Any = nn.Sequential(base)
    alone.is_loaded_in_4bit = METHODS[name].nf4  # by this PEFT tells
    model = attach(name, alone, sizes, ["0"])
    return perturb(name, model).get_submodule("base_model.model.0" if hasattr(model, "peft_config") else "0")


@torch.no_grad()
def perturb(name: str, model: nn.Module, std: float = 0.01) -> nn.Module:
    """Adds small random numbers to what a method trains, as training would; weights that train whole stay."""
    if name != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model
