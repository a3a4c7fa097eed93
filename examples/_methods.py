"""Three ways to finetune behind one small interface: orthogonal (oftv2), low-rank (PEFT's LoRA), and all weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from _model import ModelError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import oftv2

Targets = str | list[str]


class Method(Protocol):
    """What the example asks of a way to finetune; ``lr`` is the learning rate that suits it."""

    name: str
    lr: float

    def attach(self, base: PreTrainedModel) -> nn.Module:
        """Makes a base model trainable."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes what was trained."""

    def load(self, fresh_base: Callable[[], PreTrainedModel], folder: Path) -> nn.Module:
        """Reads it back onto a base model that was never trained."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Folds it into the weights: a plain model again."""


@dataclass
class OFT:
    """Rotates the inputs of every target layer; only the rotations are trained."""

    block_size: int
    targets: Targets
    lr: float = 4e-4  # the paper's range is 2e-4 … 8e-4
    name: str = "oft"

    def attach(self, base: PreTrainedModel) -> nn.Module:
        return oftv2.wrap_model(base, block_size=self.block_size, target_modules=self.targets)

    def save(self, model: nn.Module, folder: Path) -> None:
        oftv2.save_adapter(model, folder)

    def load(self, fresh_base: Callable[[], PreTrainedModel], folder: Path) -> nn.Module:
        return oftv2.load_adapter(fresh_base(), folder)

    def merge(self, model: nn.Module) -> nn.Module:
        return oftv2.merge(model)


@dataclass
class LoRA:
    """Adds a product of two thin matrices to every target layer, with the PEFT library."""

    rank: int
    targets: Targets
    lr: float = 1e-3
    name: str = "lora"

    def __post_init__(self) -> None:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise ModelError("LoRA comes from PEFT: pip install peft") from None

    def attach(self, base: PreTrainedModel) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=self.targets, task_type="CAUSAL_LM")
        return get_peft_model(base, config)

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, fresh_base: Callable[[], PreTrainedModel], folder: Path) -> nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(fresh_base(), folder)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()


@dataclass
class Full:
    """Trains every weight: the most memory, and nothing to merge."""

    lr: float = 5e-5
    name: str = "full"

    def attach(self, base: PreTrainedModel) -> nn.Module:
        return base.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, fresh_base: Callable[[], PreTrainedModel], folder: Path) -> nn.Module:
        base = fresh_base()
        dtype, device = base.dtype, base.device
        del base
        gc.collect()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def merge(self, model: nn.Module) -> nn.Module:
        return model
