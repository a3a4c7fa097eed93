"""Runs of transformers' and TRL's trainers in several processes; ``distributed_runs.py`` goes through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

import oftv2
import trainer_runs
import trl_runs
from conftest import randomize
from distributed_models import ROWS, base, forget_accelerate, generators, losses, run
from oftv2.callbacks import OFTCallback


def sharded(world: int, **config: Any) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": config} if world > 1 else {}


TRAINERS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "trainer-ddp": ("float32", None),
    "trainer-ddp-nf4": ("nf4-uint8", None),
    "trainer-fsdp": ("float32", {"activation_checkpointing": True}),
    "trainer-fsdp-sharded": ("bfloat16", {"state_dict_type": "SHARDED_STATE_DICT"}),
    "trainer-fsdp-nf4": ("nf4-bfloat16", {}),
}


def trainer(folder: Path, world: int, name: str, kind: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """A run whose second checkpoint of three is the best, and the same again from the first checkpoint on."""

    def train(place: str, **options: Any) -> Trainer:
        forget_accelerate()
        scores = iter([2.0, 1.0, 3.0] if place == "straight" else [1.0, 3.0])
        fields = {} if config is None else sharded(world, **config)
        args = trainer_runs.arguments(
            folder / f"{name}-{world}" / place,
            per_device_train_batch_size=4 // world, save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=place == "straight", metric_for_best_model="score", greater_is_better=False,
            **fields,
        )  # fmt: skip
        model = oftv2.wrap_model(base(folder, kind), block_size=16)
        made = Trainer(
            model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[OFTCallback()],
            compute_metrics=lambda _: {"score": next(scores)},
        )  # fmt: skip
        made.train(**options)
        return made

    straight = train("straight")
    straight.save_model(str(folder / f"{name}-{world}" / "final"))
    oftv2.save_adapter(straight.accelerator.unwrap_model(straight.model), folder / f"{name}-{world}" / "own")
    best = generators(straight.model)
    checkpoint = str(folder / f"{name}-{world}" / "straight" / "checkpoint-2")
    resumed = train("resumed", resume_from_checkpoint=checkpoint)
    return {
        "losses": losses(straight),
        "angles": [entry["oft/rotation_angle"] for entry in straight.state.log_history if "loss" in entry],
        "resumed": losses(resumed)[-4:],
        "best": best,
        "best_checkpoint": straight.state.best_model_checkpoint,
        "last": generators(resumed.model),
    }


for _name, (_kind, _config) in TRAINERS.items():
    run(_name)(
        lambda folder, rank, world, name=_name, kind=_kind, config=_config: trainer(folder, world, name, kind, config)
    )

PREFERENCES = {"sft-ddp": False, "dpo-ddp": False, "dpo-fsdp": True}


def trl(folder: Path, world: int, name: str, *, fsdp: bool) -> dict[str, Any]:
    """TRL's trainers; the reference of DPO is an adapter that has learned something."""
    forget_accelerate()
    model = oftv2.wrap_model(base(folder, "nf4-uint8" if name == "dpo-ddp" else "float32"), block_size=16)
    make = trl_runs.sft
    if name != "sft-ddp":
        make = trl_runs.dpo
        randomize(model, std=0.02)
    options = sharded(world) if fsdp else {}
    made = make(model, folder / f"{name}-{world}", per_device_train_batch_size=4 // world, **options)
    made.train()
    return {"losses": losses(made), "generators": generators(made.model)}


for _name, _fsdp in PREFERENCES.items():
    run(_name)(lambda folder, rank, world, name=_name, fsdp=_fsdp: trl(folder, world, name, fsdp=fsdp))
