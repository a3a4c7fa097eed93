"""Language models on batches whose rows go through different adapters: each row is what it would be alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oftv2
from conftest import assert_close, randomize
from mixed_batches import ROWS, one_by_one, only, wrapped
from oftv2 import AdapterError, adapters_per_row
from trainer_runs import load


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
        assert not {"generate", "_expand_inputs_for_generation", "init_continuous_batching"} & set(vars(model))
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
        tiny_llama().save_pretrained(tmp_path)
        model = wrapped(load(tmp_path, nf4=True).eval())
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
