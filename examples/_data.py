"""Questions with answers that can be checked: a reasoning-gym task, a JSONL file, or a `datasets` name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label cross_entropy skips

# Sums of two numbers below a hundred: few enough to learn to add in minutes, too many to be learned by heart.
DEFAULT_TASK = "basic_arithmetic"
TASK_CONFIG: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {
        "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ["+"],
        "allow_parentheses": False, "allow_negation": False,
    },
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}  # fmt: skip


class DataError(ValueError):
    """The data given cannot be trained on; the message says which row and why."""


@dataclass(frozen=True)
class Example:
    """One question and the only reply that counts as right."""

    question: str
    answer: str


def _example(row: Any, where: str) -> Example:
    """Reads a row with a question (or prompt) and an answer; `where` names the row in an error."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a question and an answer, found {type(row).__name__}")
    name = "prompt" if "prompt" in row else "question"
    fields = []
    for field in (name, "answer"):
        if field not in row:
            wanted = "'prompt' or 'question'" if field == "question" else repr(field)
            raise DataError(f"{where}: no field {wanted} (fields found: {', '.join(map(repr, row)) or 'none'})")
        value = row[field]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise DataError(f"{where}: field {field!r} has to be text or a number, found {type(value).__name__}")
        text = str(value).strip()
        if not text:
            raise DataError(f"{where}: field {field!r} is empty")
        fields.append(text)
    return Example(*fields)


def read_jsonl(path: Path) -> Iterator[Example]:
    """Reads one JSON object a line; blank lines are skipped, anything else wrong is an error with its line number."""
    if not path.is_file():
        raise DataError(f"--data {path}: no such file")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))  # the mark that Windows puts in front of a file is none of it
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not in UTF-8 ({error}); convert the file") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None
        yield _example(row, where)


def read_dataset(name: str) -> Iterator[Example]:
    """Reads the train split of a dataset on the Hugging Face Hub, ``name`` or ``name:configuration``."""
    from datasets import load_dataset

    path, _, configuration = name.partition(":")
    try:
        rows = load_dataset(path, configuration or None, split="train")
    except Exception as error:
        raise DataError(f"--data {name}: neither a file here nor a dataset that loads ({error})") from error
    for number, row in enumerate(rows):
        yield _example(row, f"{name}, row {number}")


def generate(task: str, config: dict[str, Any], size: int, seed: int) -> Iterator[Example]:
    """Generates questions of a reasoning-gym task; they depend on the seed alone."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError("--task needs reasoning-gym: pip install reasoning-gym (or bring rows with --data)") from None

    if task not in DATASETS:
        raise DataError(f"--task {task}: not a task of reasoning-gym; choose from {', '.join(sorted(DATASETS))}")
    try:
        rows = reasoning_gym.create_dataset(task, seed=seed, size=size, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"--task {task}: {error}") from error
    for number, row in enumerate(rows):
        yield _example(row, f"{task}, row {number}")


def split(examples: Iterable[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Shuffles and splits into (train, held-out), by question: none is on both sides, none is held out twice."""
    pool = list(examples)
    questions = sorted({example.question for example in pool})
    if len(questions) < 2:
        raise DataError(f"{len(questions)} different question(s): at least two are needed, one of them to hold out")
    random.Random(seed).shuffle(questions)
    aside = set(questions[: min(held_out, len(questions) // 2)])
    train = [example for example in pool if example.question not in aside]
    test = {example.question: example for example in pool if example.question in aside}
    random.Random(seed).shuffle(train)
    return train, [test[question] for question in questions if question in test]


class Prompts:
    """Turns examples into tokens: the question in the model's chat template (or plain), then the answer and an end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: str) -> None:
        if style == "chat" and not tokenizer.chat_template:
            raise DataError("--prompt chat: the model's tokenizer has no chat template; use --prompt plain")
        self.tokenizer, self.style = tokenizer, style
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def prompt(self, question: str) -> list[int]:
        """The tokens before the answer, the same in training and in generation."""
        if self.style == "plain":
            return self.tokenizer(f"{question}\n").input_ids
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def answer(self, answer: str) -> list[int]:
        """The tokens to learn."""
        return [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def training_batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Pads on the right; only the answers have labels, so only they are learned.

        Returns ``input_ids``, ``attention_mask`` and ``labels``, each of shape ``(len(examples), longest)``.
        """
        pairs = [(self.prompt(example.question), self.answer(example.answer)) for example in examples]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in pairs:
            used, free = len(prompt) + len(answer), longest - len(prompt) - len(answer)
            batch["input_ids"].append(prompt + answer + [self.tokenizer.pad_token_id] * free)
            batch["attention_mask"].append([1] * used + [0] * free)
            batch["labels"].append([IGNORE] * len(prompt) + answer + [IGNORE] * free)
        return {name: torch.tensor(rows) for name, rows in batch.items()}

    def generation_batch(self, questions: list[str]) -> dict[str, torch.Tensor]:
        """Pads on the left, so that every row goes on at its right end."""
        prompts = [self.prompt(question) for question in questions]
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts]),
            "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        }
