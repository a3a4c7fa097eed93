"""What a model answers, how often it is right, and how well it still reads general prose."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from _data import Example, Prompts
from torch import nn
from tqdm import tqdm

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions, in [0, 1]."""

    exact: float  # the reply is the answer and nothing else
    contained: float  # the answer is somewhere in the reply


def accuracy(replies: list[str], examples: list[Example]) -> Accuracy:
    """Compares the replies with the answers, in the same order."""
    pairs = [(reply, example.answer) for reply, example in zip(replies, examples, strict=True)]
    exact = sum(reply == answer for reply, answer in pairs)
    # not inside a longer word or number: 2 is not contained in 12, nor in -2
    contained = sum(bool(re.search(rf"(?<![\w-]){re.escape(answer)}(?!\w)", reply)) for reply, answer in pairs)
    return Accuracy(exact / len(pairs), contained / len(pairs))


@torch.inference_mode()
def replies(model: nn.Module, prompts: Prompts, examples: list[Example], batch_size: int = 64) -> list[str]:
    """Greedy replies, in batches of questions of similar length."""
    device = next(model.parameters()).device
    length = max(len(prompts.answer(example.answer)) for example in examples) + 8  # room for "The answer is …"
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].question))
    texts = [""] * len(examples)
    with tqdm(total=len(examples), desc="answering", unit="question", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = prompts.generation_batch([examples[i].question for i in chosen])
            batch = {key: value.to(device) for key, value in batch.items()}
            tokens = model.generate(
                **batch,
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=prompts.tokenizer.eos_token_id,
                pad_token_id=prompts.tokenizer.pad_token_id,
            )
            new = tokens[:, batch["input_ids"].shape[1] :]
            for i, text in zip(chosen, prompts.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[i] = text.strip()
            bar.update(len(chosen))
    return texts


@torch.inference_mode()
def next_token_logits(model: nn.Module, prompts: Prompts, examples: list[Example]) -> torch.Tensor:
    """Logits of the first token of each reply, ``(len(examples), vocabulary)``, float32."""
    device = next(model.parameters()).device
    batch = prompts.generation_batch([example.question for example in examples])
    logits = model(**{key: value.to(device) for key, value in batch.items()}, logits_to_keep=1).logits
    return logits[:, -1].float().cpu()


@torch.inference_mode()
def perplexity(model: nn.Module, prompts: Prompts, window: int = 256) -> float:
    """Perplexity of prose that has nothing to do with the task: how much was forgotten shows as a rise."""
    device = next(model.parameters()).device
    tokens = prompts.tokenizer(GENERAL_TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    total, count = 0.0, 0
    for piece in tokens.split(window):
        if len(piece) > 1:
            logits = model(input_ids=piece[None].to(device)).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits, piece[1:].to(device), reduction="sum").item()
            count += len(piece) - 1
    return math.exp(total / count)
