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
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distributed_trainers  # noqa: F401  (registers its runs)
import mixtures
import oftv2
from conftest import randomize
from distributed_models import (
    IDS,
    RUNS,
    base,
    forget_accelerate,
    fsdp_on_cpu,
    generators,
    make_base,
    run,
    whole,
)
from oftv2 import sharding

# ---------------------------------------------------------------------------------------------- plain torch


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: Any, how: str, rank: int, world: int) -> tuple[nn.Module, dict[str, Any]]:
    """Three steps of SGD with gradient checkpointing: the model as it is distributed, and what the steps found."""
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
    return outer, {**found, "generators": generators(model)}


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
    """Three steps, and everything that is done to the model afterwards."""
    model = oftv2.wrap_model(base(folder, kind), block_size=16).train()
    for layer in model.modules():
        if isinstance(layer, oftv2.OFTLayer):
            layer.form = form
    outer, found = train(model, how, rank, world)
    found["figures"] = oftv2.diagnostics(model)["model.layers.1.mlp.down_proj"].rotation_angle
    oftv2.save_adapter(model, folder / f"plain-{how}-{kind}-{form}-{world}")
    model.save_pretrained(folder / f"pretrained-{how}-{kind}-{form}-{world}", is_main_process=rank == 0)
    with torch.no_grad(), oftv2.disable_adapter(model):
        found["disabled"] = outer(input_ids=IDS[:2]).logits
    return found


for _name, _settings in PLAIN.items():
    run(_name)(lambda folder, rank, world, settings=_settings: plain(folder, rank, world, *settings))


def experts(folder: Path, rank: int, world: int, how: str) -> dict[str, Any]:
    """Three steps of a mixture whose experts are rotated; each process's tokens go to other ones."""
    model = oftv2.wrap_model(mixtures.model_of(), **mixtures.WRAPPED).train()
    randomize(model)
    _, found = train(model, how, rank, world)
    oftv2.save_adapter(model, folder / f"experts-{how}-{world}", format="oftv2")
    return found


run("experts-ddp")(lambda folder, rank, world: experts(folder, rank, world, "ddp"))
run("experts-fsdp")(lambda folder, rank, world: experts(folder, rank, world, "fsdp"))


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


@run("save-late")
def save_late(folder: Path, rank: int, world: int) -> list[str]:
    """The first process saves a sharded model, and waits for the second; what it is warned of."""
    if world == 1:
        return []
    model = shard(oftv2.wrap_model(base(folder, "float32"), block_size=16))
    patience, sharding.PATIENCE = sharding.PATIENCE, 1.5
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            time.sleep(4 * rank)
            oftv2.save_adapter(model, folder / "late")
            sharding.PATIENCE = 60.0
            oftv2.save_adapter(model, folder / "late")  # nobody waits long
    finally:
        sharding.PATIENCE = patience
    return [str(warning.message) for warning in caught if "waited" in str(warning.message)]


# ---------------------------------------------------------------------------------------------- accelerate


STATE_DICT_TYPES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


class Loop:
    """A training loop as accelerate's documentation writes it."""

    def __init__(self, folder: Path, world: int, *, fsdp: bool, adapters_only: str | None = None) -> None:
        forget_accelerate()
        set_seed(0)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=adapters_only
        )
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin if fsdp and world > 1 else None
        )
        model = oftv2.wrap_model(base(folder, "float32"), block_size=16)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = torch.utils.data.DataLoader(IDS, batch_size=4 // world)
        if adapters_only:
            oftv2.save_adapters_only(self.accelerator)
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


def loop(folder: Path, world: int, **options: Any) -> dict[str, Any]:
    name = f"loop-{'-'.join(map(str, options.values()))}-{world}"
    straight = Loop(folder, world, **options)
    start = straight.run(0, 2)
    straight.accelerator.save_state(str(folder / name))
    end = straight.run(2, 6)
    model = straight.accelerator.unwrap_model(straight.model)
    state_dict = straight.accelerator.get_state_dict(straight.model)
    model.save_pretrained(
        folder / f"{name}-adapter", is_main_process=straight.accelerator.is_main_process, state_dict=state_dict
    )
    found = {"losses": start + end, "end": end, "generators": generators(model)}
    resumed = Loop(folder, world, **options)
    resumed.accelerator.load_state(str(folder / name))
    return {**found, "resumed": resumed.run(2, 6)}


run("loop-ddp")(lambda folder, rank, world: loop(folder, world, fsdp=False))
run("loop-fsdp")(lambda folder, rank, world: loop(folder, world, fsdp=True))
for _type in STATE_DICT_TYPES:
    run(f"loop-fsdp-{_type}")(
        lambda folder, rank, world, kind=_type: loop(folder, world, fsdp=True, adapters_only=kind)
    )


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
