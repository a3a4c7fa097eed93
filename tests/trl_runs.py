"""Trainers of TRL on a tiny model, as its examples set them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import trainer_runs

TEXTS = Dataset.from_list([{"text": f"{n} and {n}"} for n in range(8)])
PAIRS = Dataset.from_list([{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(8)])
IDS = torch.arange(2, 42).view(4, 10)


def arguments(config_class: type, folder: Path, **fields: Any) -> Any:
    return trainer_runs.arguments(folder, config_class, **{"max_steps": 4, "save_steps": 2, "bf16": False, **fields})


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
