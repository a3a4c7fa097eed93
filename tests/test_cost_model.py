"""The cost model against counting by hand, the choice it makes, and what ``explain`` says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oftv2
from oftv2 import AdapterError, OFTConfig, OFTLinear
from oftv2.cost_model import CPU, GPUS, Machine, Problem, cheapest, costs, machine

H200 = next(gpu for gpu in GPUS if gpu.name == "H200")
# Infinitely fast in all but one respect.
BYTES = Machine("bytes", 1.0, float("inf"), 0.0, "")
OPERATIONS = Machine("operations", float("inf"), 1.0, 0.0, "")
LAUNCHES = Machine("launches", float("inf"), float("inf"), 1.0, "")
T, d, n, b, s = 300, 64, 48, 16, 2


@pytest.mark.parametrize(
    ("gradient", "quantized", "on", "expected"),
    [
        (True, False, BYTES, {"input": 10 / 2 * T * d * s, "weight": 4 * n * d * s + 2 * T * d * s}),
        (True, False, OPERATIONS, {"input": 6 * T * d * b, "weight": 4 * n * d * b + 2 * T * d * b}),
        (True, False, LAUNCHES, {"input": 3, "weight": 8}),
        (True, True, BYTES, {"input": 5 * T * d * s, "weight": 2 * T * d * s}),
        (True, True, LAUNCHES, {"input": 3, "weight": 6}),
        (False, False, BYTES, {"input": 2 * T * d * s, "weight": 2 * n * d * s}),
    ],
)
def test_counts(gradient, quantized, on, expected):
    problem = Problem(T, d, n, b, s, gradient, quantized)
    assert costs(problem, ("input", "weight"), on) == pytest.approx(expected)


def test_few_tokens_take_the_input_form_and_many_the_weight_form():
    for on in (CPU, H200):
        forms = [cheapest(Problem(t, 4096, 4096, 32, 2, True), ("input", "weight"), on) for t in (1, 512, 16384, 65536)]
        assert forms == ["input", "input", "weight", "weight"]
    # gate and up have more outputs than a batch has tokens; k and v far fewer
    by_outputs = [cheapest(Problem(8192, 4096, n, 32, 2, True), ("input", "weight"), H200) for n in (1024, 14336)]
    assert by_outputs == ["weight", "input"]


@pytest.mark.parametrize("block_size", [2, 16, 32, 64, 256])
@pytest.mark.parametrize("outputs", [1, 48, 4096])
def test_up_to_as_many_tokens_as_outputs_a_cpu_always_rotates_them(outputs, block_size):
    """So layers do not ask the model then."""
    for tokens in {1, max(1, outputs // 2), outputs}:
        for gradient in (True, False):
            problem = Problem(tokens, 512, outputs, block_size, 4, gradient)
            assert cheapest(problem, ("input", "weight"), CPU) == "input"


def test_a_weight_that_is_dequantized_anyway_is_rotated_sooner():
    plain, quantized = (Problem(4096, 4096, 14336, 32, 2, True, q) for q in (False, True))
    assert cheapest(plain, ("input", "weight"), H200) == "input"
    assert cheapest(quantized, ("input", "weight"), H200) == "weight"


def test_a_few_tokens_on_a_4_bit_weight_spare_its_16_bit_copy():
    for tokens, form in ((1, "input"), (2, "fused"), (16, "fused"), (512, "input")):
        problem = Problem(tokens, 4096, 4096, 32, 2, False, quantized=True)
        assert cheapest(problem, ("input", "fused"), H200) == form


def test_every_device_has_numbers(monkeypatch):
    assert machine(torch.device("cpu")) is CPU
    for name, expected in (("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "another GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert machine(torch.device("cuda")).name == expected


@pytest.fixture
def layer():
    return OFTLinear(nn.Linear(64, 48), OFTConfig(block_size=16), name="model.layers.0.proj")


class TestForcing:
    def test_a_form_that_is_not_possible_is_refused(self, layer):
        layer.form = "fused"
        with pytest.raises(ValueError, match=r"model\.layers\.0\.proj: form='fused' is not possible here.*'input'"):
            layer(torch.randn(3, 64))
        with pytest.raises(AdapterError, match=r"form='fused' is not possible here; possible: input, weight"):
            oftv2.explain(layer, 3)

    def test_forced_forms_agree(self, layer):
        nn.init.normal_(layer.generators["default"], std=0.05)
        x, results = torch.randn(9, 64), []
        for layer.form in (None, "input", "weight"):
            results.append(layer(x))
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(results[1], results[2])


class TestExplain:
    def test_what_it_says_is_what_runs(self, layer, monkeypatch):
        ran, call = [], type(layer).call_in_form
        monkeypatch.setattr(type(layer), "call_in_form", lambda self, form, x: ran.append(form) or call(self, form, x))
        for tokens in (1, 4096):
            explanation = oftv2.explain(layer, tokens)
            layer(torch.randn(tokens, 64))
            assert (explanation.form == "weight") == bool(ran)
        assert ran == ["weight"]

    def test_text(self, layer):
        text = str(oftv2.explain(layer, 20, gradient=False))
        assert "model.layers.0.proj: 20 tokens, 64 → 48, b = 16, forward, no gradient" in text
        assert "form 'input': rotates the input, then calls the base layer" in text
        assert "fused: not possible: it is a kernel for CUDA devices" in text
        assert "estimated for CPU" in text

    def test_forced_and_impossible(self, layer):
        layer.form = "weight"
        explanation = oftv2.explain(layer, 20)
        assert explanation.forced
        assert explanation.form == "weight"
        assert explanation.impossible["fused"] == "it has no backward pass"
        layer.form = None
        layer.base_layer.register_forward_hook(lambda module, args, output: None)
        assert "without hooks" in oftv2.explain(layer, 20).impossible["weight"]

    @pytest.mark.parametrize("tokens", [-1, 2.5, "8"])
    def test_bad_tokens(self, layer, tokens):
        with pytest.raises(AdapterError, match="explain: tokens="):
            oftv2.explain(layer, tokens)

    def test_no_adapted_layer(self):
        with pytest.raises(AdapterError, match=r"not a Linear"):
            oftv2.explain(nn.Linear(4, 4), 8)
