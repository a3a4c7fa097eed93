"""Options of TRL's trainers, and its further trainers: each takes a wrapped model as it takes a plain one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from conftest import trainable
from oftv2 import load_adapter, wrap_model
from trainer_runs import load
from trl_runs import IDS, PAIRS, TEXTS, arguments, dpo, generators, logits

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, at names that TRL still uses
    pytest.mark.filterwarnings("ignore:the generators of .* had been cast"),
]

COMPLETIONS = Dataset.from_list([{"prompt": f"{n}?", "completion": " yes"} for n in range(8)])
CHATS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": " yes"}]} for n in range(8)]
)
LABELLED = Dataset.from_list(
    [{"prompt": f"{n}?", "completion": " yes" if n % 2 else " no", "label": bool(n % 2)} for n in range(8)]
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def assert_trained(model: nn.Module) -> None:
    assert trainable(model) == set(generators(model))
    assert all(value.any() and value.dtype == torch.float32 for value in generators(model).values())


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (TEXTS, {"packing": True, "max_length": 16}),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
        (COMPLETIONS, {"completion_only_loss": True}),
        (CHATS, {"assistant_only_loss": True}),
    ],
    ids=["packing", "wrapped", "completions", "assistant"],
)
def test_supervised_finetuning_starts_where_the_base_model_stands(rows, fields, base_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    losses = []
    for wrapped in (False, True):
        model = load(base_folder)
        if wrapped:
            wrap_model(model, block_size=16)
        config = arguments(SFTConfig, tmp_path, max_steps=2, save_strategy="no", **fields)
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # in the first step, before anything has learned
    assert_trained(model)


def kto(model: nn.Module, folder: Path, **fields: Any) -> KTOTrainer:
    return KTOTrainer(model, args=arguments(KTOConfig, folder, **fields), train_dataset=LABELLED)


def cpo(model: nn.Module, folder: Path, **fields: Any) -> CPOTrainer:
    config = arguments(CPOConfig, folder, max_length=32, **fields)
    return CPOTrainer(model, args=config, train_dataset=PAIRS, processing_class=_tokenizer(model))


def orpo(model: nn.Module, folder: Path, **fields: Any) -> ORPOTrainer:
    config = arguments(ORPOConfig, folder, max_length=32, **fields)
    return ORPOTrainer(model, args=config, train_dataset=PAIRS, processing_class=_tokenizer(model))


def _tokenizer(model: Any) -> Any:
    return AutoTokenizer.from_pretrained(model.config.name_or_path)


@pytest.mark.parametrize("make_trainer", [dpo, kto, cpo, orpo])
def test_both_kinds_of_gradient_checkpointing_change_nothing(make_trainer, base_folder, tmp_path):
    runs = []
    for fields in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        model = wrap_model(load(base_folder, nf4=True), block_size=16)
        make_trainer(model, tmp_path, max_steps=1, **fields).train()
        assert_trained(model)
        runs.append(generators(model))
    for name, value in runs[0].items():
        for other in runs[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)
    loaded = load_adapter(load(base_folder, nf4=True), tmp_path / "checkpoint-1")
    assert torch.equal(logits(loaded), logits(model))


def test_log_probabilities_of_a_4_bit_reference_computed_in_advance(base_folder, tmp_path):
    runs = []
    for in_advance in (True, False):
        model = wrap_model(load(base_folder, nf4=True), block_size=16)
        dpo(model, tmp_path, precompute_ref_log_probs=in_advance).train()
        assert_trained(model)
        runs.append(generators(model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reward_model_trains_its_head_and_keeps_it_in_checkpoints(checkpointing, base_folder, tmp_path):
    def make() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)

    model = wrap_model(make(), block_size=16)
    config = arguments(RewardConfig, tmp_path, gradient_checkpointing=checkpointing)
    RewardTrainer(model, args=config, train_dataset=PAIRS).train()
    assert trainable(model) == {*generators(model), "score.weight"}
    assert not torch.equal(model.score.weight, make().score.weight)
    resumed = wrap_model(make(), block_size=16)
    RewardTrainer(resumed, args=config, train_dataset=PAIRS).train(str(tmp_path / "checkpoint-2"))
    loaded = load_adapter(make(), tmp_path / "checkpoint-4").eval()
    for other in (resumed.eval(), loaded):
        assert torch.equal(other(IDS).logits, model.eval()(IDS).logits)
