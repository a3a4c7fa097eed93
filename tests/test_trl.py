"""Unchanged scripts of TRL, supervised finetuning and DPO, around a wrapped model."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import dpo_trainer, kto_trainer

from conftest import randomize
from oftv2 import AdapterError, disable_adapter, load_adapter, reference_model, wrap_model
from trainer_runs import load
from trl_runs import IDS, PAIRS, arguments, dpo, generators, logits, sft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at names that TRL still uses


@pytest.fixture(params=["float32", "nf4"])
def make_base(request, base_folder):
    """Loads equal base models, in float32 or as 4 bit."""
    return lambda: load(base_folder, nf4=request.param == "nf4")


@pytest.fixture
def no_second_copy(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("TRL loads a second model")

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", refuse)


@pytest.mark.filterwarnings("ignore:the generators of .* had been cast")
@pytest.mark.usefixtures("no_second_copy")
@pytest.mark.parametrize("make_trainer", [sft, dpo])
def test_checkpoints_hold_the_adapter_only_and_resume_without_any_difference(make_trainer, make_base, tmp_path):
    straight = wrap_model(make_base(), block_size=16)
    trainer = make_trainer(straight, tmp_path / "straight")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in generators(straight).values()} == {torch.float32}

    checkpoint = tmp_path / "straight" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} <= names
    assert "config.json" not in names
    assert all(".generators." in name for name in load_file(checkpoint / "model.safetensors"))

    resumed = wrap_model(make_base(), block_size=16)
    make_trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    for (name, value), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name

    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(load_adapter(make_base(), tmp_path / "saved")), logits(straight))


def test_the_best_model_is_restored(base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=False), block_size=16)
    trainer = sft(
        model, tmp_path / "run", eval_strategy="steps", eval_steps=2, max_steps=6, load_best_model_at_end=True
    )
    scores = iter([2.0, 1.0, 3.0])  # the second of three evaluations is the best
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_adapter(load(base_folder, nf4=False), tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(best), logits(model))


def references(trainer: DPOTrainer, model: nn.Module) -> torch.Tensor:
    batch = next(iter(trainer.get_eval_dataloader()))
    return torch.cat(trainer.compute_ref_log_probs(model, batch))


@pytest.mark.filterwarnings("ignore:the generators of .* had been cast")
@pytest.mark.usefixtures("no_second_copy")
class TestReference:
    def test_it_is_the_same_model_with_the_adapter_disabled(self, make_base, tmp_path):
        model = wrap_model(make_base(), block_size=16)
        trainer = dpo(model, tmp_path)
        assert list(trainer.ref_model.parameters()) == []
        before = references(trainer, trainer.ref_model)
        trainer.train()
        after = references(trainer, trainer.ref_model)
        assert torch.equal(before, after)
        with disable_adapter(model):
            assert torch.equal(references(trainer, trainer.model), after)
        assert not torch.equal(references(trainer, trainer.model), after)

    def test_of_an_adapter_that_was_trained_before_it_is_the_start(self, make_base, tmp_path):
        model = wrap_model(make_base(), block_size=16)
        randomize(model)
        start = {name: value.detach().clone() for name, value in generators(model).items()}
        trainer = dpo(model, tmp_path)
        before = references(trainer, trainer.ref_model)
        with disable_adapter(model):
            assert not torch.equal(references(trainer, trainer.model), before)
        trainer.train()
        assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-6
        assert torch.equal(references(trainer, trainer.ref_model), before)
        assert all(not torch.equal(value, start[name]) for name, value in generators(model).items())

    def test_log_probabilities_computed_in_advance(self, base_folder, tmp_path):
        first = wrap_model(load(base_folder, nf4=False), block_size=16)
        trainer = dpo(first, tmp_path / "first", precompute_ref_log_probs=True)
        trainer.train()
        second = wrap_model(load(base_folder, nf4=False), block_size=16)
        dpo(second, tmp_path / "second").train()
        for value, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
        assert trainer.evaluate(PAIRS.select(range(2)))["eval_loss"] > 0

    def test_one_that_is_given_is_kept(self, base_folder, tmp_path):
        given = load(base_folder, nf4=False)
        model = wrap_model(load(base_folder, nf4=False), block_size=16)
        trainer = DPOTrainer(model, given, arguments(DPOConfig, tmp_path), train_dataset=PAIRS)
        assert trainer.ref_model is given

    def test_synchronising_it_is_refused(self, base_folder, tmp_path):
        model = wrap_model(load(base_folder, nf4=False), block_size=16)
        with pytest.raises(AdapterError, match="sync_ref_model"):
            dpo(model, tmp_path, sync_ref_model=True)


def test_kto_takes_the_same_reference(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(kto_trainer, "create_model_from_path", None)
    model = wrap_model(load(base_folder, nf4=False), block_size=16)
    rows = [{"prompt": f"{n}?", "completion": " yes" if n % 2 else " no", "label": bool(n % 2)} for n in range(8)]
    trainer = KTOTrainer(model, args=arguments(KTOConfig, tmp_path), train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert trainer.ref_model.policy is model
    assert all(value.any() for value in generators(model).values())


def test_a_plain_model_still_gets_its_second_copy(base_folder, tmp_path):
    wrap_model(load(base_folder, nf4=False), block_size=16)
    trainer = dpo(load(base_folder, nf4=False), tmp_path)
    assert list(trainer.ref_model.parameters())


def test_a_view_by_hand(tiny_llama):
    model = wrap_model(tiny_llama(), block_size=16, dropout=0.5, modules_to_save=["norm"])
    with pytest.raises(AdapterError, match="no oftv2 adapter"):
        reference_model(tiny_llama())
    base = model(IDS).logits
    fresh = reference_model(model)
    randomize(model)
    model.model.norm.weight.data.add_(0.5)
    assert torch.equal(fresh(IDS).logits, base)
    trained, now = reference_model(model), logits(model)
    randomize(model, seed=4)
    model.model.norm.weight.data.add_(0.5)
    changed = logits(model)
    model.train()
    with torch.no_grad():
        assert torch.equal(trained(IDS).logits, now)  # without dropout
    assert torch.equal(logits(model), changed)
    assert trained.config is model.config


def test_a_head_trained_in_full_does_train(base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=False), block_size=16, modules_to_save=["lm_head"])
    before = model.lm_head.weight.detach().clone()
    sft(model, tmp_path).train()
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, base_folder, tmp_path):
    runs = []
    for fields in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = wrap_model(load(base_folder, nf4=False), block_size=16)
        sft(model, tmp_path, max_steps=2, **fields).train()
        runs.append(generators(model))
    for name, value in runs[0].items():
        assert value.any(), name
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the generators of .* had been cast")
def test_a_trained_model_is_pickled(make_base, tmp_path):
    model = wrap_model(make_base(), block_size=16)
    sft(model, tmp_path / "run", max_steps=1).train()
    expected = logits(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        other.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert all(value.grad is not None for value in generators(other).values())


WITHOUT_PEFT = """
import pickle, sys

sys.modules["peft"] = None
import torch, trl, transformers
from datasets import Dataset
import oftv2

assert not transformers.utils.is_peft_available()
fields = dict(max_steps=2, save_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False)
load = transformers.AutoModelForCausalLM.from_pretrained
model = oftv2.wrap_model(load("base"), block_size=16)
texts = Dataset.from_list([{"text": "one, two"}] * 4)
trl.SFTTrainer(model, trl.SFTConfig("sft", **fields), train_dataset=texts).train()
model = oftv2.load_adapter(load("base"), "sft/checkpoint-2", trainable=True)
pairs = Dataset.from_list([{"prompt": "one,", "chosen": " two", "rejected": " six"}] * 4)
trainer = trl.DPOTrainer(model, args=trl.DPOConfig("dpo", **fields), train_dataset=pairs)
trainer.train()
assert isinstance(trainer.ref_model, oftv2.ReferenceModel)
oftv2.load_adapter(load("base"), "dpo/checkpoint-2")

nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
rows = [{"input_ids": row, "labels": row} for row in torch.arange(2, 42).view(4, 10)]


def train(folder, checkpoint=None):
    model = oftv2.wrap_model(load("base", quantization_config=nf4, device_map="cpu"), block_size=16)
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, gradient_checkpointing=True)
    arguments = transformers.TrainingArguments(folder, **fields, **best)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.best_model_checkpoint == folder + "/checkpoint-2"
    return model


straight, resumed = train("straight"), train("resumed", "straight/checkpoint-1")
for model in (resumed, pickle.loads(pickle.dumps(straight))):
    assert all(value.equal(same) for value, same in zip(straight.parameters(), model.parameters(), strict=True))
"""


def test_peft_is_not_needed(base_folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_PEFT]
    done = subprocess.run(command, cwd=base_folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
