"""Several adapters one after the other, in one layer: against the float64 reference, merged, cached."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import OperatorCounter, assert_close, randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    OFTConv2d,
    OFTEmbedding,
    OFTLinear,
    QuantOFTLinear,
    diagnostics,
    explain,
    reference,
)
from oftv2 import functional as F
from quantized import dequantized, quantized

D = 48
SIZES = {"equal": (8, 8), "one divides the other": (4, 16), "neither divides": (6, 8), "three": (4, 6, 16)}
KINDS = ["linear", "conv1d", "embedding", "conv2d", "conv2d-groups", "nf4", "linear64"]


def base_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "nf4":
        return quantized("nf4", 96, 24)
    return {
        "linear": lambda: nn.Linear(D, 20),
        "linear64": lambda: nn.Linear(D, 20, dtype=torch.float64),
        "conv1d": lambda: Conv1D(20, D),
        "embedding": lambda: nn.Embedding(11, D),
        "conv2d": lambda: nn.Conv2d(12, 5, 2, stride=2),
        "conv2d-groups": lambda: nn.Conv2d(48, 6, (1, 2), groups=2, padding=1),
    }[kind]()


CLASSES = {"conv2d": OFTConv2d, "conv2d-groups": OFTConv2d, "embedding": OFTEmbedding, "nf4": QuantOFTLinear}


def adapted(kind: str, sizes, **fields):
    """A layer with adapters a, b, … of these block sizes, all of them active, with random generators."""
    names = "abc"[: len(sizes)]
    configs = [OFTConfig(block_size=size, **fields) for size in sizes]
    layer = CLASSES.get(kind, OFTLinear)(base_layer(kind), configs[0], adapter_name="a")
    for name, config in zip(names[1:], configs[1:], strict=True):
        layer.add(name, config)
    layer.activate(names, trainable=True)
    randomize(layer, std=0.05)
    return layer


def rotations64(layer) -> dict[str, torch.Tensor]:
    """By adapter, the dense R in float64, differentiable in a float64 copy of its generators, ``leaf``."""
    dense = {}
    for name, settings in layer.rotations.items():
        leaf = layer.generators[name].detach().double().requires_grad_()
        Q = reference.skew(leaf, settings.block_size)
        R = reference.cayley(Q) if settings.parametrization == "cayley" else reference.cayley_neumann(Q, settings.terms)
        dense[name] = torch.block_diag(*R.expand(settings.num_blocks, -1, -1))
        dense[name].leaf = leaf
    return dense


def example(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    if kind == "embedding":
        return torch.randint(11, (3, 5), generator=generator)
    if kind.startswith("conv2d"):
        return torch.randn(2, 12 if kind == "conv2d" else 48, 5, 6, generator=generator)
    x = torch.randn(3, 5, 96 if kind == "nf4" else D, generator=generator)
    return x.double() if kind == "linear64" else x


def expected(kind: str, layer, x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """The layer in float64, with the dense rotation R of everything that it rotates."""
    base = layer.base_layer
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().double()
    if kind == "embedding":
        return base.weight.detach().double()[x] @ R
    if kind.startswith("conv2d"):
        rows = base.weight.detach().double().flatten(1)
        parts = R.unflatten(0, (base.groups, -1)).unflatten(2, (base.groups, -1))
        own = [parts[group, :, group] for group in range(base.groups)]
        kernels = torch.cat([r @ p.mT for r, p in zip(rows.chunk(base.groups), own, strict=True)])
        kernels = kernels.view(base.weight.shape)
        return nn.functional.conv2d(x, kernels, bias, base.stride, base.padding, base.dilation, base.groups)
    weight = dequantized(base) if kind == "nf4" else base.weight.detach().double()
    return x @ R @ (weight if kind == "conv1d" else weight.mT) + bias


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_every_gradient(kind, sizes):
    layer, x = adapted(kind, sizes), example(kind)
    relative = 1e-12 if kind == "linear64" else 4e-6
    rotations = rotations64(layer)
    for order in ("abc"[: len(sizes)], "abc"[: len(sizes)][::-1], "ab"):
        layer.activate(order)
        R = torch.linalg.multi_dot([rotations[name] for name in order])
        x_in, x_64 = x.clone(), x.double() if x.is_floating_point() else x
        if x.is_floating_point():
            x_in.requires_grad_()
            x_64 = x_64.clone().requires_grad_()
        out, wanted = layer(x_in), expected(kind, layer, x_64, R)
        assert_close("output", out, wanted, relative)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        layer.zero_grad()
        for name in order:
            rotations[name].leaf.grad = None
        out.backward(upstream)
        wanted.backward(upstream.double(), retain_graph=True)
        for name in order:
            assert_close(f"∂{name}", layer.generators[name].grad, rotations[name].leaf.grad, 4 * relative)
        if x.is_floating_point():
            assert_close("∂x", x_in.grad, x_64.grad, relative)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_the_same_function_and_comes_off_again(kind, sizes):
    layer, x = adapted(kind, sizes).eval(), example(kind)
    base = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        plain, rotated = base(x), layer(x)
        layer.merge()
        assert_close("merged", layer.base_layer(x), rotated, 4e-6)
        layer.unmerge()
        assert_close("unmerged", layer.base_layer(x), plain, 4e-6)
        assert_close("rotated again", layer(x), rotated, 4e-6)
    assert (rotated - plain).norm() > 0.05 * plain.norm()


def test_the_order_matters_and_is_that_of_the_forward_pass():
    layer, x = adapted("linear", (8, 8)), example("linear")
    first, second = (F.rotate(x, layer.rotations[name].delta(layer.generators[name])) for name in "ab")
    layer.activate("ab")
    with torch.no_grad():
        one_by_one = layer.base_layer(F.rotate(first, layer.rotations["b"].delta(layer.generators["b"])))
        assert_close("a, then b", layer(x), one_by_one, 1e-6)
        assert (layer(x) - layer.base_layer(second)).norm() > 1e-3
        layer.activate("ba")
        assert (layer(x) - one_by_one).norm() > 1e-3 * one_by_one.norm()


@pytest.mark.parametrize("form", ["input", "weight"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_form(sizes, form):
    layer, x = adapted("linear", sizes), example("linear")
    layer.form = form
    rotations = rotations64(layer)
    R = torch.linalg.multi_dot([rotations[name] for name in layer.sequence])
    out, wanted = layer(x), expected("linear", layer, x.double(), R)
    assert_close(form, out, wanted, 4e-6)
    (out.square().sum()).backward()
    wanted.square().sum().backward()
    for name in layer.sequence:
        assert_close(f"∂{name}", layer.generators[name].grad, rotations[name].leaf.grad, 2e-5)


@pytest.mark.parametrize(
    "fields", [{"parametrization": "cayley"}, {"block_share": True}, {"neumann_terms": 2}], ids=lambda f: next(iter(f))
)
def test_every_kind_of_rotation(fields):
    layer, x = adapted("linear", (4, 6), **fields), example("linear")
    rotations = rotations64(layer)
    wanted = expected("linear", layer, x.double(), rotations["a"] @ rotations["b"])
    assert_close("output", layer(x), wanted, 4e-6)


def test_each_adapter_drops_its_own_blocks():
    layer, x = adapted("linear", (8, 8)), example("linear")
    layer.rotations["a"] = type(layer.rotations["a"])(8, 6, dropout=0.999999)
    layer.train()
    rotations = rotations64(layer)
    assert_close("a dropped whole", layer(x), expected("linear", layer, x.double(), rotations["b"]), 4e-6)
    layer.eval()
    R = rotations["a"] @ rotations["b"]
    assert_close("not in eval", layer(x), expected("linear", layer, x.double(), R), 4e-6)


def test_bf16_keeps_the_effect_of_small_rotations():
    """Δ is composed in float32 and rounded once, autocast or not: R would lose rotations this small."""
    layer = adapted("linear", (8, 6))
    for parameter in layer.generators.values():
        parameter.data.mul_(0.02)
    deltas = [layer.rotations[name].delta(layer.generators[name].double()) for name in "ab"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = layer.delta()
    assert delta.dtype == torch.float32
    assert_close("Δ", delta, F.compose(deltas), 1e-6)


@given(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=4), st.integers(0, 1000))
def test_composition_of_deltas(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(24 // b, b, b, generator=generator, dtype=torch.float64) for b in sizes]
    eye = torch.eye(24, dtype=torch.float64)
    dense = eye
    for delta in deltas:
        dense = dense @ (eye + torch.block_diag(*delta))
    torch.testing.assert_close(torch.block_diag(*F.compose(deltas)) + eye, dense)


def test_layers_without_an_active_adapter_are_their_base_layer():
    layer, x = adapted("linear", (8, 8)), example("linear")
    layer.activate(["elsewhere"])
    with OperatorCounter() as counter:
        assert torch.equal(layer(x), layer.base_layer(x))
    assert counter.names == []
    with pytest.raises(AdapterError, match="no active adapter to merge; this layer has a, b"):
        layer.merge()
    with pytest.raises(AdapterError, match="no adapter is active on this layer"):
        explain(layer, 5)
    assert "no active adapter" in repr(layer)


def test_what_is_asked_of_a_layer_with_several():
    layer = adapted("linear", (6, 8))
    assert layer.block_size == 24
    assert explain(layer, 70).problem.block_size == 24
    single = {}
    for name in "ab":
        layer.activate(name)
        single[name] = diagnostics(layer)["Linear"]
        assert layer.active == name
    layer.activate("ab")
    assert diagnostics(layer)["Linear"].generator_norm == max(figures.generator_norm for figures in single.values())
    with pytest.raises(AdapterError, match=r"active are \['a', 'b'\]"):
        layer.rotation  # noqa: B018


CHANGES = {
    "copy_ to the first": lambda layer: layer.generators["a"].requires_grad_(False).mul_(2),
    "copy_ to the second": lambda layer: layer.generators["b"].requires_grad_(False).mul_(2),
    "another tensor by .data": lambda layer: setattr(layer.generators["b"], "data", layer.generators["a"].data * 0.5),
    "another parameter": lambda layer: layer.generators.update({"b": nn.Parameter(layer.generators["a"].data * 0.5)}),
    "another order": lambda layer: layer.activate("ba"),
    "one of them": lambda layer: layer.activate("b"),
    "the order written to": lambda layer: setattr(layer, "sequence", ("b", "a")),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "generators.a": layer.generators["b"].data * 0.3}
    ),
    "train(), .data, eval()": lambda layer: (layer.generators["b"].data.fill_(0.02), layer.train(), layer.eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_no_change_is_missed_by_the_cache(change, duplicate):
    layer, x = adapted("linear", (8, 8)).eval(), example("linear")

    def check(layer):
        rotations = rotations64(layer)
        R = torch.linalg.multi_dot([rotations[name] for name in layer.sequence] + [torch.eye(D, dtype=torch.float64)])
        with torch.no_grad():
            assert_close("output", layer(x), expected("linear", layer, x.double(), R), 4e-6)

    check(layer)
    kept = layer._cache
    check(layer)
    assert layer._cache is kept is not None
    other = duplicate(layer)
    change(other)
    check(other)
    check(layer)


def test_compiled_sequences():
    layer, x = adapted("linear", (6, 8)), example("linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.activate("b")
    torch.testing.assert_close(compiled(x), layer(x))
