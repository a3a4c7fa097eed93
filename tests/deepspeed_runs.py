"""Runs under DeepSpeed in one of two processes that test_deepspeed.py starts: ``deepspeed_runs.py FOLDER STAGE``.

Each function is a test. All processes go through all of them, and any that fails ends its process with a traceback.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import oftv2
from conftest import randomize
from deepspeed_models import IDS, adam, base, compare, config, engine_of, train, values, wrapped
from deepspeed_partitions import PARTITIONS
from oftv2 import AdapterError
from oftv2.adapter import count_parameters
from oftv2.partitioned import gathered
from trainer_runs import ROWS, arguments, load

# ------------------------------------------------------------------------------------------ training


def trains_as_one_process_does(folder: Path, stage: int) -> None:
    for form, checkpoints in ((None, None), ("weight", True), ("weight", False), ("input", True), ("input", False)):
        alone = wrapped(base(folder), None, checkpoints)
        model = wrapped(base(folder), None if stage == 3 else form, checkpoints)  # no weight form: hooks gather it
        compare(model, engine_of(model, stage), alone, 1e-4)


def trains_a_16_bit_base(folder: Path, stage: int) -> None:
    """In DeepSpeed's bf16 too, generators start, and stay, in float32; its gradients are rounded to bf16."""
    for bf16, precision in ((False, 1e-2), (True, 5e-2)) if stage else ((False, 1e-2),):  # bf16 at stage 0 is coarse
        alone, model = (wrapped(base(folder, torch.bfloat16)) for _ in range(2))
        start = values(model)
        engine = engine_of(model, stage, bf16=bf16)
        generators = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in generators} == {torch.float32}
        assert all(torch.equal(value, start[name]) for name, value in values(model).items())
        compare(model, engine, alone, precision)
        assert {p.dtype for p in generators} == {torch.float32}


def keeps_generators_of_any_model_in_float32(folder: Path, stage: int) -> None:
    """DeepSpeed's bf16 casts all parameters of a model; what is trained are the first process's from before."""
    model = oftv2.wrap_model(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), block_size=16)
    randomize(model, std=0.02, seed=0)
    start = values(model)
    randomize(model, std=0.02, seed=torch.distributed.get_rank())
    engine = engine_of(model, stage, bf16=True)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.equal(value, start[name]) for name, value in values(model).items())
    engine.backward(engine(torch.randn(4, 64, dtype=torch.bfloat16)).square().mean())
    engine.step()
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in values(model).items())


def refuses_adapters_that_would_not_be_trained(folder: Path, stage: int) -> None:
    """Nor is anything loaded over what the optimizer has copies of: they would be written over it."""
    oftv2.save_adapter(wrapped(base(folder)), place := folder / str(torch.distributed.get_rank()))
    for bf16 in (False, True):
        model = wrapped(base(folder))
        engine = engine_of(model, stage, bf16=bf16)
        before = values(model)
        refused: list[Callable[[], Any]] = [
            lambda: oftv2.add_adapter(model, "other", block_size=8),  # noqa: B023
            lambda: oftv2.load_adapter(model, place, adapter_name="other"),  # noqa: B023
        ]
        for call in refused:
            with pytest.raises(AdapterError, match=r"^this Llama\w+ is in a DeepSpeed engine, .* before deepspeed\.i"):
                call()
        if stage or bf16:  # else the optimizer is torch's own, which keeps no copy
            for load_over in (oftv2.load_adapter, oftv2.hotswap_adapter):
                with pytest.raises(AdapterError, match=r"in a DeepSpeed engine, whose next step would write"):
                    load_over(model, place)
        else:
            oftv2.load_adapter(model, place)
        assert oftv2.adapter_names(model) == ["default"]
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())
        del engine
    plain = base(folder)
    keep = engine_of(plain, stage)
    with pytest.raises(AdapterError, match=r"^this LlamaForCausalLM is in a DeepSpeed engine"):
        oftv2.wrap_model(plain, block_size=16)
    del keep


def trains_an_nf4_base(folder: Path, stage: int) -> None:
    alone, model = (wrapped(load(folder.parent / "base", nf4=True)) for _ in range(2))
    compare(model, engine_of(model, stage), alone, 1e-4)
    oftv2.save_adapter(model, folder / str(torch.distributed.get_rank()))
    loaded = oftv2.load_adapter(load(folder.parent / "base", nf4=True), folder / "0", trainable=True)
    assert all(torch.equal(value, values(model)[name]) for name, value in values(loaded).items())


# ------------------------------------------------------------------------------------------ files


def saves_and_loads(folder: Path, stage: int) -> None:
    for name, fields in {"plain": {}, "head": {"modules_to_save": ["lm_head"]}}.items():
        model = wrapped(base(folder), **fields)
        engine, place = engine_of(model, stage), folder / f"saved-{name}"
        train(engine, IDS)
        trained = values(model)
        if stage == 3 or torch.distributed.get_rank() == 0:
            oftv2.save_adapter(model, place)
        torch.distributed.barrier()
        loaded = oftv2.load_adapter(base(folder), place, trainable=True)
        assert {name: value.shape for name, value in values(loaded).items()} == {n: v.shape for n, v in trained.items()}
        assert all(torch.equal(value, trained[name]) for name, value in values(loaded).items())
        figures = oftv2.diagnostics(model)
        assert figures == oftv2.diagnostics(loaded)
        assert count_parameters(model) == count_parameters(loaded)


# ------------------------------------------------------------------------------------------ trainers


def frozen_in(checkpoint: Path) -> list[str]:
    """Names of the base's parameters in a checkpoint of DeepSpeed's."""
    found: list[str] = []
    for path in checkpoint.rglob("*model_states.pt"):
        saved = torch.load(path, weights_only=False)
        found += [key for key in saved["module"] if ".generators." not in key]
        found += saved.get("frozen_param_fragments") or []
    return found


def resumes_and_restores_in_trainer(folder: Path, stage: int) -> None:
    gathers = {"stage3_gather_16bit_weights_on_model_save": stage == 3}
    for bf16 in (False, True):
        setup = {**config(stage, bf16=bf16), "gradient_clipping": "auto"}
        setup["zero_optimization"] = {**setup["zero_optimization"], **(gathers if bf16 else {})}

        def make(name: str, **fields: Any) -> Any:
            options = arguments(folder / f"{name}-{bf16}", deepspeed=copy.deepcopy(setup), bf16=bf16, **fields)  # noqa: B023
            model = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
            oftv2.wrap_model(model, block_size=16)
            return model, options

        scores: Any = iter([{"score": 1.0}, {"score": 2.0}])
        model, options = make(
            "straight",
            eval_strategy="steps",
            eval_steps=3,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=False,
        )
        trainer = Trainer(
            model,
            options,
            train_dataset=ROWS,
            eval_dataset=ROWS[:2],
            compute_metrics=partial(lambda scores, _: next(scores), scores),
        )
        trainer.train()
        first, last = (folder / f"straight-{bf16}" / f"checkpoint-{step}" for step in (3, 6))
        torch.distributed.barrier()
        assert not frozen_in(first)
        trained = values(model)
        best, end = (load_file(checkpoint / "model.safetensors") for checkpoint in (first, last))
        assert all(torch.equal(value, best[name]) for name, value in trained.items())
        assert not any(torch.equal(best[name], end[name]) for name in best)

        resumed, options = make("resumed")
        trainer = Trainer(resumed, options, train_dataset=ROWS)
        trainer.train(resume_from_checkpoint=str(first))
        assert all(torch.equal(value, end[name]) for name, value in values(resumed).items())
        trainer.save_model(str(folder / f"final-{bf16}"))
        torch.distributed.barrier()
        loaded = oftv2.load_adapter(base(folder), folder / f"final-{bf16}", trainable=True)
        assert all(torch.equal(value, end[name]) for name, value in values(loaded).items())
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()


def resumes_in_accelerate(folder: Path, stage: int) -> None:
    def loop() -> tuple[Accelerator, Any, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(stage)))
        model = wrapped(base(folder))
        engine, optimizer = accelerator.prepare(model, adam(model))
        oftv2.save_adapters_only(accelerator)
        return accelerator, engine, optimizer

    def steps(accelerator: Accelerator, engine: Any, optimizer: Any, batches: torch.Tensor) -> list[float]:
        losses, rank = [], torch.distributed.get_rank()
        engine.train()
        for batch in batches:
            rows = batch[2 * rank : 2 * rank + 2]
            loss = engine(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    accelerator, engine, _ = straight = loop()
    steps(*straight, IDS[:2])
    accelerator.save_state(str(folder / "state"))
    torch.distributed.barrier()
    assert not frozen_in(folder / "state")
    expected = steps(*straight, IDS[2:])
    resumed = loop()
    resumed[0].load_state(str(folder / "state"))
    assert steps(*resumed, IDS[2:]) == expected
    model, again = accelerator.unwrap_model(engine), resumed[0].unwrap_model(resumed[1])
    assert all(torch.equal(value, values(again)[name]) for name, value in values(model).items())
    whole, first = accelerator.get_state_dict(engine), accelerator.is_main_process
    model.save_pretrained(folder / "accelerate", is_main_process=first, state_dict=whole)
    torch.distributed.barrier()
    loaded = oftv2.load_adapter(base(folder), folder / "accelerate", trainable=True)
    assert all(torch.equal(value, values(model)[name]) for name, value in values(loaded).items())
    AcceleratorState._reset_state(reset_partial_state=True)


def leaves_other_engines_alone(folder: Path, stage: int) -> None:
    model = base(folder).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    engine_of(model, stage).save_checkpoint(str(folder / "plain"))
    assert frozen_in(folder / "plain")


def keeps_several_adapters(folder: Path, stage: int) -> None:
    """An adapter that does not train is in the checkpoint too."""

    def make() -> Any:
        model = wrapped(base(folder))
        return oftv2.add_adapter(model, "other", block_size=8, init="normal", target_modules=["q_proj"])

    model = make()
    engine = engine_of(model, stage)
    train(engine, IDS[:1])
    engine.save_checkpoint(str(folder / "several"))
    oftv2.save_adapter(model, folder / "other", adapter_name="other")
    torch.distributed.barrier()
    other = {key for key in load_file(folder / "other" / "adapter_model.safetensors") if "q_proj" in key}
    assert len(other) == 2
    resumed = make()
    again = engine_of(resumed, stage)
    again.load_checkpoint(str(folder / "several"))
    for (name, one), two in zip(model.named_parameters(), resumed.parameters(), strict=True):
        with gathered([one]), gathered([two]):
            assert torch.equal(one, two), name


EVERY_STAGE: list[Callable[[Path, int], None]] = [
    trains_as_one_process_does,
    trains_a_16_bit_base,
    keeps_generators_of_any_model_in_float32,
    refuses_adapters_that_would_not_be_trained,
    trains_an_nf4_base,
    saves_and_loads,
    keeps_several_adapters,
    leaves_other_engines_alone,
    resumes_in_accelerate,
    resumes_and_restores_in_trainer,
]


def main(folder: Path, stage: int, only: str) -> None:
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    for run in EVERY_STAGE + (PARTITIONS if stage == 3 else []):
        if only in run.__name__:
            (folder / run.__name__).mkdir(exist_ok=True)
            torch.distributed.barrier()
            torch.manual_seed(0)
            print(f"{run.__name__}, stage {stage}", flush=True)
            run(folder / run.__name__, stage)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:]))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the other process may be waiting for this one
