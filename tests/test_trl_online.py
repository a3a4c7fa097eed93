"""TRL's trainers that generate what they learn from: GRPO and RLOO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from conftest import randomize
from oftv2 import AdapterError, ReferenceModel, load_adapter, wrap_model
from trainer_runs import load
from trl_runs import arguments, generators, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, at names that TRL still uses
    pytest.mark.filterwarnings("ignore:the generators of .* had been cast"),
]

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def different_letters(completions: list[str], **_: Any) -> list[float]:
    """A reward."""
    return [float(len(set(text))) for text in completions]


def make(kind: str, model: nn.Module, folder: Path, **fields: Any) -> Any:
    trainer_class, config_class = TRAINERS[kind]
    peft_config = fields.pop("peft_config", None)
    fields = {"beta": 0.1, "num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4, **fields}
    return trainer_class(
        model,
        different_letters,
        arguments(config_class, folder, **fields),
        train_dataset=Dataset.from_list([{"prompt": f"{n}?"} for n in range(8)]),
        peft_config=peft_config,
    )


def run(kind: str, model: nn.Module, folder: Path, checkpoint: Path | None = None, **fields: Any) -> list[float]:
    """Trains, and returns the divergence from the reference in each step."""
    trainer = make(kind, model, folder, **fields)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


@pytest.fixture
def loads_none(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("TRL loads a second model")

    for module in (grpo_trainer, rloo_trainer):
        monkeypatch.setattr(module, "create_model_from_path", refuse)


@pytest.mark.usefixtures("loads_none")
@pytest.mark.parametrize("kind", TRAINERS)
class TestReference:
    @pytest.mark.parametrize("nf4", [False, True], ids=["float32", "nf4"])
    def test_training_and_resuming_with_the_model_itself_as_reference(self, kind, nf4, base_folder, tmp_path):
        straight = wrap_model(load(base_folder, nf4=nf4), block_size=16)
        divergences = run(kind, straight, tmp_path / "straight")
        assert divergences[0] == 0
        assert divergences[-1] > 0
        assert all(value.any() and value.dtype == torch.float32 for value in generators(straight).values())

        checkpoint = tmp_path / "straight" / "checkpoint-2"
        resumed = wrap_model(load(base_folder, nf4=nf4), block_size=16)
        assert run(kind, resumed, tmp_path / "resumed", checkpoint) == divergences
        for (name, value), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(value, other), name

    def test_of_an_adapter_that_was_trained_before_it_is_the_start(self, kind, base_folder, tmp_path):
        model = wrap_model(load(base_folder, nf4=False), block_size=16)
        randomize(model)
        start = logits(model)
        trainer = make(kind, model, tmp_path)
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0
        assert isinstance(trainer.ref_model, ReferenceModel)
        assert list(trainer.ref_model.parameters()) == []
        assert torch.equal(logits(trainer.ref_model.eval()), start)
        assert not torch.equal(logits(model), start)
        loaded = load_adapter(load(base_folder, nf4=False), tmp_path / "checkpoint-4")
        assert torch.equal(logits(loaded), logits(model))

    def test_none_is_made_where_none_is_wanted(self, kind, base_folder, tmp_path):
        model = wrap_model(load(base_folder, nf4=False), block_size=16)
        trainer = make(kind, model, tmp_path, beta=0.0, max_steps=1)
        trainer.train()
        assert trainer.ref_model is None


def test_it_is_what_a_second_copy_would_be(base_folder, tmp_path):
    """A plain model's reference is loaded; put beside a wrapped policy, it diverges as much as the policy itself."""
    divergences = []
    for with_copy in (False, True):
        model = wrap_model(load(base_folder, nf4=False), block_size=16)
        trainer = make("grpo", model, tmp_path)
        if with_copy:
            trainer.ref_model = make("grpo", load(base_folder, nf4=False), tmp_path).ref_model
            assert list(trainer.ref_model.parameters())  # a plain model still gets its copy
        trainer.train()
        divergences.append([entry["kl"] for entry in trainer.state.log_history if "kl" in entry])
    assert divergences[0] == divergences[1]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sync_ref_model": True}, "sync_ref_model=True would copy"),
        ({"use_vllm": True}, "use_vllm=True would generate without the adapter"),
        ({"peft_config": LoraConfig()}, "peft would put its adapter"),
    ],
    ids=["sync", "vllm", "peft"],
)
def test_refused(kind, fields, message, base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=False), block_size=16)
    with pytest.raises(AdapterError, match=message):
        make(kind, model, tmp_path, **fields)


def test_an_adapter_on_the_head_is_refused(base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=False), block_size=16, target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head: .* exclude_modules=\['lm_head'\]"):
        make("rloo", model, tmp_path).train()
