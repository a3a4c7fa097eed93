"""A module of experts behind rotations of their own: against a float64 reference, and what a pass keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from conftest import assert_close, randomize
from mixtures import SIZES
from oftv2 import OFTConfig, OFTExperts, reference
from oftv2 import functional as F

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

    def test_torch_func(self):
        layer, inputs = OFTExperts(experts(), OFTConfig(block_size=16)), routed()
        randomize(layer)
        packed = layer.generators["default"]
        (expected,) = torch.autograd.grad(layer(*inputs).square().sum(), packed)

        def loss(packed):
            return torch.func.functional_call(layer, {"generators.default": packed}, inputs).square().sum()

        assert_close("∂generators", torch.func.grad(loss)(packed.detach()), expected, 1e-12)

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
