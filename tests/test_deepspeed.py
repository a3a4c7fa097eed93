"""A wrapped model under DeepSpeed's ZeRO, in two processes on a CPU; what they do is in ``deepspeed_runs.py``.

    DS_BUILD_OPS=0 pip install --no-deps deepspeed hjson py-cpuinfo msgpack einops ninja

``--no-deps`` keeps the torch that is there. The first run compiles DeepSpeed's communication operator with ``g++``.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    OFTConv2d,
    OFTLinear,
    add_adapter,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    wrap_model,
)
from oftv2.adapter import count_parameters
from oftv2.deepspeed_engine import serve_deepspeed
from oftv2.partitioned import filled, full_shape, is_partitioned

RUNS = Path(__file__).parent / "deepspeed_runs.py"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes(stage, tiny_llama, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is optional: install it as the first lines of this file say")
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    fixed |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(log, "w") as file:
            command = [sys.executable, str(RUNS), str(tmp_path), str(stage)]
            processes.append(
                subprocess.Popen(command, env={**os.environ, **fixed, **own}, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


# ------------------------------------------------------------------------------------------ without DeepSpeed


def partition(parameter: nn.Parameter) -> None:
    """What ZeRO-3 leaves of a parameter."""
    parameter.ds_id, parameter.ds_shape = 0, parameter.shape
    parameter.data = torch.empty(0)


def test_sizes_are_those_of_the_whole_parameters():
    layer = nn.Conv2d(4, 8, 2)
    partition(layer.weight)
    assert is_partitioned(layer.weight)
    assert full_shape(layer.weight) == (8, 4, 2, 2)
    assert not is_partitioned(layer.bias)
    assert not is_partitioned(None)
    assert OFTConv2d(layer, OFTConfig(block_size=8)).generators["default"].shape == (2, 28)
    model = nn.Sequential(nn.Linear(32, 16))
    wanted = count_parameters(wrap_model(model, block_size=8))
    for parameter in model.parameters():
        partition(parameter)
    assert count_parameters(model) == wanted


def test_filled_has_values_for_a_while_or_refuses():
    parameter = nn.Parameter(torch.randn(3, 4))
    value = parameter.detach().clone()
    partition(parameter)
    with filled({"a": parameter}, {"a": value}):
        assert torch.equal(parameter, value)
    assert parameter.shape == (0,)
    for values in (None, {}, {"a": torch.empty(0)}):
        refused = pytest.raises(AdapterError, match=r"^a is partitioned by DeepSpeed ZeRO-3.*in every process")
        with refused, filled({"a": parameter}, values):
            pass


def test_merging_partitions_is_refused():
    model = wrap_model(nn.Sequential(nn.Linear(32, 16)), block_size=8)
    partition(model[0].base_layer.weight)
    with pytest.raises(AdapterError, match=r"^0: base_layer\.weight is partitioned by DeepSpeed ZeRO-3: call save_ada"):
        merge(model)
    assert type(model[0]) is OFTLinear
    assert not model[0].merged


def test_loading_over_an_engines_adapter_is_refused(tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(32, 16)), block_size=8)
    save_adapter(model, tmp_path)
    model[0].generators["default"]._hp_mapping = SimpleNamespace()  # as ZeRO-1 and -2 have it
    with pytest.raises(AdapterError, match=r"'default' is in a DeepSpeed engine.*before deepspeed\.initialize"):
        load_adapter(model, tmp_path)


class Engine:
    """The methods of DeepSpeed's engine that are served, and what it has in bf16."""

    def __init__(self, module: nn.Module) -> None:
        self.basic_optimizer, self.optimizer = object(), object()
        self.broadcast: list[torch.Tensor] = []
        self._configure_distributed_model(module)

    def _configure_distributed_model(self, model):
        self.module = model
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.to("cpu")
        self._broadcast_model()

    def _broadcast_model(self):
        self.broadcast = [parameter.detach().clone() for parameter in self.module.parameters()]

    def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen_parameters=False):
        return self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)

    def module_state_dict(self, exclude_frozen_parameters=False):
        return self.module.state_dict()

    def load_module_state_dict(self, checkpoint, strict=True):
        return self.module.load_state_dict(checkpoint["module"], strict=strict)

    def zero_gather_16bit_weights_on_model_save(self):
        return False

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters=False):
        return self.module.state_dict()


@pytest.fixture
def engine_class(monkeypatch):
    served = type("DeepSpeedEngine", (Engine,), {})
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", SimpleNamespace(DeepSpeedEngine=served))
    for _ in range(2):  # the second time changes nothing
        serve_deepspeed()
    return served


def test_an_adapter_that_the_engine_would_not_train_is_refused(engine_class):
    model = add_adapter(wrap_model(nn.Sequential(nn.Linear(32, 16)), block_size=8), "other", block_size=8)
    engine = engine_class(model)
    engine.basic_optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(AdapterError, match=r"DeepSpeed engine, whose optimizer was made without .* trainable=False"):
        set_adapter(model, "other")
    set_adapter(model, "other", trainable=False)
    set_adapter(model, "default")  # which it holds, frozen in between or not


def test_generators_are_not_rounded_and_the_engine_is_known(engine_class, tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)), block_size=8)
    save_adapter(model, tmp_path)
    randomize(model)
    before = [layer.generators["default"].detach().clone() for layer in model]
    engine = engine_class(model)
    for wanted, layer in zip(before, model, strict=True):
        assert layer.base_layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.generators["default"], wanted)
        assert any(sent.shape == wanted.shape and torch.equal(sent, wanted) for sent in engine.broadcast)
    with pytest.raises(AdapterError, match=r"^this Sequential is in a DeepSpeed engine, whose optimizer would not"):
        add_adapter(model, "other", block_size=8)
    with pytest.raises(AdapterError, match=r"'default' is in a DeepSpeed engine.*before deepspeed\.initialize"):
        load_adapter(model, tmp_path)
    engine.optimizer = engine.basic_optimizer  # without copies
    load_adapter(model, tmp_path)
    engine.basic_optimizer = None  # it trains nothing
    add_adapter(model, "other", block_size=8)
    plain = nn.Sequential(nn.Linear(32, 16))
    engine = engine_class(plain)
    with pytest.raises(AdapterError, match=r"is in a DeepSpeed engine"):
        wrap_model(plain)
    del engine  # and with it what trained the model
    wrap_model(plain)


def test_checkpoints_of_wrapped_models_leave_the_base_out(engine_class):
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
    model.append(nn.Linear(16, 16)).append(model[2])  # used twice
    plain = engine_class(model)
    assert plain.save_checkpoint("").keys() == model.state_dict().keys()
    assert not plain.zero_gather_16bit_weights_on_model_save()
    del plain
    engine = engine_class(wrap_model(model, block_size=8, target_modules=["0"]))
    saved = engine.save_checkpoint("")
    assert saved.keys() == {"0.generators.default", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert engine.save_checkpoint("", exclude_frozen_parameters=False).keys() == model.state_dict().keys()
    assert engine.zero_gather_16bit_weights_on_model_save()

    engine.load_module_state_dict({"module": {**saved, "0.generators.default": torch.ones(4, 28)}})
    assert model[0].generators["default"].eq(1).all()
    engine.load_module_state_dict({"module": model.state_dict()})
    with pytest.raises(AdapterError, match=r"it lacks 0\.generators\.default and has 0\.generators\.other besides"):
        engine.load_module_state_dict({"module": {"0.generators.other": torch.ones(4, 28)}})
    with pytest.raises(RuntimeError, match=r"Missing key"):  # a whole one is checked as ever
        engine.load_module_state_dict({"module": {"0.base_layer.weight": torch.ones(16, 32)}})
