"""What the runs under DeepSpeed share: models, engines, and training beside a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import oftv2
from conftest import assert_close, randomize
from oftv2.partitioned import gathered, is_partitioned

IDS = torch.randint(1, 128, (4, 4, 12), generator=torch.Generator().manual_seed(0))
# Everything is partitioned again after each use, however small.
PARTITIONED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def config(stage: int, *, bf16: bool = False) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **(PARTITIONED if stage == 3 else {})},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model beside a folder, whole in every process."""
    unset_hf_deepspeed_config()
    return AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=dtype)


def partitioned_base(folder: Path, **options: Any) -> Any:
    """The model beside a folder, which transformers partitions while it loads it."""
    keep = HfDeepSpeedConfig(config(3, **options))
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    unset_hf_deepspeed_config()
    del keep
    assert all(map(is_partitioned, model.parameters()))
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def engine_of(model: nn.Module, stage: int, **options: Any) -> Any:
    return deepspeed.initialize(model=model, config=config(stage, **options), optimizer=adam(model))[0]


def train(engine: Any, batches: torch.Tensor) -> list[float]:
    """Steps, each on this process's half of a batch; the losses of whole batches."""
    losses, rank = [], torch.distributed.get_rank()
    engine.train()
    for batch in batches:
        rows = batch[2 * rank : 2 * rank + 2]
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        loss = loss.detach().float()
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / 2)
    return losses


def train_alone(model: Any, batches: torch.Tensor) -> list[float]:
    optimizer, losses = adam(model.train()), []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                found[name] = parameter.detach().float().clone()
    return found


def wrapped(model: Any, form: str | None = None, checkpoints: bool | None = None, **fields: Any) -> Any:
    oftv2.wrap_model(model, block_size=16, **fields)
    randomize(model, std=0.02)
    for module in model.modules():
        if isinstance(module, oftv2.OFTLinear):
            module.form = form
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    return model


def compare(model: Any, engine: Any, alone: Any, precision: float) -> None:
    losses, expected = train(engine, IDS), train_alone(alone, IDS)
    assert losses == pytest.approx(expected, abs=10 * precision)
    for name, value in values(model).items():
        assert value.isfinite().all()
        assert_close(name, value, alone.get_parameter(name).detach(), precision)
    engine.eval()
    with torch.no_grad():  # a kept rotation would be one from before the training
        for _ in range(2):
            logits = engine(input_ids=IDS[0]).logits
            assert_close("logits", logits, alone.eval()(input_ids=IDS[0]).logits, 10 * precision)
