"""Layers of each kind in batches whose rows go through different adapters, and rotations made together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import oftv2
from conftest import assert_close, randomize
from mixed_batches import ROWS, one_by_one
from oftv2 import OFTConfig, adapters_per_row
from oftv2.errors import AdapterError
from oftv2.rotation import Rotation


def test_rotations_made_together_are_those_made_apart():
    configs = [
        {"block_size": 8},
        {"block_size": 8, "constraint": 0.5, "dropout": 0.5},
        {"block_size": 4},
        {"block_size": 8, "block_share": True, "scale_generators": True},
        {"block_size": 8, "parametrization": "cayley"},
        {"block_size": 8, "neumann_terms": 6},
        {"block_size": 8, "parametrization": "cayley", "block_share": True},
    ]
    rotations = [Rotation.resolve(OFTConfig(**config), 32, "layer") for config in configs]
    generators = [0.1 * torch.randn(rotation.shape, dtype=torch.float64) for rotation in rotations]
    together = Rotation.deltas(rotations, generators)
    for rotation, packed, delta in zip(rotations, generators, together, strict=True):
        torch.testing.assert_close(delta, rotation.delta(packed), rtol=1e-14, atol=1e-16)
    assert [delta.stride(0) for delta in together] == [64, 64, 16, 0, 64, 64, 0]


class TestLayers:
    def test_convolution_and_embedding(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(20, 36)
                self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)

            def forward(self, ids):
                return self.conv(self.table(ids).unflatten(-1, (4, 3, 3)).flatten(0, 1)).unflatten(0, ids.shape)

        torch.manual_seed(0)
        model = Model().double()
        oftv2.wrap_model(model, adapter_name="math", target_modules=["table", "conv"], block_size=6)
        oftv2.add_adapter(model, "chat", target_modules=["table", "conv"], block_size=9)
        oftv2.add_adapter(model, "code", target_modules=["table"], block_size=4)
        randomize(model, 0.1)
        ids = torch.randint(0, 20, (len(ROWS), 5))
        expected = torch.cat(one_by_one(model, ROWS, lambda i: model(ids[i : i + 1])))
        with adapters_per_row(model, ROWS, repeated=True):  # the convolution gets each row five times
            assert_close("output", model(ids), expected, 1e-13)
        with adapters_per_row(model, ROWS), pytest.raises(AdapterError, match=r"^conv: .* has 5 times the 6 rows"):
            model(ids)

    @pytest.mark.parametrize("shape", [(6, 64), (6, 5, 64), (6, 2, 3, 64), (12, 5, 64), (0, 5, 64)], ids=str)
    @pytest.mark.parametrize("quantized", [False, True])
    def test_shapes(self, shape, quantized):
        linear = nn.Linear(64, 24)
        if quantized:
            import bitsandbytes as bnb

            weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            linear = bnb.nn.Linear4bit(64, 24, compute_dtype=torch.float32, quant_type="nf4")
            linear.weight = weight
            linear = linear.to("cpu")
        model = nn.ModuleDict({"q_proj": linear})
        wrapped_model = oftv2.wrap_model(model, adapter_name="math", block_size=8)
        oftv2.add_adapter(wrapped_model, "chat", block_size=32)
        randomize(model)
        rows = ["math", None, "chat", ["math", "chat"], "chat", "math"]
        x = torch.randn(shape)
        repeats = shape[0] // 6
        expected = one_by_one(model, rows, lambda i: model["q_proj"](x[i * repeats : (i + 1) * repeats]))
        with adapters_per_row(model, rows, repeated=True):
            actual = model["q_proj"](x)
        assert actual.shape == (*shape[:-1], 24)
        assert_close("output", actual, torch.cat(expected), 1e-6)

    def test_compiles_once_for_all_rows_of_the_same_adapters(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).double()
        oftv2.wrap_model(model, adapter_name="math", block_size=4, exclude_modules=[])
        oftv2.add_adapter(model, "chat", block_size=8)
        randomize(model, 0.2)
        x = torch.randn(3, 5, 16).double()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for rows in (["math", None, "chat"], ["math", "chat", None], ["chat", "math", "chat"]):
            with adapters_per_row(model, rows):
                expected = model(x)
                assert_close("output", compiled(x), expected, 1e-12)
        assert counter.frame_count == 1
        assert_close("output", compiled(x), model(x), 1e-12)
        assert counter.frame_count == 2
