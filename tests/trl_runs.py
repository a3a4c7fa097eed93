"""Trainers of TRL on a tiny model, as its examples set them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

TEXTS = Dataset.from_list([{"text": f"{n} and {n}"} for n in range(8)])
PAIRS = Dataset.from_list([{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(8)])
IDS = torch.arange(2, 42).view(4, 10)


def load(folder: Path, *, nf4: bool) -> Any:
    options: dict[str, Any] = {}
    if nf4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        options = {"quantization_config": config, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def arguments(config_class: type, folder: Path, **fields: Any) -> Any:
    return config_class(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            **fields,
        },
    )


def sft(model: nn.Module, folder: Path, **fields: Any) -> SFTTrainer:
    return SFTTrainer(model, arguments(SFTConfig, folder, **fields), train_dataset=TEXTS, eval_dataset=TEXTS)


def dpo(model: nn.Module, folder: Path, **fields: Any) -> DPOTrainer:
    return DPOTrainer(model, args=arguments(DPOConfig, folder, **fields), train_dataset=PAIRS, eval_dataset=PAIRS)


def generators(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".generators." in name}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits
