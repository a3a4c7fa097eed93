"""Runs under DeepSpeed ZeRO-3 with what only partitioned parameters bring; ``deepspeed_runs.py`` goes through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import oftv2
from conftest import assert_close, randomize
from deepspeed_models import IDS, base, compare, config, engine_of, partitioned_base, train_alone, values, wrapped
from oftv2 import AdapterError
from peers import output


def trains_a_base_that_was_partitioned_while_it_loaded(folder: Path, stage: int) -> None:
    compare(model := wrapped(partitioned_base(folder)), engine_of(model, 3), wrapped(base(folder)), 1e-4)
    grouped = wrapped(partitioned_base(folder), group_projections=True)
    compare(grouped, engine_of(grouped, 3), wrapped(base(folder)), 1e-4)
    model = wrapped(partitioned_base(folder, bf16=True))
    engine = engine_of(model, 3, bf16=True)
    compare(model, engine, wrapped(base(folder, torch.bfloat16)), 5e-2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def refuses_what_partitions_do_not_allow(folder: Path, stage: int) -> None:
    model = wrapped(base(folder), modules_to_save=["lm_head"])
    engine_of(model, stage)
    place, rank = folder / "refused", torch.distributed.get_rank()
    with pytest.raises(AdapterError, match=r"is partitioned by DeepSpeed ZeRO-3, and its values are not at hand"):
        model.save_pretrained(place)
    assert not place.exists()
    layer = r"^model\.layers\.0\.self_attn\.q_proj: \S+ is partitioned by DeepSpeed ZeRO-3: call save_adapter"
    with pytest.raises(AdapterError, match=layer):
        oftv2.merge(model)
    assert any(isinstance(module, oftv2.OFTLayer) for module in model.modules())
    head = r"lm_head\.weight is partitioned by DeepSpeed ZeRO-3"
    with pytest.raises(AdapterError, match=head), oftv2.disable_adapter(model):
        pass
    model.save_pretrained(place / str(rank), state_dict=dict(values(model)))
    assert {tuple(v.shape) for v in load_file(place / str(rank) / "adapter_model.safetensors").values()} == {
        tuple(v.shape) for v in values(model).values()
    }


def loads_into_a_partitioned_base(folder: Path, stage: int) -> None:
    source = wrapped(base(folder), modules_to_save=["lm_head"])
    train_alone(source, IDS)
    place = folder / f"source-{torch.distributed.get_rank()}"
    oftv2.save_adapter(source, place)
    other = base(folder)
    nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)
    oftv2.save_adapter(wrapped(other), place / "other")

    model = partitioned_base(folder)
    with pytest.raises(AdapterError, match=r"q_proj: the base weights differ by"):
        oftv2.load_adapter(model, place / "other")
    oftv2.load_adapter(model, place)
    engine = deepspeed.initialize(model=model, config=config(3))[0]
    engine.eval()
    with torch.no_grad():
        expected = source.eval()(input_ids=IDS[0]).logits
        assert_close("logits", engine(input_ids=IDS[0]).logits, expected, 1e-5)
    oftv2.save_adapter(model, folder / "again")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (place, folder / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(AdapterError, match=r"q_proj: the base weights differ by"):  # its sketches were taken
        oftv2.load_adapter(oftv2.unwrap_model(other), folder / "again")


def wraps_partitioned_layers_of_other_kinds(folder: Path, stage: int) -> None:
    """GPT-2's ``Conv1D``, whose size is its weight's, and convolutions, which read their weight without a call."""

    def gpt2() -> Any:
        torch.manual_seed(2)
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=16))

    def convolution() -> Any:
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(4, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 4))

    for make, inputs, fields in (
        (gpt2, IDS[0], {}),
        (convolution, torch.randn(2, 4, 3, 3), {"target_modules": ["0", "2", "4"]}),
    ):
        options: Any = {"block_size": 8, **fields}
        alone = oftv2.wrap_model(make(), **options)
        plain = make()
        with deepspeed.zero.Init(config_dict_or_path=config(3)):
            model = make()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), plain.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    parameter.copy_(value)
        oftv2.wrap_model(model, **options)
        for each in (alone, model):
            randomize(each)
            each.eval()  # without GPT-2's dropout
        engine = engine_of(model, 3)
        y, expected = (output(each(inputs)) for each in (engine, alone))
        assert_close("output", y.detach(), expected.detach(), 1e-5)
        engine.backward(y.square().mean())
        expected.square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = deepspeed.utils.safe_get_full_grad(parameter)
                assert_close(name, gradient, alone.get_parameter(name).grad, 1e-4)


PARTITIONS: list[Callable[[Path, int], None]] = [
    trains_a_base_that_was_partitioned_while_it_loaded,
    refuses_what_partitions_do_not_allow,
    loads_into_a_partitioned_base,
    wraps_partitioned_layers_of_other_kinds,
]
