"""Runs in two processes, and the same ones in a single process: ``python distributed_runs.py FOLDER``.

Everything is imported once, then the processes are forked. Each run leaves what it returns, or how it failed, in
``FOLDER/RUN-PROCESSES-RANK.pt``; a process stops at its first failure, for the others wait for it by then.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

import oftv2
import trainer_runs
import trl_runs
from byte_tokenizer import byte_tokenizer
from conftest import randomize
from oftv2.callbacks import OFTCallback

IDS = (torch.arange(240).view(24, 10) * 7) % 128
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
RUNS: dict[str, Callable[[Path, int, int], Any]] = {}


def make_base(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def base(folder: Path, kind: str) -> Any:
    """The model in ``folder / "base"``, in a dtype, or in NF4 whose bytes are stored as a dtype."""
    if not kind.startswith("nf4"):
        return LlamaForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, kind))
    dtype = torch.bfloat16 if kind == "nf4-bfloat16" else torch.float32
    storage = getattr(torch, kind.removeprefix("nf4-"))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage
    )
    return LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=config, device_map="cpu", dtype=dtype)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def generators(model: nn.Module) -> list[Tensor]:
    return [whole(parameter) for name, parameter in model.named_parameters() if ".generators." in name]


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(name: str) -> Callable[[Callable], Callable]:
    """Registers a run under a name."""
    return lambda function: RUNS.setdefault(name, function)


# ---------------------------------------------------------------------------------------------- plain torch


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PLAIN = {
    f"{how}-{kind}-{form}": (how, kind, form)
    for how, kind, form in [
        ("ddp", "float32", "weight"),
        ("ddp", "nf4-uint8", "input"),
        ("fsdp", "float32", "input"),
        ("fsdp", "float32", "weight"),
        ("fsdp", "bfloat16", "input"),
        ("fsdp", "nf4-uint8", "input"),
        ("fsdp", "nf4-bfloat16", "input"),
    ]
}


def plain(folder: Path, rank: int, world: int, how: str, kind: str, form: str) -> dict[str, Any]:
    """Three steps of SGD with gradient checkpointing, and everything that is done to the model afterwards."""
    model = oftv2.wrap_model(base(folder, kind), block_size=16).train()
    for layer in model.modules():
        if isinstance(layer, oftv2.OFTLayer):
            layer.form = form
    model.gradient_checkpointing_enable()
    outer = model
    if world > 1:
        outer = shard(model) if how == "fsdp" else nn.parallel.DistributedDataParallel(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(3):
        rows = IDS[4 * step : 4 * step + 4].chunk(world)[rank]
        loss = outer(input_ids=rows, labels=rows).loss
        loss.backward()
        found["losses"].append(loss.item())
        found["gradients"].append([whole(parameter.grad) for parameter in parameters])
        optimizer.step()
        optimizer.zero_grad()
    found["generators"] = generators(model)
    found["figures"] = oftv2.diagnostics(model)["model.layers.1.mlp.down_proj"].rotation_angle
    oftv2.save_adapter(model, folder / f"plain-{how}-{kind}-{form}-{world}")
    model.save_pretrained(folder / f"pretrained-{how}-{kind}-{form}-{world}", is_main_process=rank == 0)
    with torch.no_grad(), oftv2.disable_adapter(model):
        found["disabled"] = outer(input_ids=IDS[:2]).logits
    return found


for _name, _settings in PLAIN.items():
    run(_name)(lambda folder, rank, world, settings=_settings: plain(folder, rank, world, *settings))


@run("save-at-once")
def save_at_once(folder: Path, rank: int, world: int) -> bool:
    """Both processes save into one folder, over and over; what either reads in between is one of the two adapters."""
    model = oftv2.wrap_model(base(folder, "float32"), block_size=16)
    randomize(model, std=0.01 * (rank + 1))
    same = folder / f"at-once-{world}"
    for _ in range(20):
        oftv2.save_adapter(model, same)
        loaded = generators(oftv2.load_adapter(copy.deepcopy(oftv2.unwrap_model(copy.deepcopy(model))), same))
        assert min(abs(loaded[0].std().item() / (0.01 * (other + 1)) - 1) for other in range(world)) < 0.2
    return not [path for path in same.iterdir() if path.name.endswith(".tmp") and f".{os.getpid()}." in path.name]


# ---------------------------------------------------------------------------------------------- accelerate


def fsdp_on_cpu() -> None:
    """accelerate shards on accelerators alone; in these runs on a CPU too."""
    original = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = __init__


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)


class Loop:
    """A training loop as accelerate's documentation writes it."""

    def __init__(self, folder: Path, world: int, *, fsdp: bool) -> None:
        forget_accelerate()
        set_seed(0)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin if fsdp and world > 1 else None
        )
        model = oftv2.wrap_model(base(folder, "float32"), block_size=16)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = torch.utils.data.DataLoader(IDS, batch_size=4 // world)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def run(self, start: int, stop: int) -> list[float]:
        found = []
        self.model.train()
        for batch in list(self.loader)[start:stop]:
            with self.accelerator.accumulate(self.model):
                loss = self.model(input_ids=batch, labels=batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
            found.append(self.accelerator.gather(loss.detach()).mean().item())
        return found


def loop(folder: Path, world: int, *, fsdp: bool) -> dict[str, Any]:
    name = f"loop-{fsdp}-{world}"
    straight = Loop(folder, world, fsdp=fsdp)
    start = straight.run(0, 2)
    straight.accelerator.save_state(str(folder / name))
    end = straight.run(2, 6)
    model = straight.accelerator.unwrap_model(straight.model)
    state_dict = straight.accelerator.get_state_dict(straight.model)
    model.save_pretrained(
        folder / f"{name}-adapter", is_main_process=straight.accelerator.is_main_process, state_dict=state_dict
    )
    found = {"losses": start + end, "end": end, "generators": generators(model)}
    resumed = Loop(folder, world, fsdp=fsdp)
    resumed.accelerator.load_state(str(folder / name))
    return {**found, "resumed": resumed.run(2, 6)}


run("loop-ddp")(lambda folder, rank, world: loop(folder, world, fsdp=False))
run("loop-fsdp")(lambda folder, rank, world: loop(folder, world, fsdp=True))


# ---------------------------------------------------------------------------------------------- Trainer, TRL


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


# ---------------------------------------------------------------------------------------------- processes


def work(folder: Path, rank: int, world: int, port: int) -> None:
    """All runs, one after the other, in one of ``world`` processes."""
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "localhost"}
        os.environ |= {name: str(value) for name, value in names.items()}
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    fsdp_on_cpu()
    for name, function in RUNS.items():
        place = folder / f"{name}-{world}-{rank}.pt"
        try:
            torch.save(function(folder, rank, world), place)
        except BaseException:
            torch.save(traceback.format_exc(), place)
            os._exit(1)
    os._exit(0)  # at once: process groups are taken down in no order


def main(folder: Path) -> None:
    make_base(folder / "base")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    places = [(0, 1), (0, 2), (1, 2)]
    workers = [fork.Process(target=work, args=(folder, rank, world, port)) for rank, world in places]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
