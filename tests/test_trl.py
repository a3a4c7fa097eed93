"""Unchanged scripts of TRL, supervised finetuning and DPO, around a wrapped model."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer, kto_trainer

from byte_tokenizer import byte_tokenizer
from conftest import randomize
from oftv2 import AdapterError, OFTLinear, disable_adapter, load_adapter, merge, reference_model, wrap_model

TEXTS = Dataset.from_list([{"text": f"{n} and {n}"} for n in range(8)])
PAIRS = Dataset.from_list([{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(8)])
IDS = torch.arange(2, 42).view(4, 10)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at names that TRL still uses


@pytest.fixture
def base_folder(tiny_llama, tmp_path) -> Path:
    """A tiny Llama with a tokenizer, on disk as TRL expects a model."""
    tiny_llama(vocab_size=258, eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=["float32", "nf4"])
def make_base(request, base_folder):
    """Loads equal base models, in float32 or as 4 bit."""
    return lambda: load(base_folder, nf4=request.param == "nf4")


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


@pytest.fixture
def no_second_copy(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("TRL loads a second model")

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", refuse)


def generators(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".generators." in name}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


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


# ------------------------------------------------------------------------------------------ the reference of DPO


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


# ------------------------------------------------------------------------------------------ traps


@pytest.mark.parametrize("make_trainer", [sft, dpo])
def test_generators_are_back_in_float32_unrounded_before_anything_is_computed(make_trainer, base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=True), block_size=16)
    randomize(model)
    parameters = generators(model)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    trainer = make_trainer(model, tmp_path, max_steps=1, learning_rate=0.0)
    assert {value.dtype for value in parameters.values()} == {torch.bfloat16}  # TRL's doing; else this trap is gone
    with pytest.warns(UserWarning, match="back in float32") as caught:
        trainer.train()
    assert len([warning for warning in caught if "back in float32" in str(warning.message)]) == 1
    for name, value in generators(model).items():
        assert value is parameters[name]
        assert torch.equal(value, before[name])
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(value) for value in parameters.values()}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}


def test_small_updates_of_a_4_bit_model_are_not_lost(base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=True), block_size=16)
    randomize(model)
    before = {name: value.detach().clone() for name, value in generators(model).items()}
    with pytest.warns(UserWarning, match="back in float32"):
        sft(model, tmp_path, max_steps=1, learning_rate=1e-6).train()
    changed = torch.cat([(value != before[name]).flatten() for name, value in generators(model).items()])
    assert changed.float().mean() > 0.95


def test_generators_of_a_model_that_stays_in_float32_are_left_alone(base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=False), block_size=16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*back in float32")
        sft(model, tmp_path, max_steps=1).train()


LORA = [LoraConfig(task_type="CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")]


@pytest.mark.parametrize("config", LORA, ids=["default", "all-linear"])
def test_an_adapter_of_pefts_inside_is_refused(config, base_folder, tmp_path):
    model = wrap_model(load(base_folder, nf4=False), block_size=16)
    modules = [name for name, _ in model.named_modules()]
    for put in (
        lambda: SFTTrainer(model, arguments(SFTConfig, tmp_path), train_dataset=TEXTS, peft_config=config),
        lambda: DPOTrainer(model, args=arguments(DPOConfig, tmp_path), train_dataset=PAIRS, peft_config=config),
        lambda: get_peft_model(model, config),
        lambda: model.add_adapter(config, "other"),
    ):
        with pytest.raises(AdapterError, match="wrapped by oftv2, and peft would put its adapter"):
            put()
    assert [name for name, _ in model.named_modules()] == modules
    assert all(value.requires_grad for value in generators(model).values())
    assert model.peft_config["default"]["block_size"] == 16  # what trackers log
    assert any("lora_A" in name for name, _ in get_peft_model(merge(model), LORA[0]).named_modules())


def test_an_adapter_on_the_head_is_refused_where_the_head_is_never_called(base_folder, tmp_path):
    def wrapped() -> nn.Module:
        return wrap_model(load(base_folder, nf4=False), block_size=16, target_modules=["q_proj", "lm_head"])

    for make_trainer in (sft, dpo):
        with pytest.raises(AdapterError, match=r"lm_head: .* exclude_modules=\['lm_head'\]"):
            make_trainer(wrapped(), tmp_path / "trl").train()

    model = wrapped()  # transformers' own Trainer calls it
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments(TrainingArguments, tmp_path / "trainer"), train_dataset=rows).train()
    assert isinstance(model.lm_head, OFTLinear)
    assert model.lm_head.generators["default"].all()

    merge(model)
    sft(model.requires_grad_(True), tmp_path / "plain", max_steps=1).train()  # no hook is left behind


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
import sys

sys.modules["peft"] = None
import trl, transformers
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
"""


def test_peft_is_not_needed(base_folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_PEFT]
    done = subprocess.run(command, cwd=base_folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
