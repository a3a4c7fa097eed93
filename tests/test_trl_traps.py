"""What TRL would do wrong to a wrapped model: undone without loss, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from conftest import randomize
from oftv2 import AdapterError, OFTLinear, merge, wrap_model
from trainer_runs import load
from trl_runs import IDS, PAIRS, TEXTS, arguments, dpo, generators, sft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at names that TRL still uses


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
