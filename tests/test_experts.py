"""Experts of a mixture behind rotations of their own: against a float64 reference, in models, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import oftv2
from conftest import adapted_paths, assert_close, perturb, randomize, snapshot
from oftv2 import AdapterError, OFTConfig, OFTExperts, OFTLinear, PeftFormatWarning, TargetWarning, reference
from oftv2 import functional as F

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
# (module, class, configuration): with a gate; transposed with biases, interleaved; without a gate; with a norm
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
KINDS = {
    "qwen3_moe": ("Qwen3MoeExperts", "Qwen3MoeConfig"),
    "gpt_oss": ("GptOssExperts", "GptOssConfig"),
    "nemotron_h": ("NemotronHExperts", "NemotronHConfig"),
    "deepseek_v3": ("DeepseekV3Experts", "DeepseekV3Config"),
}


def experts(kind="qwen3_moe", dtype=torch.float64, implementation="eager"):
    """A module of experts with random weights."""
    modeling = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["modeling"])
    name, config = KINDS[kind]
    module = getattr(modeling, name)(_config(config, implementation))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def _config(name, implementation="eager"):
    config = getattr(transformers, name)(**SIZES)
    config._experts_implementation = implementation
    return config


def routed(dtype=torch.float64, tokens=23, count=5, top_k=2):
    """Hidden states, experts and weights of tokens; the last expert gets none."""
    hidden = torch.randn(tokens, 64, dtype=dtype)
    index = torch.stack([torch.randperm(count - 1)[:top_k] for _ in range(tokens)] or [torch.empty(0, top_k).long()])
    return hidden, index.view(tokens, top_k), torch.rand(tokens, top_k, dtype=dtype)


def rotated_weights(base, generators, b):
    """Every expert's weights with its rotations folded in, by the reference."""
    R = reference.cayley_neumann(reference.skew(generators, b), 4)
    out, start = {}, 0
    for name in ("gate_up_proj" if base.has_gate else "up_proj", "down_proj"):
        weight = getattr(base, name).detach()
        weight = weight.mT if base.is_transposed else weight
        count, _, d = weight.shape
        blocks = R[start : start + count * d // b].unflatten(0, (count, -1))
        start += count * d // b
        rotated = torch.stack([reference.rotate(own, part.mT) for own, part in zip(weight, blocks, strict=True)])
        out[name] = rotated.mT if base.is_transposed else rotated
    assert start == len(R)
    return out


def gradients(call, *leaves):
    out = call()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out.detach(), torch.autograd.grad(out, leaves, upstream.to(out.dtype))


class TestLayer:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_agrees_with_rotated_weights(self, kind, dtype, tolerance):
        base = experts(kind, dtype)
        layer = OFTExperts(copy.deepcopy(base), OFTConfig(block_size=16))
        randomize(layer, 0.1)
        packed = layer.generators["default"]
        hidden, index, weights = routed(dtype)
        leaves = hidden.requires_grad_(), weights.requires_grad_(), packed
        actual, actual_grads = gradients(lambda: layer(hidden, index, weights), *leaves)
        wide = copy.deepcopy(base).double()
        leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]

        def expected_call():
            rotated = rotated_weights(wide, leaves[2], 16)
            return torch.func.functional_call(wide, rotated, (leaves[0], index, leaves[1]))

        expected, expected_grads = gradients(expected_call, *leaves)
        assert actual.dtype == dtype
        assert packed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert packed.shape == (5 * (64 + 48) // 16, 120)
        assert_close("y", actual, expected, tolerance)
        for name, one, other in zip(("∂x", "∂weights", "∂generators"), actual_grads, expected_grads, strict=True):
            assert_close(name, one, other, tolerance)

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_starts_as_the_base(self, kind, implementation):
        base = experts(kind, torch.float32, implementation)
        layer = OFTExperts(base, OFTConfig(block_size=8))
        inputs = routed(torch.float32)
        assert_close("y", layer(*inputs), base(*inputs), 1e-6)
        layer.enabled = False
        assert torch.equal(layer(*inputs), base(*inputs))

    @pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (3, 4)])
    def test_few_tokens(self, tokens, top_k):
        base = experts()
        layer = OFTExperts(copy.deepcopy(base), OFTConfig(block_size=16))
        randomize(layer, 0.1)
        inputs = routed(tokens=tokens, top_k=top_k)
        rotated = rotated_weights(base, layer.generators["default"].detach(), 16)
        assert_close("y", layer(*inputs), torch.func.functional_call(base, rotated, inputs), 1e-12)

    @pytest.mark.parametrize("kind", KINDS)
    def test_merges_and_comes_back(self, kind):
        base = experts(kind, torch.float32)
        layer = OFTExperts(base, OFTConfig(block_size=16)).eval()
        randomize(layer, 0.1)
        inputs = routed(torch.float32)
        before, plain = layer(*inputs), {name: value.clone() for name, value in base.state_dict().items()}
        layer.merge()
        assert type(layer.base_layer) is type(base)
        assert_close("merged", layer(*inputs), before, 2e-6)
        layer.unmerge()
        for name, value in layer.base_layer.state_dict().items():
            assert_close(name, value, plain[name], 1e-6)

    def test_adapters_in_turn_with_different_blocks(self):
        layer = OFTExperts(experts(), OFTConfig(block_size=16), adapter_name="a")
        layer.add("b", OFTConfig(block_size=4, block_share=True))
        randomize(layer, 0.1)
        inputs = routed()
        layer.activate(["a", "b"])
        actual = layer(*inputs)
        base = layer.base_layer
        once = copy.deepcopy(base)
        for name, weight in rotated_weights(
            base, layer.generators["b"].detach().expand(5 * (64 + 48) // 4, -1), 4
        ).items():
            setattr(once, name, torch.nn.Parameter(weight))
        rotated = rotated_weights(once, layer.generators["a"].detach(), 16)
        assert_close("y", actual, torch.func.functional_call(base, rotated, inputs), 1e-12)

    def test_a_token_is_kept_once(self):
        """Of the hidden states' size nothing is kept but themselves, though every token goes to four experts."""
        layer = OFTExperts(experts(dtype=torch.float32), OFTConfig(block_size=16))
        hidden, index, weights = routed(torch.float32, tokens=400, top_k=4)
        kept = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(hidden.requires_grad_(), index, weights)
        frozen = {parameter.data_ptr() for parameter in layer.base_layer.parameters()}
        routed_size = 4 * hidden.nbytes
        inner = routed_size * 48 // 64
        large = [size for pointer, size in kept.items() if pointer not in frozen and size >= inner / 2]
        # the hidden states; gate and up as they come and the gate's activation; what meets down_proj
        assert len(large) <= 5
        assert sum(large) <= hidden.nbytes + 5 * inner

    def test_compiles_in_one_graph(self):
        layer = OFTExperts(experts(dtype=torch.float32), OFTConfig(block_size=16))
        randomize(layer, 0.1)
        hidden, index, weights = routed(torch.float32)
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for mode in (True, False):
            layer.train(mode)
            actual, grads = gradients(lambda: call(hidden, index, weights), layer.generators["default"])
            expected, others = gradients(lambda: layer(hidden, index, weights), layer.generators["default"])
            assert_close("y", actual, expected, 1e-6)
            assert_close("∂generators", grads[0], others[0], 1e-6)

    def test_kernels(self, device):
        layer = OFTExperts(experts(dtype=torch.float32), OFTConfig(block_size=16))
        randomize(layer, 0.1)
        inputs = routed(torch.float32)
        expected = gradients(lambda: layer(*inputs), layer.generators["default"])
        layer.to(device)
        actual = gradients(lambda: layer(*(tensor.to(device) for tensor in inputs)), layer.generators["default"])
        assert_close("y", actual[0].cpu(), expected[0], 5e-6)
        assert_close("∂generators", actual[1][0].cpu(), expected[1][0], 5e-6)


def model_of(name="Qwen3Moe", **fields):
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SIZES, **fields}))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def llama4():
    config = transformers.Llama4TextConfig(**{**SIZES, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1})
    return transformers.Llama4ForCausalLM(config)


WRAPPED = {"block_size": 16, "target_modules": ["all-linear", "experts"]}


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
        with pytest.raises(AdapterError, match=r"mlp.experts is a Qwen3MoeExperts, which cannot be adapted"):
            oftv2.wrap_model(model, **WRAPPED)


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


def test_rotation_of_no_tokens_is_not_computed():
    """Functional check that Δ of an expert without tokens gets no gradient, and the others do."""
    layer = OFTExperts(experts(dtype=torch.float32), OFTConfig(block_size=16))
    layer(*routed(torch.float32)).sum().backward()
    gradient = layer.generators["default"].grad
    first, second = gradient.split([5 * 64 // 16, 5 * 48 // 16])
    for part in (first, second):
        by_expert = part.unflatten(0, (5, -1)).flatten(1).any(1)
        assert by_expert.tolist() == [True] * 4 + [False]
    assert F.cayley_neumann(gradient, 16).isfinite().all()
