"""A wrapped model under FSDP2: it trains; what needs whole tensors says so, and works once they are unsharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from conftest import randomize
from oftv2 import AdapterError, load_adapter, merge, save_adapter, wrap_model


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_training_saving_and_merging(mesh, tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(64, 16)), block_size=32)
    randomize(model)
    x = torch.randn(4, 64)
    plain = model(x)
    plain.sum().backward()
    wanted = model[0].generators["default"].grad.clone()
    model.zero_grad()

    fully_shard(model, mesh=mesh)
    out = model(x)
    torch.testing.assert_close(out, plain)
    out.sum().backward()
    torch.testing.assert_close(model[0].generators["default"].grad.full_tensor(), wanted)

    model.reshard()
    with pytest.raises(AdapterError, match=r"^0: the generators are sharded \(FSDP\); call unshard\(\)"):
        merge(model)
    assert not model[0].merged
    with pytest.raises(AdapterError, match=r"not saved: sharded \(FSDP\) are base_model\.model\.0\.oft_R\.weight"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())

    model.unshard()
    save_adapter(model, tmp_path)
    base = nn.Sequential(nn.Linear(64, 16))
    base.load_state_dict({name: getattr(model[0].base_layer, name[2:]).detach() for name in ("0.weight", "0.bias")})
    loaded = load_adapter(base, tmp_path)
    torch.testing.assert_close(loaded(x), plain)
    torch.testing.assert_close(merge(loaded)(x), plain)
