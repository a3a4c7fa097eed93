"""Options of transformers' ``Trainer`` that change how a model is called, made, saved or loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from byte_tokenizer import byte_tokenizer
from conftest import randomize, trainable
from oftv2 import AdapterError, add_adapter, load_adapter, set_adapter, wrap_model
from trainer_runs import IDS, ROWS, arguments, load

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "model.safetensors"}


@pytest.fixture(params=["float32", "nf4", "int8"])
def make_base(request, tiny_llama, tmp_path):
    """Makes equal base models, in float32 or quantized."""
    if request.param == "float32":
        return tiny_llama
    tiny_llama().save_pretrained(tmp_path / "base")
    return lambda: load(tmp_path / "base", **{request.param: True})


def train(model: nn.Module, folder: Path, checkpoint: Path | None = None, **fields: Any) -> Trainer:
    trainer = Trainer(model, arguments(folder, **fields), train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def assert_trained(model: nn.Module) -> None:
    generators = [value for name, value in model.named_parameters() if ".generators." in name and value.requires_grad]
    assert generators
    assert all(value.any() and value.dtype == torch.float32 for value in generators)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, same), name


def with_head(make_base: Any) -> nn.Module:
    return wrap_model(make_base(), block_size=16, modules_to_save=["lm_head", "norm"])


def with_two_adapters(make_base: Any) -> nn.Module:
    model = wrap_model(make_base(), block_size=16)
    add_adapter(model, "style", block_size=8, modules_to_save=["lm_head"])
    randomize(model)
    set_adapter(model, "style")
    return model


class TestCheckpoints:
    @pytest.mark.parametrize("wrap", [with_head, with_two_adapters])
    def test_resuming_restores_all_that_trains_and_warns_of_nothing(self, wrap, make_base, tmp_path, caplog):
        straight = wrap(make_base)
        train(straight, tmp_path / "straight")
        checkpoint = tmp_path / "straight" / "checkpoint-3"
        resumed = wrap(make_base)
        caplog.clear()
        train(resumed, tmp_path / "resumed", checkpoint)
        assert_same(straight, resumed)
        assert not [record for record in caplog.records if "missing keys" in record.getMessage()]
        assert {path.name for path in checkpoint.iterdir()} >= ADAPTER
        kept = load_file(checkpoint / "model.safetensors")
        assert trainable(straight) <= set(kept)
        assert {name for name in kept if ".generators." not in name} <= {
            "lm_head.weight", "model.norm.weight", "oftv2.default.lm_head.weight", "oftv2.style.lm_head.weight"
        }  # fmt: skip

    def test_a_model_whose_generators_mean_something_else_does_not_resume(self, tiny_llama, tmp_path):
        def wrapped(active: Any = "default", base: float = 1.0, **fields: Any) -> nn.Module:
            model = tiny_llama()
            model.model.layers[0].mlp.gate_proj.weight.data *= base
            wrap_model(model, block_size=16, **fields)
            add_adapter(model, "style", block_size=16, scale_generators=fields.get("parametrization") == "cayley")
            return set_adapter(model, active)

        checkpoint = tmp_path / "checkpoint"
        wrapped().save_pretrained(checkpoint)
        fresh = {"constraint": 0.1, "parametrization": "cayley"}
        cases = {
            "neumann_terms of the adapter 'default': 4 there, 6 here": {"neumann_terms": 6},
            "constraint of the adapter 'default': None there, 0.1 here": fresh,
            "parametrization of the adapter 'default': 'cayley_neumann' there, 'cayley' here": fresh,
            "scale_generators of the adapter 'style': False there, True here": fresh,
            r"active adapters: \['default'\] there, \['style', 'default'\] here": {"active": ["style", "default"]},
            "mlp.gate_proj: the base weights differ by": {"base": -1.0},
            "adapted in one of them alone: model.layers.0.mlp": {"target_modules": ["q_proj"]},
        }
        for message, fields in cases.items():
            trainer = Trainer(wrapped(**fields), arguments(tmp_path / "resumed"), train_dataset=ROWS)
            with pytest.raises(AdapterError, match=message):
                trainer.train(resume_from_checkpoint=str(checkpoint))
        with pytest.raises(AdapterError, match=message):
            transformers.trainer.deepspeed_load_checkpoint(SimpleNamespace(module=trainer.model), str(checkpoint))
        tensors = load_file(checkpoint / "model.safetensors")
        save_file(tensors, checkpoint / "model.safetensors")  # as it was before checkpoints noted anything
        trainer._load_from_checkpoint(str(checkpoint))

    def test_the_best_model_has_its_trained_modules_back(self, make_base, tmp_path):
        model = with_head(make_base)
        steps = iter([3.0, 1.0, 2.0])  # the first of three evaluations is the best
        fields = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
        trainer = Trainer(
            model,
            arguments(tmp_path, metric_for_best_model="score", greater_is_better=True, **fields),
            train_dataset=ROWS,
            eval_dataset=ROWS[:2],
            compute_metrics=lambda _: {"score": next(steps)},
        )
        trainer.train()
        best = load_adapter(make_base(), tmp_path / "checkpoint-2").eval()
        assert torch.equal(best(IDS).logits, model.eval()(IDS).logits)
        assert not torch.equal(model.lm_head.weight, make_base().lm_head.weight)

    def test_an_adapter_is_one_file_however_small_a_shard_may_be(self, tiny_llama, tmp_path):
        model = with_two_adapters(tiny_llama)
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        top = ADAPTER | {"default"}
        assert {path.name for path in tmp_path.iterdir()} == top
        assert (tmp_path / "adapter_model.safetensors").stat().st_size > 10_000
        for place, name in {"": "style", "default": "default"}.items():
            set_adapter(model, name)
            loaded = load_adapter(tiny_llama(), tmp_path / place)
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_stopped_early_with_the_best_of_few_checkpoints(self, tiny_llama, tmp_path):
        model = wrap_model(tiny_llama(), block_size=16)
        fields = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
        scores = iter([2.0, 3.0, 1.0, 0.0])
        trainer = Trainer(
            model,
            arguments(tmp_path, save_total_limit=1, metric_for_best_model="score", greater_is_better=True, **fields),
            train_dataset=ROWS,
            eval_dataset=ROWS[:2],
            compute_metrics=lambda _: {"score": next(scores)},
            callbacks=[EarlyStoppingCallback(2)],
        )
        trainer.train()
        assert trainer.state.global_step == 4
        assert "checkpoint-2" in {path.name for path in tmp_path.iterdir()}
        best = load_adapter(tiny_llama(), tmp_path / "checkpoint-2").eval()
        assert torch.equal(best(IDS).logits, model.eval()(IDS).logits)


def test_compiled_it_saves_and_resumes_as_it_does_uncompiled(tiny_llama, tmp_path):
    torch._dynamo.reset()
    fields = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2, "save_steps": 1}
    model = wrap_model(tiny_llama(num_hidden_layers=1), block_size=16)
    train(model, tmp_path / "straight", **fields)
    assert_trained(model)
    plain = wrap_model(tiny_llama(num_hidden_layers=1), block_size=16)
    train(plain, tmp_path / "plain", max_steps=2)
    for value, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5)
    resumed = wrap_model(tiny_llama(num_hidden_layers=1), block_size=16)
    train(resumed, tmp_path / "resumed", tmp_path / "straight" / "checkpoint-1", **fields)
    assert_same(model, resumed)
    loaded = load_adapter(tiny_llama(num_hidden_layers=1), tmp_path / "straight" / "checkpoint-2").eval()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_a_batch_size_that_is_found(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda *_, **__: None)  # slow, and not at stake
    model = wrap_model(tiny_llama(), block_size=16)
    trainer = Trainer(
        model,
        arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=2),
        train_dataset=ROWS,
    )
    sizes: list[int] = []
    step = trainer.training_step

    def out_of_memory(model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *rest)

    trainer.training_step = out_of_memory
    trainer.train()
    assert sizes == [4, 3, 3]
    assert_trained(model)


def test_a_function_that_makes_the_model_anew_for_each_run(tiny_llama, tmp_path):
    trainer = Trainer(
        args=arguments(tmp_path), model_init=lambda: wrap_model(tiny_llama(), block_size=16), train_dataset=ROWS
    )
    trainer.train()
    first = trainer.model
    assert_trained(first)
    once = {name: value.detach().clone() for name, value in first.named_parameters()}
    trainer.train()
    assert trainer.model is not first
    assert_trained(trainer.model)
    assert all(torch.equal(value, once[name]) for name, value in first.named_parameters())
    loaded = load_adapter(tiny_llama(), tmp_path / "checkpoint-6").eval()
    assert torch.equal(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_encoder_decoder_that_predicts_by_generating(checkpointing, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        return T5ForConditionalGeneration(T5Config(**sizes, **tokens, initializer_factor=4.0))

    rows = [{"input_ids": row, "labels": row.flip(0)} for row in IDS[:4] % 60 + 2]
    inputs = torch.stack([row["input_ids"] for row in rows])
    predicted: list[torch.Tensor] = []

    def score(prediction: Any) -> dict[str, float]:
        predicted.append(torch.from_numpy(prediction.predictions))
        return {"score": -float(len(predicted))}  # the first is the best

    def generated(checkpoint: str) -> torch.Tensor:
        model = load_adapter(make(), tmp_path / checkpoint).eval()
        return model.generate(inputs, do_sample=False, max_length=12)

    fields = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 3}
    fields |= {"metric_for_best_model": "score", "greater_is_better": True, "gradient_checkpointing": checkpointing}
    trainer = Seq2SeqTrainer(
        wrap_model(make(), block_size=8),
        arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, **fields),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=score,
    )
    trainer.train()
    trainer.predict(rows)
    first, second = generated("checkpoint-3"), generated("checkpoint-6")
    assert not torch.equal(first, second)
    for found, expected in zip(predicted, (first, second, first), strict=True):
        assert torch.equal(found[:, :12], expected)


def test_noise_on_embeddings_and_batches_by_length(make_base, tmp_path):
    rows = [{"input_ids": row[: 4 + i], "labels": row[: 4 + i]} for i, row in enumerate(IDS)]
    model = wrap_model(make_base(), block_size=16)
    hooks = len(model.model.embed_tokens._forward_hooks)
    trainer = Trainer(
        model,
        arguments(tmp_path, neftune_noise_alpha=5.0, train_sampling_strategy="group_by_length"),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer()),
    )
    trainer.train()
    assert_trained(model)
    assert len(model.model.embed_tokens._forward_hooks) == hooks
