"""Batches whose rows go through different adapters: what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import oftv2
from mixed_batches import ROWS, wrapped
from oftv2 import AdapterError, adapters_per_row
from oftv2 import rows as rows_module


class Experts(nn.Module):
    """Passes each token to one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        return torch.cat([expert(tokens[i::2]) for i, expert in enumerate(self.experts)])


class TestRefused:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (["math", "maths"], "'maths' in this model; it has 'math', 'chat', 'code'"),
            (["math", ["chat", "math", "chat"]], "'chat' is named twice"),
            ([[]], "no adapter is named"),
            ([], "an entry for each row"),
            ("math", "an entry for each row, not 'math'"),
            ([3], "for rows, not 3"),
        ],
        ids=str,
    )
    def test_entries(self, tiny_llama, rows, message):
        model = wrapped(tiny_llama())
        with pytest.raises(AdapterError, match=message), adapters_per_row(model, rows):
            pass
        assert model.model.layers[0].self_attn.q_proj.rows is None

    def test_pefts_argument_which_models_take_and_ignore(self, tiny_llama):
        model = wrapped(tiny_llama())
        tokens = torch.arange(8).view(2, 4)
        with pytest.raises(AdapterError, match=r"adapter_names, .* would be ignored: .* oftv2.adapters_per_row"):
            model(tokens, adapter_names=["math", "__base__"])
        oftv2.unwrap_model(model)(tokens, adapter_names=["math", "__base__"])

    def test_requests_that_are_packed(self, tiny_llama):
        model = wrapped(tiny_llama())
        with adapters_per_row(model, ["math"]), pytest.raises(AdapterError, match="lays out all requests in one row"):
            model.generate_batch([[1, 2, 3], [4, 5]])
        assert model.init_continuous_batching.__func__ is LlamaForCausalLM.init_continuous_batching

    @pytest.mark.parametrize(
        ("shape", "rows"),
        [((4, 9, 64), 3), ((6, 9, 64), 3), ((2, 9, 64), 4), ((1, 9, 64), 2), ((6, 64), 3), ((64,), 1), ((64,), 64)],
        ids=str,
    )
    def test_inputs_without_the_rows(self, tiny_llama, shape, rows):
        model = wrapped(tiny_llama())
        layer = model.model.layers[1].self_attn.q_proj
        with (
            adapters_per_row(model, [None] * rows),
            pytest.raises(AdapterError, match=r"^model\.layers\.1\.self_attn\.q_proj: its input of \(.* the \d+ rows"),
        ):
            layer(torch.randn(shape))

    def test_routed_experts(self):
        """Even where an expert happens to get as many tokens as there are rows."""
        model = oftv2.wrap_model(Experts(), block_size=4)
        with (
            adapters_per_row(model, ["default", None]),
            pytest.raises(AdapterError, match=r"^experts\.0: its input of \(2, 16\)"),
        ):
            model(torch.randn(2, 2, 16))

    def test_models(self, tiny_llama):
        with pytest.raises(AdapterError, match="no oftv2 adapter"), adapters_per_row(tiny_llama(), ["math"]):
            pass
        model = wrapped(tiny_llama())
        with (
            oftv2.disable_adapter(model),
            pytest.raises(AdapterError, match="disabled"),
            adapters_per_row(model, ["math"]),
        ):
            pass
        oftv2.merge(model, unload=False)
        with pytest.raises(AdapterError, match="merged"), adapters_per_row(model, ["math"]):
            pass
        lengthwise = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
        oftv2.wrap_model(lengthwise, block_size=4, target_modules=["0"])
        with (
            pytest.raises(AdapterError, match=r"^1 has batch_first=False"),
            adapters_per_row(lengthwise, ["default"]),
        ):
            pass

    @pytest.mark.parametrize("active", ["plain", "full"])
    def test_parameters_trained_in_full(self, tiny_llama, active):
        model = oftv2.wrap_model(tiny_llama(), adapter_name="full", block_size=8, modules_to_save=["norm"])
        oftv2.add_adapter(model, "plain", block_size=8)
        oftv2.set_adapter(model, active)
        rows = ["plain", "full"] if active == "plain" else ["plain", None]
        with (
            pytest.raises(AdapterError, match=r"'full' trains model\.norm\.weight in full"),
            adapters_per_row(model, rows),
        ):
            pass
        if active == "plain":
            with adapters_per_row(model, ["plain", None]):
                model(torch.ones(2, 3, dtype=torch.long))

    def test_a_second_thread(self, tiny_llama):
        """It would answer the first one's request with its own rows, and leave rows behind."""
        model = wrapped(tiny_llama())

        def serve() -> str:
            with adapters_per_row(model, ["chat"]):
                return "served"

        with ThreadPoolExecutor(1) as other:
            with adapters_per_row(model, ["math"]):
                rows = model.model.layers[0].self_attn.q_proj.rows
                with pytest.raises(AdapterError, match="another thread is within adapters_per_row"):
                    other.submit(serve).result()
                assert model.model.layers[0].self_attn.q_proj.rows is rows
            assert other.submit(serve).result() == "served"
        assert model.model.layers[0].self_attn.q_proj.rows is None

    def test_a_second_thread_that_comes_while_one_enters(self, tiny_llama, monkeypatch):
        model = wrapped(tiny_llama())
        begun, tried = Event(), Event()

        def slow_batch(*args):
            if not begun.is_set():
                begun.set()
                tried.wait(0.2)  # the second one waits for the first by then
            return batch(*args)

        def serve() -> str:
            with adapters_per_row(model, ["chat"]):
                tried.wait(10)
                return "served"

        batch = rows_module._Batch
        monkeypatch.setattr(rows_module, "_Batch", slow_batch)
        with ThreadPoolExecutor(1) as other:
            first = other.submit(serve)
            begun.wait(10)
            try:
                with (
                    pytest.raises(AdapterError, match="another thread is within adapters_per_row"),
                    adapters_per_row(model, ["math"]),
                ):
                    pass
            finally:
                tried.set()
            assert first.result() == "served"
        assert model.model.layers[0].self_attn.q_proj.rows is None

    def test_changes_within(self, tiny_llama):
        model = wrapped(tiny_llama())
        with adapters_per_row(model, ROWS):
            for change in (
                lambda: oftv2.set_adapter(model, "chat"),
                lambda: oftv2.add_adapter(model, "new"),
                lambda: oftv2.delete_adapter(model, "chat"),
                lambda: oftv2.merge(model),
            ):
                with pytest.raises(AdapterError, match=r"row by row: leave adapters_per_row\(model\) first"):
                    change()
        assert oftv2.adapter_names(model) == ["math", "chat", "code"]
