"""Ways for an adapted model to present itself to transformers' ``Trainer``, and where each breaks.

Why ``oftv2.pretrained`` does it as it does: a subclass of the model's own class, with checkpoints that also hold
``model.safetensors`` (shown in test_trainer.py), needs neither peft nor another trainer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer

from oftv2 import wrap_model
from trainer_runs import IDS, ROWS, arguments, load


@pytest.fixture
def nf4_base(tiny_llama, tmp_path):
    """Loads equal 4-bit models."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return lambda: load(tmp_path / "base", nf4=True)


def presented_as(cls: type, model: nn.Module) -> nn.Module:
    """The model with adapters in its layers, as an instance of ``cls`` instead of the library's own class."""
    wrap_model(model, block_size=16).__class__ = cls
    return model


def train(model: nn.Module, folder: Path, checkpoint: Path | None = None, trainer_class: type = Trainer) -> Trainer:
    trainer = trainer_class(model, arguments(folder), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, same), name


def test_layers_replaced_and_nothing_else(nf4_base, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        train(presented_as(LlamaForCausalLM, nf4_base()), tmp_path)
    train(presented_as(LlamaForCausalLM, tiny_llama()), tmp_path)
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert any("embed_tokens" in name for name in saved)  # the whole model, in every checkpoint
    assert not (tmp_path / "checkpoint-3" / "adapter_config.json").exists()


class Config(dict[str, Any]):
    """As much of a configuration of peft's as transformers asks for."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "adapter_config.json").write_text("{}")


class Flagged(LlamaForCausalLM):
    """transformers' own protocol for adapters: a flag, and three names that its ``save_pretrained`` looks for."""

    _hf_peft_config_loaded = True
    peft_config: ClassVar = {"default": Config()}

    def active_adapters(self) -> list[str]:
        return ["default"]

    def get_adapter_state_dict(self, adapter_name: Any = None, state_dict: Any = None) -> dict[str, torch.Tensor]:
        return {name: value for name, value in (state_dict or self.state_dict()).items() if ".generators." in name}


class LoadingTrainer(Trainer):
    """What a user would have to write instead of ``Trainer``."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = load_file(os.path.join(resume_from_checkpoint, "adapter_model.safetensors"))
        named = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        assert not (model or self.model).load_state_dict(named, strict=False).unexpected_keys


def test_the_flag_and_three_methods(nf4_base, tmp_path):
    straight = presented_as(Flagged, nf4_base())
    train(straight, tmp_path / "straight")
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    with pytest.raises(ValueError, match="Can't find a checkpoint"):
        train(presented_as(Flagged, nf4_base()), tmp_path / "resumed", checkpoint)

    resumed = presented_as(Flagged, nf4_base())  # with another trainer, it resumes
    train(resumed, tmp_path / "resumed", checkpoint, LoadingTrainer)
    assert_same(straight, resumed)


class Outer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_an_outer_module(tiny_llama, tmp_path):
    model = Outer(presented_as(LlamaForCausalLM, tiny_llama(tie_word_embeddings=True)))
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])
    with pytest.raises(ValueError, match="No columns in the dataset match"):
        Trainer(model, arguments(tmp_path), train_dataset=rows).train()
    with pytest.raises(RuntimeError, match="share memory"):
        Trainer(model, arguments(tmp_path, remove_unused_columns=False), train_dataset=rows).train()


def test_a_model_of_pefts(tiny_llama, tmp_path):
    """Everything works, with peft; and no model is of transformers' class and of peft's at once."""

    def make() -> nn.Module:
        return peft.get_peft_model(tiny_llama(), peft.OFTConfig(oft_block_size=16, target_modules="all-linear"))

    straight, resumed = make(), make()
    train(straight, tmp_path / "straight")
    train(resumed, tmp_path / "resumed", tmp_path / "straight" / "checkpoint-3")
    assert_same(straight, resumed)
    assert not isinstance(straight, PreTrainedModel)
    with pytest.raises(TypeError, match="MRO"):
        type("Both", (PreTrainedModel, peft.PeftModel), {})
