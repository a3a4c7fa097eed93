"""Models with experts behind rotations of their own: wrapped, trained, saved, merged, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

import oftv2
from conftest import adapted_paths, assert_close, perturb, randomize, snapshot
from mixtures import SIZES, WRAPPED, model_of
from oftv2 import AdapterError, OFTConfig, OFTExperts, OFTLinear, PeftFormatWarning, TargetWarning

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def llama4():
    config = transformers.Llama4TextConfig(**{**SIZES, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1})
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "GptOss", "Olmoe"])
class TestModels:
    def test_trains_saves_loads_and_merges(self, name, tmp_path):
        model = oftv2.wrap_model(model_of(name), **WRAPPED)
        assert type(model.get_submodule("model.layers.1.mlp.experts")) is OFTExperts
        assert type(model.get_submodule("model.layers.1.self_attn.q_proj")) is OFTLinear
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        for _ in range(4):
            losses.append(model.train()(IDS, labels=IDS).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.1
        expected = model.eval()(IDS).logits
        with pytest.warns(PeftFormatWarning, match="experts with stacked weights"):
            oftv2.save_adapter(model, tmp_path / "adapter")
        loaded = oftv2.load_adapter(model_of(name), tmp_path / "adapter")
        assert torch.equal(loaded(IDS).logits, expected)
        oftv2.merge(loaded).save_pretrained(tmp_path / "merged")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not adapted_paths(plain)
        assert_close("logits", plain(IDS).logits, expected, 1e-5)

    def test_checkpointing_gives_equal_gradients(self, name):
        found = []
        for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
            model = oftv2.wrap_model(model_of(name), **WRAPPED).train()
            randomize(model)
            if options:
                model.gradient_checkpointing_enable(options)
            model(IDS, labels=IDS).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        for other in found[1:]:
            for key, gradient in found[0].items():
                assert_close(key, other[key], gradient, 1e-6)


class TestWrapping:
    def test_all_linear_says_that_it_leaves_them_out(self):
        with pytest.warns(TargetWarning, match=r"2 modules \(model.layers.0.mlp.experts, .*rotates each expert"):
            model = oftv2.wrap_model(model_of(), block_size=16)
        assert not any("experts" in path for path in adapted_paths(model))
        with pytest.warns(TargetWarning):
            oftv2.add_adapter(model, "other", block_size=8)

    @pytest.mark.parametrize(
        "fields", [{"exclude_modules": ["experts"]}, {"target_modules": ["q_proj"]}, WRAPPED], ids=str
    )
    def test_says_nothing_where_that_is_meant(self, fields):
        with warnings.catch_warnings():
            warnings.simplefilter("error", TargetWarning)
            oftv2.wrap_model(model_of(), **{"block_size": 16, **fields})

    def test_all_linear_with_others(self):
        model = oftv2.wrap_model(model_of(), block_size=16, target_modules=["all-linear", "embed_tokens", "experts"])
        ends = {path.rpartition(".")[2] for path in adapted_paths(model)}
        assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "embed_tokens", "experts"} - {"gate"}
        assert OFTConfig(**WRAPPED).target_modules == ("all-linear", "experts")

    def test_a_kind_that_cannot_be_adapted(self):
        model = llama4()
        with pytest.raises(AdapterError, match=r"feed_forward.experts is a Llama4TextExperts, which cannot be adapted"):
            oftv2.wrap_model(model, block_size=16, target_modules=["experts"])
        with pytest.warns(TargetWarning, match="this kind cannot be adapted"):
            oftv2.wrap_model(model, block_size=16)
        assert "model.layers.0.feed_forward.shared_expert.up_proj" in adapted_paths(model)
        assert not any("router" in path for path in adapted_paths(model))
        assert model(IDS).logits.isfinite().all()

    def test_a_router_is_no_linear_layer(self):
        with pytest.raises(AdapterError, match=r"feed_forward.router .*is a tuple and no linear layer's output"):
            oftv2.wrap_model(llama4(), block_size=16, target_modules=["router"])

    def test_biases_of_experts(self):
        model = oftv2.wrap_model(model_of("GptOss"), **WRAPPED, bias="oft_only")
        biases = [
            model.get_parameter(f"model.layers.0.mlp.experts.base_layer.{n}_bias")
            for n in ("gate_up_proj", "down_proj")
        ]
        model(IDS, labels=IDS).loss.backward()
        assert all(bias.requires_grad and bias.grad.any() for bias in biases)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block_size": 24}, r"model.layers.0.mlp.experts: block_size=24 does not divide .* in groups of 16"),
            ({"block_size": 32}, r"does not divide .*the nearest block sizes that do: 16"),
        ],
    )
    def test_sizes_that_do_not_divide(self, change, message):
        model = model_of()
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message):
            oftv2.wrap_model(model, target_modules=["experts"], **change)
        assert snapshot(model) == before

    def test_experts_spread_over_devices(self):
        model = model_of()
        model.model.layers[1].mlp.experts._is_expert_parallel = True
        with pytest.raises(AdapterError, match=r"model.layers.1.mlp.experts: these experts are spread over devices"):
            oftv2.wrap_model(model, **WRAPPED)

    def test_weights_in_8_bit_are_not_taken_for_plain_ones(self):
        model = model_of()
        layer = model.model.layers[0].mlp.experts
        layer.down_proj = torch.nn.Parameter(layer.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
        layer.gate_up_proj = torch.nn.Parameter(layer.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(AdapterError, match=r"mlp.experts is a Qwen3MoeExperts, which cannot be adapted"):
            oftv2.wrap_model(model, **WRAPPED)
        with pytest.warns(TargetWarning, match="this kind cannot be adapted"):
            oftv2.wrap_model(model, block_size=16)


class TestRefusedInUse:
    def wrapped(self):
        model = oftv2.wrap_model(model_of(), **WRAPPED)
        return model, model.get_submodule("model.layers.0.mlp.experts")

    def test_rows_of_adapters(self):
        model, _ = self.wrapped()
        with (
            oftv2.adapters_per_row(model, ["default", None]),
            pytest.raises(AdapterError, match=r"mlp.experts: experts see"),
        ):
            model(IDS)

    def test_weights_that_are_elsewhere_or_would_train(self):
        model, layer = self.wrapped()
        layer.base_layer.down_proj.requires_grad_(True)
        with pytest.raises(AdapterError, match=r"mlp.experts: the experts' weights are to be frozen"):
            model(IDS)
        layer.base_layer.to("meta")
        with pytest.raises(AdapterError, match=r"mlp.experts: the experts' weights are not here \(offloaded"):
            model(IDS)

    def test_as_a_lora_and_merging_files(self, tmp_path):
        model, _ = self.wrapped()
        from oftv2.checkpoint_merge import merge_checkpoint
        from oftv2.conversion import save_as_lora

        with pytest.raises(AdapterError, match=r"mlp.experts are experts: no LoRA is made of those"):
            save_as_lora(model, tmp_path / "lora", rank=4)
        model_of("GptOss").save_pretrained(tmp_path / "base")
        model = oftv2.wrap_model(perturb(transformers.GptOssForCausalLM.from_pretrained(tmp_path / "base")), **WRAPPED)
        with pytest.warns(PeftFormatWarning):
            oftv2.save_adapter(model, tmp_path / "adapter")
        with pytest.raises(AdapterError, match=r"mlp.experts are experts with stacked weights.*Merge in memory"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_another_base(self, tmp_path):
        model = oftv2.wrap_model(model_of(), block_size=16, target_modules=["experts"])
        with pytest.warns(PeftFormatWarning):
            oftv2.save_adapter(model, tmp_path)
        other = model_of()
        with torch.no_grad():
            for layer in other.model.layers:
                layer.mlp.experts.down_proj.mul_(-1)
        with pytest.raises(AdapterError, match=r"mlp.experts: the base weights differ by 200%"):
            oftv2.load_adapter(other, tmp_path)
