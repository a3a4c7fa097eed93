"""Batches whose rows go through different adapters: each row is what it would be alone."""

from __future__ import annotations

import contextlib
import copy

import pytest
import suite_rows
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import oftv2
from conftest import assert_close, randomize
from measure import in_fresh_process
from oftv2 import AdapterError, OFTConfig, adapters_per_row
from oftv2.rotation import Rotation
from options import Options

# Twice one adapter, several of one row, none, and one that most layers lack.
ROWS = ["math", None, "chat", ["chat", "code"], "code", "math"]


def wrapped(model, **fields):
    """A model with three adapters of different block sizes, parametrizations and targets, all of them random."""
    oftv2.wrap_model(model, adapter_name="math", block_size=32, **fields)
    oftv2.add_adapter(model, "chat", block_size=16, block_share=True)
    oftv2.add_adapter(model, "code", block_size=8, target_modules=["q_proj", "down_proj"], parametrization="cayley")
    randomize(model)
    return model


@contextlib.contextmanager
def only(model, entry):
    """The model with the adapters of one row, for all of a batch."""
    if entry is None:
        with oftv2.disable_adapter(model):
            yield
        return
    active = oftv2.active_adapters(model)
    oftv2.set_adapter(model, entry, trainable=False)
    yield
    oftv2.set_adapter(model, active, trainable=False)


def one_by_one(model, rows, call):
    """``call(i)`` of every row on its own."""
    out = []
    for i, entry in enumerate(rows):
        with only(model, entry):
            out.append(call(i))
    return out


@pytest.fixture
def tokens():
    """Token ids of a left-padded batch, and its attention mask."""
    ids, mask = torch.randint(3, 128, (len(ROWS), 9)), torch.ones(len(ROWS), 9, dtype=torch.long)
    for i, padding in enumerate([0, 3, 5, 0, 1, 2]):
        ids[i, :padding], mask[i, :padding] = 0, 0
    return ids, mask


class TestLanguageModel:
    @pytest.mark.parametrize("group", [False, True], ids=["", "grouped projections"])
    def test_logits_are_those_of_each_row_alone(self, tiny_llama, tokens, group):
        model = wrapped(tiny_llama(), group_projections=group).double()
        ids, mask = tokens
        with torch.no_grad():
            expected = one_by_one(model, ROWS, lambda i: model(ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
            with adapters_per_row(model, ROWS) as same:
                assert same is model
                first, second = (model(ids, attention_mask=mask).logits for _ in range(2))
            after = model(ids, attention_mask=mask).logits
        kept = mask.bool()
        assert_close("logits", first[kept], torch.cat(expected)[kept], 1e-12)
        assert torch.equal(first[kept], second[kept])
        assert_close("of the active adapter", after[kept][:9], torch.cat(expected)[kept][:9], 1e-12)
        assert all(layer.rows is None for layer in model.modules() if isinstance(layer, oftv2.OFTLayer))

    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
    def test_dtypes(self, tiny_llama, tokens, dtype, limit):
        model = wrapped(tiny_llama().to(dtype))
        with torch.no_grad():
            expected = torch.cat(one_by_one(model, ROWS, lambda i: model(tokens[0][i : i + 1]).logits))
            with adapters_per_row(model, ROWS):
                actual = model(tokens[0]).logits
        assert actual.dtype == dtype
        assert_close("logits", actual, expected, limit)

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams", "two"]
    )
    def test_generate(self, tiny_llama, tokens, options):
        model = wrapped(tiny_llama()).double()
        ids, mask = tokens
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
        expected = one_by_one(
            model, ROWS, lambda i: model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
        )
        with adapters_per_row(model, ROWS):
            actual = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(actual, torch.cat(expected))
        assert not torch.equal(actual, model.generate(ids, attention_mask=mask, **options))

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
    def test_generate_is_no_excuse_for_too_short_a_list(self, tiny_llama, tokens, options):
        model = wrapped(tiny_llama())
        ids, mask = tokens
        with adapters_per_row(model, ROWS[:3]):
            for wrong in (ids, ids.repeat(2, 1)):
                with pytest.raises(AdapterError, match=r"times the 3 rows of adapters_per_row: name an adapter"):
                    model.generate(wrong, max_new_tokens=2, **options)
            model.generate(ids[:3], attention_mask=mask[:3], max_new_tokens=2, **options)
            with pytest.raises(AdapterError, match=r"has 2 times the 3 rows"):
                model(ids)
            with pytest.raises(AdapterError, match=r"has 3 times the 3 rows"):
                model(ids[:3].repeat(3, 1))
            assert model(ids[:3]).logits.shape == (3, 9, 128)
        assert not {"generate", "_expand_inputs_for_generation"} & set(vars(model))
        assert model.generate(ids, max_new_tokens=2).shape == (6, 11)

    def test_each_returned_sequence_has_its_own_adapter_where_all_are_named(self, tiny_llama, tokens):
        model = wrapped(tiny_llama()).double()
        ids, options = tokens[0][:1], {"max_new_tokens": 5, "min_new_tokens": 5}
        rows = ["math", None, "chat"]
        expected = one_by_one(model, rows, lambda i: model.generate(ids, do_sample=False, **options))
        with adapters_per_row(model, rows):
            actual = model.generate(ids, num_return_sequences=3, do_sample=True, top_k=1, **options)
        assert torch.equal(actual, torch.cat(expected))

    def test_generate_of_an_encoder_and_a_decoder(self):
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).double().eval()
        oftv2.wrap_model(model, adapter_name="math", block_size=8)
        oftv2.add_adapter(model, "chat", block_size=16, target_modules=["q", "wo"])
        randomize(model, 0.3)
        rows, ids = ["math", None, "chat"], torch.randint(2, 64, (3, 7))
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
        expected = one_by_one(model, rows, lambda i: model.generate(ids[i : i + 1], **options))
        with adapters_per_row(model, rows):
            assert torch.equal(model.generate(ids, **options), torch.cat(expected))
            with pytest.raises(AdapterError, match="times the 3 rows"):
                model.generate(ids.repeat(2, 1), **options)

    def test_nf4_base(self, tiny_llama, tokens, tmp_path):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        tiny_llama().save_pretrained(tmp_path)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = wrapped(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4).eval())
        with torch.no_grad():
            expected = torch.cat(one_by_one(model, ROWS, lambda i: model(tokens[0][i : i + 1]).logits))
            with adapters_per_row(model, ROWS):
                assert_close("logits", model(tokens[0]).logits, expected, 1e-5)

    def test_disabled_inside_nested_and_left_by_an_error(self, tiny_llama, tokens):
        model = wrapped(tiny_llama())
        ids, _ = tokens
        with torch.no_grad():
            usual = model(ids).logits
            with oftv2.disable_adapter(model):
                base = model(ids).logits
            with adapters_per_row(model, ROWS):
                outer = model(ids).logits
                with oftv2.disable_adapter(model):
                    assert torch.equal(model(ids).logits, base)
                with adapters_per_row(model, [None]):
                    assert_close("base", model(ids[:1]).logits, base[:1], 1e-6)
                assert torch.equal(model(ids).logits, outer)
                copied = copy.deepcopy(model)
                assert torch.equal(copied(ids).logits, usual), "a copy is not within the context"
                copied.lm_head.weight.data.zero_()
                assert not copied.generate(ids, max_new_tokens=1)[:, -1].any(), "a copy generates by itself"
            with pytest.raises(AdapterError), adapters_per_row(model, ROWS):
                model(ids[:4])
            assert torch.equal(model(ids).logits, usual)

    def test_what_is_kept_follows_the_generators(self, tiny_llama, tokens):
        model = wrapped(tiny_llama())
        layer = model.model.layers[0].self_attn.q_proj
        with torch.no_grad(), adapters_per_row(model, ROWS):
            before = model(tokens[0]).logits
            kept = layer.rows.delta(layer, layer.weight)
            assert layer.rows.delta(layer, layer.weight) is kept
            assert kept.shape == (4, 2, 32, 32)  # math, chat, chat then code, code; none of them twice
            layer.generators["code"].mul_(2)
            after = model(tokens[0]).logits
        changed = [bool(row.any()) for row in after - before]
        assert changed == [False, False, False, True, True, False]

    def test_devices_other_than_a_cpu_keep_one_dtype(self):
        model = nn.Sequential(nn.Linear(64, 8))
        oftv2.wrap_model(model, adapter_name="math", block_size=8).eval().to("meta")
        layer = model[0]
        with torch.no_grad(), adapters_per_row(model, ["math", None]):
            for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
                x = torch.empty(2, 3, 64, dtype=dtype, device="meta")
                assert layer.rows.rotate(layer, x).dtype == dtype
                kept = layer.rows.delta(layer, x)
                assert kept.dtype == dtype
                assert layer.rows.delta(layer, x) is kept


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


class TestGradients:
    def grads(self, model):
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def expected(self, model, ids, rows):
        """The sum over the rows' gradients, each with its adapters alone."""
        model.zero_grad()
        for i, entry in enumerate(rows):
            if entry is None:
                continue  # nothing trains
            with only(model, entry):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(".generators." in name)
                model(ids[i : i + 1]).logits.square().sum().backward()
        found = self.grads(model)
        model.zero_grad()
        return found

    def training(self, tiny_llama, **fields):
        model = wrapped(tiny_llama(**fields)).double().train()
        oftv2.set_adapter(model, ["math", "chat", "code"])
        return model

    def test_are_the_sums_over_the_rows(self, tiny_llama, tokens):
        ids, _ = tokens
        expected = self.expected(self.training(tiny_llama), ids, ROWS)
        model = self.training(tiny_llama)
        with adapters_per_row(model, ROWS):
            model(ids).logits.square().sum().backward()
        actual = self.grads(model)
        assert actual.keys() == expected.keys()
        assert len(actual) == 14 + 14 + 4
        for name, grad in actual.items():
            assert_close(name, grad, expected[name], 1e-11)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints_are_recomputed_with_the_same_rows(self, tiny_llama, tokens, reentrant):
        """Also after the context was left, while others are entered, and of several forward passes."""
        ids, _ = tokens
        reference = self.training(tiny_llama)
        batches = (ROWS, ROWS[::-1])
        for rows in batches:
            with adapters_per_row(reference, rows):
                reference(ids).logits.square().sum().backward()
        model = self.training(tiny_llama)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        before = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
        losses = []
        for rows in batches:
            with adapters_per_row(model, rows):
                losses.append(model(ids).logits.square().sum())
        with adapters_per_row(model, ["chat"]):
            sum(losses).backward()
            assert model(ids[:1]).logits.shape == (1, 9, 128)
        assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == before
        expected = self.grads(reference)
        assert len(expected) == 32
        for name, grad in self.grads(model).items():
            assert_close(name, grad, expected.pop(name), 1e-12)
        assert not expected

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_other_checkpoints_are_refused(self, reentrant):
        model = oftv2.wrap_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), block_size=4)
        x = torch.randn(2, 8, requires_grad=True)
        with (
            adapters_per_row(model, ["default", None]),
            pytest.raises(AdapterError, match=r"^0: adapters_per_row within torch\.utils\.checkpoint"),
        ):
            checkpoint(model, x, use_reentrant=reentrant)

    def test_dropout_and_autocast(self, tiny_llama, tokens):
        model = wrapped(tiny_llama(), dropout=0.5).train()
        oftv2.set_adapter(model, ["math", "chat"])
        with adapters_per_row(model, ROWS), torch.autocast("cpu", dtype=torch.bfloat16):
            first, second = (model(tokens[0]).logits for _ in range(2))
        different = [bool(row.any()) for row in first - second]
        assert different == [True, False, False, False, False, True]  # only "math" has dropout
        first.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


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


def test_benchmark_on_tiny_sizes():
    rows = list(suite_rows.measure(Options(quick=True, rounds=2, only="layer.* 8 adapters")))
    assert [row["method"] for row in rows] == ["frozen", "one adapter", "rows", "rows, anew", "one by one"] * 2
    for row in rows:
        assert row["ms_q1"] <= row["ms"] <= row["ms_q3"]
        assert row["error"] < 1e-5
        assert row["generator_bytes"] == 8 * 2 * (32 * 31 // 2) * 4
        assert row["kept_delta_bytes"] == 8 * 2 * 32 * 32 * 4
    how = {"device": "cpu", "dtype": "float32", "quick": True}
    assert in_fresh_process("suite_rows:memory_growth", count=64, **how) > 2**20
