"""``accelerate`` alone, peft's preparation of quantized models, and what happens between a trainer's steps."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, load_checkpoint_in_model
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oftv2 import AdapterError, add_adapter, load_adapter, save_adapter, save_adapters_only, wrap_model
from trainer_runs import load

IDS = torch.arange(160).view(16, 10) % 128
ROWS = [{"input_ids": row, "labels": row} for row in IDS]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at names that peft still uses


@pytest.fixture
def nf4_base(tiny_llama, tmp_path):
    """Loads equal 4-bit models."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return lambda: load(tmp_path / "base", nf4=True)


@pytest.fixture(params=["float32", "nf4"])
def make_base(request):
    return request.getfixturevalue({"float32": "tiny_llama", "nf4": "nf4_base"}[request.param])


@pytest.fixture(autouse=True)
def _another_accelerator():
    """Lets each test set accelerate up in its own way."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    fields = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, **fields}
    return TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **fields)


# ------------------------------------------------------------------------------------------ accelerate


class Loop:
    """A training loop as accelerate's documentation writes it: accumulation, clipping, saved states."""

    def __init__(self, model: nn.Module, mixed_precision: str = "no") -> None:
        set_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        loader = torch.utils.data.DataLoader(IDS, batch_size=2)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )

    def run(self, start: int, stop: int) -> list[float]:
        losses = []
        self.model.train()
        for batch in list(self.loader)[start:stop]:
            with self.accelerator.accumulate(self.model):
                loss = self.model(input_ids=batch, labels=batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    assert norm > 0
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def test_a_loop_resumes_without_any_difference(make_base, tmp_path):
    straight = Loop(wrap_model(make_base(), block_size=16))
    straight.run(0, 4)
    straight.accelerator.save_state(str(tmp_path / "state"))
    expected = straight.run(4, 8)

    resumed = Loop(wrap_model(make_base(), block_size=16))
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.run(4, 8) == expected
    for (name, value), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name

    model = straight.accelerator.unwrap_model(straight.model).eval()
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(load_adapter(make_base(), tmp_path / "adapter").eval()(IDS).logits, model(IDS).logits)


def with_two_adapters(model: nn.Module) -> nn.Module:
    """One that trains, with a head, and another, whose values are no start's."""
    wrap_model(model, block_size=16, modules_to_save=["lm_head"])
    add_adapter(model, "other", block_size=8, init="normal", target_modules=["q_proj"])
    return model


def test_a_loop_resumes_from_its_adapters_only(make_base, tmp_path):
    straight = Loop(with_two_adapters(make_base()))
    save_adapters_only(straight.accelerator)
    save_adapters_only(straight.accelerator)  # a second time changes nothing
    straight.run(0, 4)
    straight.accelerator.save_state(str(tmp_path / "state"))
    expected = straight.run(4, 8)
    assert not list((tmp_path / "state").glob("model*"))
    assert {path.name for path in (tmp_path / "state" / "adapters").iterdir()} == {"default", "other"}

    resumed = Loop(with_two_adapters(make_base()))
    save_adapters_only(resumed.accelerator)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.run(4, 8) == expected
    for (name, value), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name
        assert value.requires_grad == other.requires_grad, name


def test_states_of_adapters_beside_a_plain_model(tiny_llama, tmp_path):
    """The plain one's weights are saved as ever, whichever comes first."""
    loop = Loop(wrap_model(tiny_llama(), block_size=16))
    plain = loop.accelerator.prepare(nn.Linear(4, 4))
    save_adapters_only(loop.accelerator)
    loop.accelerator.save_state(str(tmp_path))
    wanted = [value.detach().clone() for value in (*trainable(loop.model).values(), plain.weight)]
    with torch.no_grad():
        for value in (*trainable(loop.model).values(), plain.weight):
            value.add_(1)
    loop.accelerator.load_state(str(tmp_path))
    found = (*trainable(loop.model).values(), plain.weight)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))

    add_adapter(loop.accelerator.unwrap_model(loop.model), "new", block_size=8)
    with pytest.raises(AdapterError, match=r"holds the adapters \['default'\], and the model has \['default', 'new'\]"):
        loop.accelerator.load_state(str(tmp_path))


def test_what_saves_models_itself_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(AdapterError, match="FSDP1 saves models itself"):
        save_adapters_only(accelerator)


@pytest.mark.parametrize("size", ["10GB", "200KB"], ids=["one-file", "sharded"])
def test_save_model_holds_the_whole_model(tiny_llama, tmp_path, size):
    model = wrap_model(tiny_llama(), block_size=16, modules_to_save=["lm_head"])
    loop = Loop(model)
    loop.run(0, 4)
    loop.accelerator.save_model(loop.model, str(tmp_path), max_shard_size=size)
    fresh = wrap_model(tiny_llama(), block_size=16, modules_to_save=["lm_head"])
    load_checkpoint_in_model(fresh, str(tmp_path), strict=True)
    assert list(trainable(fresh)) == list(trainable(model))
    for (name, value), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_generators_stay_in_float32_in_mixed_precision(tiny_llama):
    loop = Loop(wrap_model(tiny_llama(), block_size=16), mixed_precision="bf16")
    losses = loop.run(0, 8)
    assert losses[-1] < losses[0]
    assert {value.dtype for value in trainable(loop.model).values()} == {torch.float32}
    other = pickle.loads(pickle.dumps(loop.accelerator.unwrap_model(loop.model)))
    assert all(torch.equal(value, trainable(other)[name]) for name, value in trainable(loop.model).items())


# ------------------------------------------------------------------------------------------ peft's preparation


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}])
def test_prepare_model_for_kbit_training_does_no_harm_before_or_after(nf4_base, tmp_path, options):
    runs = []
    for order in ("never", "before", "after"):
        model = nf4_base()
        if order == "before":
            model = prepare_model_for_kbit_training(model, **options)
        wrap_model(model, block_size=16)
        if order == "after":
            model = prepare_model_for_kbit_training(model, **options)
        names = list(trainable(model))
        assert names
        assert all(".generators." in name for name in names)
        Trainer(model, arguments(tmp_path), train_dataset=ROWS).train()
        runs.append(trainable(model))
    for run in runs[1:]:
        assert list(run) == list(runs[0])
        for name, value in run.items():
            assert value.any()
            torch.testing.assert_close(value, runs[0][name], rtol=1e-4, atol=1e-6)


def test_modules_to_save_go_on_training_after_the_preparation(nf4_base):
    model = wrap_model(nf4_base(), block_size=16, modules_to_save=["lm_head"])
    names = list(trainable(model))
    prepare_model_for_kbit_training(model)
    assert list(trainable(model)) == names


def test_gradient_checkpointing_leaves_a_frozen_adapter_frozen_beside_others_that_train(tiny_llama, tmp_path):
    save_adapter(wrap_model(tiny_llama(), block_size=16), tmp_path)
    model = load_adapter(tiny_llama(), tmp_path)
    model.lm_head.weight.requires_grad_(True)
    model.gradient_checkpointing_enable()
    assert list(trainable(model)) == ["lm_head.weight"]


def test_gradient_checkpointing_where_embeddings_return_more_than_a_tensor():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
    model = wrap_model(SwinForImageClassification(SwinConfig(**sizes)), block_size=8).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(pixel_values=torch.randn(1, 3, 16, 16)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_gradient_checkpointing_where_transformers_finds_no_embeddings():
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    shape = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    model = wrap_model(SegformerForImageClassification(SegformerConfig(**sizes, **shape)), block_size=8).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(pixel_values=torch.randn(1, 3, 32, 32)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# ------------------------------------------------------------------------------------------ between steps


class Generate(TrainerCallback):
    """Generates in each evaluation."""

    def __init__(self) -> None:
        self.texts: list[torch.Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            self.texts.append(model.generate(IDS[:2, :4], max_new_tokens=6, do_sample=False, pad_token_id=0))
        model.train(was_training)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generating_in_evaluations_sees_the_present_adapter_and_changes_nothing(make_base, tmp_path, checkpointing):
    straight = wrap_model(make_base(), block_size=16)
    Trainer(
        straight, arguments(tmp_path, max_steps=4, gradient_checkpointing=checkpointing), train_dataset=ROWS
    ).train()

    generate = Generate()
    model = wrap_model(make_base(), block_size=16)
    fields = arguments(tmp_path, max_steps=4, gradient_checkpointing=checkpointing, eval_strategy="steps", eval_steps=2)
    Trainer(model, fields, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=[generate]).train()
    for name, value in trainable(model).items():
        assert torch.equal(value, trainable(straight)[name])
    assert len(generate.texts) == 2
    save_adapter(model, tmp_path / "adapter")
    fresh = load_adapter(make_base(), tmp_path / "adapter").eval()
    expected = fresh.generate(IDS[:2, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(generate.texts[-1], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_trained_with_checkpointing_is_pickled(tiny_llama, tmp_path, reentrant):
    model = wrap_model(tiny_llama(), block_size=16)
    fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    Trainer(model, arguments(tmp_path, **fields), train_dataset=ROWS).train()
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)
    other.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None for value in trainable(other).values())
