"""Whole models in training: autocast, gradient checkpointing, torch.compile, memory, callbacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import VitPoseBackbone, VitPoseBackboneConfig

from conftest import assert_close, randomize
from oftv2 import OFTConfig, OFTConv2d, OFTEmbedding, OFTLinear, diagnostics, unwrap_model, wrap_model
from oftv2.stability import spectral_norm

IDS = torch.arange(20).view(2, 10) % 128


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return gradients(model)


def test_only_generators_train_and_the_loss_falls(tiny_llama):
    model = wrap_model(tiny_llama(), block_size=16).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".generators." in name}


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_transformers_model(self, tiny_llama, reentrant):
        model = wrap_model(tiny_llama(), block_size=16).train()
        randomize(model)
        expected = train_step(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        actual = train_step(model)
        assert actual.keys() == expected.keys()
        assert len(actual) == 14
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-8)

    def test_vision_tower_that_begins_with_a_frozen_convolution(self):
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
        model = wrap_model(VitPoseBackbone(VitPoseBackboneConfig(image_size=(32, 32), **sizes)).train(), block_size=8)
        images = torch.randn(2, 3, 32, 32)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(images).feature_maps[0].square().sum().backward()
        assert len(gradients(model)) == 12
        assert not images.requires_grad

    def test_no_input_gradient_is_computed_without_checkpointing(self, tiny_llama):
        model = wrap_model(tiny_llama(), block_size=16).train()
        seen = []
        model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
        train_step(model)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        train_step(model)
        assert seen[:2] == [False, True]  # and once more, where the recomputation passes the hook too

    @pytest.mark.parametrize("inputs", ["ids", "floats"])
    def test_reentrant_checkpoints_of_a_plain_model(self, inputs):
        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(10, 16)
                self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

            def forward(self, x):
                x = self.embedding(x) if x.dtype == torch.long else x
                for layer in self.layers:
                    x = checkpoint(layer, x, use_reentrant=True).tanh()
                return x

        model = wrap_model(Plain(), block_size=4).train()
        randomize(model)
        x = torch.arange(10) if inputs == "ids" else torch.randn(5, 16)
        model(x).sum().backward()
        assert len(gradients(model)) == 3
        assert all(grad.any() for grad in gradients(model).values())
        assert not x.requires_grad

    @pytest.mark.parametrize("inputs", ["ids", "floats"])
    def test_models_that_write_to_their_inputs(self, inputs):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.linear = nn.Embedding(10, 16), nn.Linear(16, 16)

            def forward(self, x):
                x = self.embedding(x) if x.dtype == torch.long else x
                x *= 2
                x[:, 0] = 0
                return self.linear(x)

        torch.manual_seed(0)
        model = wrap_model(InPlace(), block_size=4)
        randomize(model)
        x, written = (torch.arange(10).view(5, 2) if inputs == "ids" else torch.ones(5, 16) for _ in range(2))
        with torch.no_grad():
            expected = model.eval()(x)
        y = model.train()(written)
        y.sum().backward()
        assert_close("y", y, expected, 1e-6)
        assert torch.equal(written, x)
        assert gradients(model)["linear.generators.default"].any()

    def test_unwrapping_takes_the_hooks_off(self, tiny_llama):
        model = tiny_llama()
        before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        unwrap_model(wrap_model(model, block_size=16))
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
        plain = nn.Sequential(nn.Linear(8, 8))
        unwrap_model(wrap_model(plain, block_size=4))
        assert not plain._forward_pre_hooks
        assert not plain._forward_pre_hooks_with_kwargs
        plain(torch.randn(2, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(tiny_llama, dtype):
    model = wrap_model(tiny_llama(), block_size=16).train()
    randomize(model)
    expected = train_step(model)
    with torch.autocast("cpu", dtype):
        out = model(IDS, labels=IDS)
    assert out.logits.dtype == dtype
    model.zero_grad()
    out.loss.backward()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert_close(name, grad, expected[name], 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_dtypes(tiny_llama, dtype):
    model = wrap_model(tiny_llama(), block_size=16)
    randomize(model)
    expected = train_step(model)
    other = wrap_model(tiny_llama().to(dtype), block_size=16)
    randomize(other)
    for name, grad in train_step(other).items():
        assert grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(name, grad, expected[name], 1e-4 if dtype == torch.float64 else 0.15)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: (OFTLinear(nn.Linear(32, 8), OFTConfig(block_size=8)), torch.randn(6, 32)),
            lambda: (
                OFTLinear(nn.Linear(32, 8), OFTConfig(block_size=8, parametrization="cayley")),
                torch.randn(6, 32),
            ),
            lambda: (
                OFTLinear(nn.Linear(32, 8), OFTConfig(block_size=8, constraint=0.1, scale_generators=True)),
                torch.randn(2, 3, 32),
            ),
            lambda: (OFTLinear(nn.Linear(32, 8), OFTConfig(block_size=8, block_share=True)), torch.randn(6, 32)),
            lambda: (OFTEmbedding(nn.Embedding(10, 32), OFTConfig(block_size=8)), torch.arange(10)),
            lambda: (OFTConv2d(nn.Conv2d(4, 8, 3), OFTConfig(block_size=12)), torch.randn(2, 4, 6, 6)),
        ],
        ids=["linear", "exact", "options", "shared", "embedding", "conv2d"],
    )
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_layers_without_graph_breaks(self, make, mode):
        layer, x = make()
        randomize(layer)
        layer.train(mode == "train")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for value in (None, 0.02):  # a change of the generators shows in compiled code too
            if value is not None:
                layer.generators["default"].data.fill_(value)
            layer.zero_grad()
            expected = layer.train(mode == "train")(x)
            expected.square().sum().backward()
            wanted = layer.generators["default"].grad.clone()
            layer.zero_grad()
            out = compiled(x)
            torch.testing.assert_close(out, expected)
            out.square().sum().backward()
            torch.testing.assert_close(layer.generators["default"].grad, wanted)

    def test_compiled_eval_is_not_stale(self):
        layer = OFTLinear(nn.Linear(32, 8), OFTConfig(block_size=8)).eval()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 32)
        with torch.no_grad():
            for value in (0.0, 0.01, 0.02):
                layer.generators["default"].data.fill_(value)
                out = compiled(x)
                torch.testing.assert_close(out, layer.train()(x))
                layer.eval()

    def test_whole_model_with_the_default_backend(self, tiny_llama):
        model = wrap_model(tiny_llama(num_hidden_layers=1), block_size=16).train()
        randomize(model)
        expected = train_step(model)
        model.model.forward = torch.compile(model.model.forward, fullgraph=True)
        for name, grad in train_step(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_one_copy_of_the_input_for_several_layers(dtype):
    x = torch.randn(512, 256, dtype=dtype, requires_grad=True)
    layers = [OFTLinear(nn.Linear(256, 256).to(dtype), OFTConfig(block_size=32)) for _ in range(3)]
    weights = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    small = 3 * 8 * (32 * 32 + 32 * 31 // 2) * 4  # Δ and the generators of three layers, float32
    assert sum(kept.values()) <= x.nbytes + small
    assert len(outputs) == 3


class TestDiagnostics:
    def test_figures_of_a_known_rotation(self):
        layer = OFTLinear(nn.Linear(4, 4), OFTConfig(block_size=2))
        layer.generators["default"].data.copy_(torch.tensor([[0.1], [0.0]]))
        (figures,) = diagnostics(layer).values()
        assert figures.generator_norm == pytest.approx(0.1)
        assert figures.rotation_angle == pytest.approx(math.degrees(2 * math.atan(0.1)))
        # k = 4: RᵀR = I − Q¹⁰ = (1 + 0.1¹⁰) I on the plane of the block
        assert figures.orthogonality_error == pytest.approx(math.sqrt(2) * 1e-10, rel=0.05, abs=2e-7)
        assert figures.norm_error < 2e-7

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_spectral_norm(self, dtype):
        matrices = torch.randn(20, 32, 32, dtype=torch.float64)
        matrices[0] = 0
        matrices[1] *= 1e-6
        matrices[2] = torch.diag(torch.linspace(0.9, 1, 32))  # neighbours close to the largest
        actual = spectral_norm(matrices.to(dtype)).double()
        torch.testing.assert_close(actual, torch.linalg.matrix_norm(matrices, ord=2), rtol=1e-3, atol=0)

    def test_norm_error_of_a_rotation_that_stretches(self):
        layer = OFTLinear(nn.Linear(4, 4), OFTConfig(block_size=2, neumann_terms=2))
        layer.generators["default"].data.copy_(torch.tensor([[0.5], [0.0]]))
        (figures,) = diagnostics(layer).values()
        assert figures.norm_error == pytest.approx(math.sqrt(1 + 0.5**6) - 1, rel=1e-5)  # RᵀR = I − Q⁶

    def test_every_layer_of_a_model(self, tiny_llama):
        model = wrap_model(tiny_llama(), block_size=16)
        randomize(model)
        report = diagnostics(model)
        assert len(report) == 14
        assert "model.layers.1.mlp.down_proj" in report
        assert all(0 < figures.orthogonality_error < 1e-3 for figures in report.values())

    def test_trainer_logs_them(self, tiny_llama, tmp_path):
        from transformers import Trainer, TrainingArguments

        from oftv2.callbacks import OFTCallback

        model = wrap_model(tiny_llama(), block_size=16)
        arguments = TrainingArguments(
            tmp_path, max_steps=3, logging_steps=1, report_to=[], learning_rate=1e-3, save_strategy="no", use_cpu=True,
            eval_strategy="steps", eval_steps=1, eval_on_start=True,  # evaluations are logged too
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:1], callbacks=[OFTCallback(every=2)])
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "oft/generator_norm" in entry]
        assert [entry["step"] for entry in logged] == [1, 3]
        assert logged[1]["oft/generator_norm"] > 0
        with pytest.raises(ValueError, match="every=0"):
            OFTCallback(every=0)
