"""An optimizer made before the adapter, and layers that are never called, are reported; any others are not."""

from __future__ import annotations

import gc
import linecache
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import oftv2
from oftv2 import AdapterError, OptimizerWarning, TargetWarning, wrap_model
from oftv2.optimizer_check import _watched

STEPS = 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def wrapped(**fields) -> nn.Module:
    return wrap_model(mlp(), block_size=4, **fields)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, backward: int = 1) -> None:
    for _ in range(STEPS):
        for _ in range(backward):
            model(torch.randn(3, 8)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def silent():
    """Any warning is an error; and in the end nothing is looked at any more."""
    _watched.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not _watched


def test_an_optimizer_made_before_wrapping_is_reported_once_where_it_steps():
    model = mlp()
    optimizer = AdamW(model.parameters())
    wrap_model(model, block_size=4)
    with pytest.warns(
        OptimizerWarning, match="AdamW trains nothing of the adapter 'default' in the Sequential"
    ) as caught:
        train(model, optimizer)
    assert [warning.filename for warning in caught] == [__file__]
    assert model not in _watched


def test_made_before_loading(tmp_path):
    folder = oftv2.save_adapter(wrapped(), tmp_path, format="oftv2")
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    oftv2.load_adapter(model, folder, trainable=True, check_base=False)
    with pytest.warns(OptimizerWarning):
        train(model, optimizer)


def test_made_for_another_adapter():
    model = wrapped()
    optimizer = SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    train(model, optimizer)
    oftv2.set_adapter(oftv2.add_adapter(model, "second", block_size=2), "second")
    with pytest.warns(OptimizerWarning):
        train(model, optimizer)


def test_made_before_another_adapter_trains_too():
    model = oftv2.add_adapter(wrapped(), "second", block_size=2)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    oftv2.set_adapter(model, ["default", "second"])
    with pytest.warns(OptimizerWarning, match="nothing of the adapter 'second'"):
        train(model, optimizer)


def test_two_optimizers_of_two_adapters_are_silent(silent):
    model = oftv2.add_adapter(wrapped(), "second", block_size=2)
    oftv2.set_adapter(model, ["default", "second"])
    own = [[p for name, p in model.named_parameters() if name.endswith(adapter)] for adapter in ("default", "second")]
    train(model, *(SGD(parameters, lr=0.1) for parameters in own))


def test_ddp_made_before_another_adapter_trains_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = oftv2.add_adapter(wrapped(), "second", block_size=2)
        ddp = DistributedDataParallel(model)
        train(ddp)
        oftv2.set_adapter(model, "default")  # trains as before
        train(ddp)
        oftv2.set_adapter(model, ["default", "second"])
        with pytest.raises(AdapterError, match="'second' trains since set_adapter, and this DistributedDataParallel"):
            ddp(torch.randn(3, 8))
        with torch.no_grad():
            ddp(torch.randn(3, 8))
        train(DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()


def test_made_before_with_a_head_that_it_does_train():
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_model(model, block_size=4, modules_to_save=["2"])
    with pytest.warns(OptimizerWarning):
        train(model, optimizer)


@pytest.mark.parametrize("backward", [1, 50])
@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("everything", [False, True], ids=["trainable", "all parameters"])
def test_an_optimizer_of_the_adapter_is_silent(silent, everything, lr, backward):
    model = wrapped()
    train(model, AdamW([p for p in model.parameters() if everything or p.requires_grad], lr=lr), backward=backward)


def test_frozen_parameters_in_an_optimizer_of_their_own_are_silent(silent):
    model = wrapped()
    vectors = AdamW([p for p in model.parameters() if p.dim() < 2])  # norms and biases; as beside Muon
    matrices = SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    train(model, vectors, matrices)


def test_one_optimizer_for_each_parameter_is_silent(silent):
    model = wrapped()
    train(model, *(SGD([parameter], lr=0.1) for parameter in model.parameters()))


def test_skipped_steps_are_silent(silent):
    model = wrapped()
    optimizer, scaler = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), torch.amp.GradScaler("cpu")
    for step in range(STEPS):
        scaler.scale(model(torch.randn(3, 8)).sum() * (float("inf") if step < 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_what_was_added_later_counts(silent):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_model(model, block_size=4)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    train(model, optimizer)


def test_optimizers_of_other_things_are_silent(silent):
    model, other = wrapped(), nn.Linear(8, 8)
    optimizer = SGD(other.parameters(), lr=0.1)
    train(other, optimizer)
    assert model in _watched  # the adapter may be trained yet
    del model
    gc.collect()


def test_a_frozen_adapter_is_silent(silent, tmp_path):
    folder = oftv2.save_adapter(wrapped(), tmp_path, format="oftv2")
    model = mlp()
    head = nn.Linear(4, 2)
    optimizer = SGD([*model.parameters(), *head.parameters()], lr=0.1)
    oftv2.load_adapter(model, folder, check_base=False)
    train(nn.Sequential(model, head), optimizer)
    assert model not in _watched


class ReadingAttention(nn.Module):
    """As timm's BEiT and EVA, and CLIP's pooling: a projection is multiplied by, and not called; ``proj`` is both."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return self.proj(x.to(self.proj.weight.dtype))


def test_layers_that_are_read_and_not_called_are_reported_once():
    model = wrap_model(nn.Sequential(ReadingAttention(), ReadingAttention()), block_size=4)
    with pytest.warns(TargetWarning) as caught:
        train(model, AdamW([p for p in model.parameters() if p.requires_grad]))
    (warning,) = caught
    assert "optimizer.step()" in linecache.getline(warning.filename, warning.lineno)
    assert str(warning.message).startswith("0.qkv (and 1 other layers) got no gradient: the ReadingAttention reads ")
    assert str(warning.message).endswith("exclude_modules=['qkv'] leaves such layers out")


def test_layers_that_are_read_and_called_or_left_out_are_silent(silent):
    model = wrap_model(ReadingAttention(), block_size=4, exclude_modules=["qkv"])
    model.proj.weight.requires_grad_(False)  # any other reading
    train(model, AdamW([p for p in model.parameters() if p.requires_grad]))


def test_layers_that_take_no_part_in_a_step_are_silent(silent):
    model = nn.ModuleDict({"used": mlp(), "unused": mlp()})
    wrap_model(model, block_size=4)
    train(model["used"], AdamW([p for p in model.parameters() if p.requires_grad]))
