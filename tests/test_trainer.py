"""An unchanged transformers ``Trainer`` around a wrapped model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer

from conftest import randomize
from oftv2 import load_adapter, merge, unwrap_model, wrap_model
from trainer_runs import IDS, ROWS, arguments, load


@pytest.fixture(params=["float32", "nf4"])
def make_base(request, tiny_llama, tmp_path):
    """Makes equal base models, in float32 or loaded as 4 bit."""
    if request.param == "float32":
        return tiny_llama
    tiny_llama().save_pretrained(tmp_path / "base")
    return lambda: load(tmp_path / "base", nf4=True)


def test_checkpoints_hold_the_adapter_only_and_resume_without_any_difference(make_base, tmp_path):
    straight = wrap_model(make_base(), block_size=16)
    trainer = Trainer(straight, arguments(tmp_path / "straight"), train_dataset=ROWS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    checkpoint = tmp_path / "straight" / "checkpoint-3"
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert "config.json" not in {path.name for path in checkpoint.iterdir()}
    assert all(".generators." in name for name in load_file(checkpoint / "model.safetensors"))

    resumed = wrap_model(make_base(), block_size=16)
    trainer = Trainer(resumed, arguments(tmp_path / "resumed"), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for (name, value), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name

    loaded = load_adapter(make_base(), tmp_path / "straight" / "checkpoint-6")
    assert torch.equal(loaded.eval()(IDS).logits, straight.eval()(IDS).logits)


def test_the_best_model_is_restored(tiny_llama, tmp_path):
    model = wrap_model(tiny_llama(), block_size=16)
    steps = iter([2.0, 1.0, 3.0])  # the second of three evaluations is the best
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=False,
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        compute_metrics=lambda _: {"score": next(steps)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_adapter(tiny_llama(), tmp_path / "checkpoint-4")
    assert torch.equal(best(IDS).logits, model.eval()(IDS).logits)
    last = load_adapter(tiny_llama(), tmp_path / "checkpoint-6")
    assert not torch.equal(last(IDS).logits, model(IDS).logits)


def test_class_and_pickling(tiny_llama):
    model = tiny_llama()
    cls = type(model)
    wrap_model(model, block_size=16)
    randomize(model)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, cls)
        assert torch.equal(other(IDS).logits, expected)
        assert type(merge(other)) is cls
    assert type(unwrap_model(model)) is cls


def test_a_merged_model_is_saved_whole(tiny_llama, tmp_path):
    model = wrap_model(tiny_llama(), block_size=16)
    randomize(model)
    expected = model(IDS).logits
    merge(model).save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_the_main_process_saves(tiny_llama, tmp_path):
    model = wrap_model(tiny_llama(), block_size=16)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
