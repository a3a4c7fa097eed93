"""``Trainer`` on bases of every quantization that transformers loads on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig, Trainer

from oftv2 import load_adapter, wrap_model
from other_backends import quanto_library
from trainer_runs import IDS, ROWS, arguments

QUANTIZATIONS = {
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "nf4-double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto-int8": lambda: QuantoConfig(weights="int8"),
    "quanto-int4": lambda: (quanto_library(), QuantoConfig(weights="int4"))[1],
}


def train(model: nn.Module, folder: Path, checkpoint: Path | None = None) -> None:
    fields = {"max_steps": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"load_best_model_at_end": True, "gradient_checkpointing": True}
    trainer = Trainer(model, arguments(folder, **fields), train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_trains_saves_the_adapter_only_and_resumes_without_any_difference(kind, tiny_llama, tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")

    def make() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=QUANTIZATIONS[kind](), device_map="cpu"
        )

    straight, resumed = (wrap_model(make(), block_size=16) for _ in range(2))
    train(straight, tmp_path / "straight")
    train(resumed, tmp_path / "resumed", tmp_path / "straight" / "checkpoint-1")
    saved = {path.name for path in (tmp_path / "straight" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} <= saved
    assert "config.json" not in saved
    assert (tmp_path / "straight" / "checkpoint-2" / "model.safetensors").stat().st_size < 30_000
    generators = {name: value for name, value in straight.named_parameters() if ".generators." in name}
    assert len(generators) == 7
    for name, value in generators.items():
        assert value.any(), name
        assert value.dtype == torch.float32, name
        assert torch.equal(value, resumed.get_parameter(name)), name
    loaded = load_adapter(make(), tmp_path / "straight" / "checkpoint-2").eval()
    assert torch.equal(loaded(IDS).logits, straight.eval()(IDS).logits)
