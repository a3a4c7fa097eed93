"""What the study takes from examples/: the model, the data, the training loop."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from _data import IGNORE, TASK_CONFIG, DataError, Example, Prompts, generate, split
from _evaluate import accuracy, perplexity, replies
from _methods import Full, LoRA
from _model import ModelError, default_cache, load_base, load_tokenizer, smollm2_folder
from _report import environment
from _train import Training, train

__all__ = [
    "IGNORE",
    "TASK_CONFIG",
    "DataError",
    "Example",
    "Full",
    "LoRA",
    "ModelError",
    "Prompts",
    "Training",
    "accuracy",
    "default_cache",
    "environment",
    "generate",
    "load_base",
    "load_tokenizer",
    "perplexity",
    "replies",
    "smollm2_folder",
    "split",
    "train",
]
