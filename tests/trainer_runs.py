"""Runs of transformers' ``Trainer`` on a tiny model, and of TRL's: batches, arguments, base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

IDS = torch.arange(80).view(8, 10) % 128
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def load(folder: Path, *, nf4: bool = False, int8: bool = False) -> Any:
    """The model in a folder, as it is or quantized by bitsandbytes."""
    options: dict[str, Any] = {}
    if nf4 or int8:
        config = BitsAndBytesConfig(load_in_8bit=True)
        if nf4:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        options = {"quantization_config": config, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def arguments(folder: Path, config_class: type = TrainingArguments, **fields: Any) -> Any:
    return config_class(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "save_steps": 3,
            "logging_steps": 1,
            "disable_tqdm": True,
            **fields,
        },
    )
