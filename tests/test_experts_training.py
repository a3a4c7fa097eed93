"""Mixtures whose experts are rotated, under ``Trainer`` with attention in NF4, and compiled whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

import oftv2
from conftest import assert_close, randomize
from mixtures import WRAPPED, model_of
from oftv2 import OFTExperts, QuantOFTLinear
from trainer_runs import ROWS, arguments, load


@pytest.mark.filterwarnings("ignore::oftv2.PeftFormatWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_saves_adapters_only_and_resumes_exactly(checkpointing, tmp_path):
    model_of().save_pretrained(tmp_path / "base")

    def train(place: str, **options: Any) -> Any:
        model = oftv2.wrap_model(load(tmp_path / "base", nf4=True), **WRAPPED)
        args = arguments(tmp_path / place, gradient_checkpointing=checkpointing)
        Trainer(model, args, train_dataset=ROWS).train(**options)
        return model

    straight = train("straight")
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert {type(m) for m in straight.modules() if isinstance(m, oftv2.OFTLayer)} == {OFTExperts, QuantOFTLinear}
    trained = {name: p for name, p in straight.named_parameters() if p.requires_grad}
    assert sum("experts" in name for name in trained) == 2
    for name, value in trained.items():
        assert value.any(), name
        assert torch.equal(value, resumed.get_parameter(name)), name
    saved = tmp_path / "straight" / "checkpoint-6" / "model.safetensors"
    assert saved.stat().st_size < 1.1 * sum(value.nbytes for value in trained.values()) + 10_000
    loaded = oftv2.load_adapter(load(tmp_path / "base", nf4=True), saved.parent)
    ids = ROWS[0]["input_ids"][None]
    assert torch.equal(loaded.eval()(ids).logits, straight.eval()(ids).logits)


def test_a_compiled_mixture_gives_equal_losses_and_gradients():
    model = oftv2.wrap_model(model_of(num_hidden_layers=1), **WRAPPED).train()
    randomize(model)
    ids = ROWS[0]["input_ids"][None]
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):  # inductor agrees, in 40 s
        loss = call(ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"loss": loss.detach(), **gradients})
        model.zero_grad()
    for name, expected in found[0].items():
        assert_close(name, found[1][name], expected, 1e-5)
