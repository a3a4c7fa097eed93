"""Where PEFT's OFT is wrong: each test shows it first, so that the claim cannot grow stale, and then ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import oftv2
from conftest import randomize
from oftv2 import OFTLinear, StabilityWarning, diagnostics, merge, reference, unmerge, wrap_model
from peers import (
    fill,
    linear_pair,
    orthogonality_error,
    our_generators,
    our_rotation,
    peft_generators,
    peft_model,
    peft_rotation,
    relative,
)


def test_dropout_is_applied() -> None:
    base = nn.Sequential(nn.Linear(64, 24))
    theirs = peft_model(base, oft_block_size=16, target_modules=["0"], module_dropout=0.5)
    fill(theirs)
    x = torch.randn(5, 64)
    theirs.train()
    first = theirs(x)
    assert all(torch.equal(first, theirs(x)) for _ in range(20))  # stored in the configuration, and that was it

    layer = OFTLinear(nn.Linear(64, 64, bias=False), oftv2.OFTConfig(block_size=16, dropout=0.5)).train()
    layer.base_layer.weight.data = torch.eye(64)  # so that the layer returns the rotated input itself
    randomize(layer)
    whole, kept = reference.rotate(x, our_rotation(layer)).view(5, 4, 16), []
    for _ in range(100):  # of four blocks each
        y = layer(x).view(5, 4, 16)
        for block in range(4):
            rotated = torch.allclose(y[:, block], whole[:, block], atol=1e-5)
            identity = torch.equal(y[:, block], x.view(5, 4, 16)[:, block])
            assert rotated != identity
            kept.append(rotated)
    # 400 independent coins: five standard deviations of their mean are 5 · 0.5 / √400 = 0.125
    assert abs(sum(kept) / len(kept) - 0.5) < 0.125
    torch.testing.assert_close(layer.eval()(x).view(5, 4, 16), whole, atol=1e-5, rtol=0)


def test_exact_and_truncated_rotate_the_same_way() -> None:
    ours, theirs = linear_pair()
    fill(theirs, std=0.01)
    inverted = peft_rotation(theirs, exact=True) @ peft_rotation(theirs)
    effect = torch.linalg.matrix_norm(peft_rotation(theirs) - torch.eye(16)).amin()
    assert torch.linalg.matrix_norm(inverted - torch.eye(16)).amax() < 0.01 * effect  # one undoes the other

    exact = wrap_model(nn.Sequential(nn.Linear(64, 24)), target_modules=["0"], block_size=16, parametrization="cayley")
    randomize(ours, std=0.01)
    randomize(exact, std=0.01)
    # (I+Q)(I−Q)⁻¹ minus the truncation is (I+Q)(I−Q)⁻¹Q⁵, of the norm ‖Q‖⁵ as the Cayley transform is orthogonal
    q = diagnostics(ours)["0"].generator_norm
    difference = torch.linalg.matrix_norm(our_rotation(ours[0]) - our_rotation(exact[0]), ord=2).amax()
    assert difference < 1.01 * q**5 + 1e-6  # 1e-6: a few float32 roundings of entries near 1
    assert q**5 + 1e-6 < 0.01 * effect


def test_orthogonality_of_the_defaults() -> None:
    """At b = 32 and packed std 0.02, for the same generators."""
    ours, theirs = linear_pair(b=32)
    fill(theirs, std=0.02)
    randomize(ours, std=0.02)
    assert orthogonality_error(peft_rotation(theirs)) > 5e-3
    # k = 4 leaves ‖Q¹⁰‖_F ≤ √b ‖Q‖₂¹⁰ = 8e-7 at ‖Q‖₂ ≈ 0.21; rounding R once to float32 leaves about √b · 2⁻²⁴ · 2
    measured = diagnostics(ours)["0"]
    bound = math.sqrt(32) * measured.generator_norm**10 + 2e-6
    assert measured.orthogonality_error < bound < 1e-5
    assert orthogonality_error(our_rotation(ours[0])) < bound


def test_large_generators_do_not_diverge_in_silence() -> None:
    ours, theirs = linear_pair(b=32)
    fill(theirs, std=0.2)
    x = torch.randn(3, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs.train()(x)
    assert torch.linalg.svdvals(peft_rotation(theirs)).amax() > 10

    randomize(ours, std=0.2)
    with pytest.warns(StabilityWarning, match=r"^0: .*‖Q‖₂ = \d.*cayley"):
        ours.train()(x)
    exact = wrap_model(nn.Sequential(nn.Linear(64, 24)), target_modules=["0"], parametrization="cayley")
    for std in (0.2, 2.0, 20.0):
        randomize(exact, std=std)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exact.train()(x)
        # float32: solving with I − Q, of condition √(1 + ‖Q‖²), in 32 steps
        q = diagnostics(exact)["0"].generator_norm
        assert diagnostics(exact)["0"].orthogonality_error < 32 * 2**-24 * math.sqrt(1 + q * q) * 4


CONVOLUTIONS = {
    "3x3": (nn.Conv2d, (4, 6, 3), {}),
    "3x3-stride-padding-dilation": (nn.Conv2d, (4, 6, 3), {"stride": 2, "padding": (2, 1), "dilation": (1, 2)}),
    "1x3": (nn.Conv2d, (4, 6, (1, 3)), {"padding": (0, 1)}),
    "3x2-no-bias": (nn.Conv2d, (4, 6, (3, 2)), {"bias": False}),
    "3x3-groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, (4, 8, 4), {"groups": 4}),
}


def unfold_reference(conv: nn.Conv2d, x: Tensor, R: Tensor) -> Tensor:
    """What a convolution of rotated patches is, in float64: unfold, rotate, multiply, group by group."""
    kernel, stride, padding, dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    patches = nn.functional.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride).mT  # (N, L, C·kh·kw)
    patches = reference.rotate(patches, R).unflatten(-1, (conv.groups, -1))
    weight = conv.weight.double().flatten(1).unflatten(0, (conv.groups, -1))
    y = torch.einsum("nlgp,gop->ngol", patches, weight).flatten(1, 2)
    y = y if conv.bias is None else y + conv.bias.double()[:, None]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [(s + 2 * p - r) // t + 1 for s, p, r, t in zip(x.shape[2:], padding, reach, stride, strict=True)]
    return y.unflatten(-1, size)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=list(CONVOLUTIONS))
def test_convolutions_of_any_kernel(case: str) -> None:
    make, args, fields = CONVOLUTIONS[case]
    conv, b = make(*args, **fields), 2
    x = torch.randn(2, 4, 9, 8)
    if case == "3x3":  # PEFT adds up overlapping patches: nothing trained yet, and the output is far off
        theirs = peft_model(nn.Sequential(conv), oft_block_size=b, target_modules=["0"])
        assert relative(theirs(x), conv(x)) > 2
    if case in ("1x3", "3x2-no-bias"):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            peft_model(nn.Sequential(conv), oft_block_size=b, target_modules=["0"])(x)
    if case == "3x3-groups":
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            peft_model(nn.Sequential(conv), oft_block_size=b, target_modules=["0"]).merge_adapter()
    if case == "3x3-stride-padding-dilation":
        conv_dilated = nn.Conv2d(4, 6, 3, dilation=2)
        with pytest.raises(ValueError, match="dilation > 1 is not supported"):
            peft_model(nn.Sequential(conv_dilated), oft_block_size=b, target_modules=["0"])

    model = wrap_model(nn.Sequential(conv), target_modules=["0"], block_size=b).train()
    torch.testing.assert_close(model(x), conv(x), atol=0, rtol=0)  # a fresh adapter changes nothing
    randomize(model, std=0.3)
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    p = our_generators(model)["0"].detach().double().requires_grad_()
    expected = unfold_reference(conv, exact, reference.cayley_neumann(reference.skew(p, b), 4))
    y = model(mine)
    g = torch.randn(y.shape)
    (y * g).sum().backward()
    (expected * g).sum().backward()
    # float32 against float64: sums of at most 36 · 72 products, 2⁻²⁴ each, growing like a random walk
    assert y.shape == expected.shape
    assert relative(y.detach(), expected.detach()) < 1e-6
    assert relative(mine.grad, exact.grad) < 1e-6
    assert relative(our_generators(model)["0"].grad, p.grad) < 2e-6
    merge(model)
    assert type(model[0]) is nn.Conv2d
    assert relative(model(x), expected.detach()) < 1e-6


def test_four_dimensional_input_to_a_linear_layer() -> None:
    ours, theirs = linear_pair()
    x = torch.randn(2, 3, 5, 64)
    with pytest.raises(RuntimeError, match="shape"):
        theirs(x)
    randomize(ours)
    torch.testing.assert_close(ours(x), ours(x.flatten(0, 2)).view(2, 3, 5, 24), atol=1e-6, rtol=1e-5)


def test_tied_embeddings_survive_a_merge(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    ids = torch.randint(3, 128, (2, 9))
    head = base.lm_head.weight.detach().clone()
    theirs = peft_model(base, oft_block_size=16, target_modules=["embed_tokens", "q_proj"])
    fill(theirs)
    with torch.no_grad():
        before = theirs(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.merge_adapter()
        assert relative(theirs(ids).logits, before) > 0.1

    ours = wrap_model(base, block_size=16, target_modules=["embed_tokens", "q_proj"])
    randomize(ours)
    with torch.no_grad():
        before = ours(ids).logits
        merge(ours)
        assert torch.equal(ours.lm_head.weight, head)
        merged = ours(ids).logits
        assert relative(merged, before) < 1e-5  # float32 weights, rounded once, through two layers
        ours.save_pretrained(tmp_path)
        again = type(ours).from_pretrained(tmp_path).eval()
        assert torch.equal(again.lm_head.weight, head)
        assert torch.equal(again(ids).logits, merged)


@pytest.mark.parametrize("unload", [True, False], ids=["unload", "keep-layers"])
def test_tied_embeddings_survive_merge_and_unmerge(tiny_llama: Callable[..., nn.Module], unload: bool) -> None:
    """A merge that keeps the layers, taken back, leaves the weights tied as they were."""
    ours = wrap_model(tiny_llama(tie_word_embeddings=True), block_size=16, target_modules=["embed_tokens"])
    randomize(ours)
    head = ours.lm_head.weight.detach().clone()
    merge(ours, unload=unload)
    assert torch.equal(ours.lm_head.weight, head)
    if unload:
        assert ours.model.embed_tokens.weight is not ours.lm_head.weight
        assert ours.config.tie_word_embeddings is False
    else:
        unmerge(ours)
        assert ours.model.embed_tokens.base_layer.weight is ours.lm_head.weight
        assert ours.config.tie_word_embeddings is True


def test_constraint_never_rewrites_parameters() -> None:
    base = nn.Sequential(nn.Linear(64, 24)).eval()
    theirs = peft_model(base, oft_block_size=16, target_modules=["0"], coft=True, eps=0.01)
    fill(theirs)
    parameter = peft_generators(theirs)["0"]
    before = parameter.detach().clone()
    with torch.no_grad():
        theirs(torch.randn(3, 64))
    assert (parameter - before).abs().amax() > 0.5 * before.abs().amax()  # an evaluation, and the training is gone

    ours = wrap_model(base, target_modules=["0"], block_size=16, constraint=0.01)
    randomize(ours)
    parameter = our_generators(ours)["0"]
    before, version = parameter.detach().clone(), parameter._version
    for mode in (False, True):
        ours.train(mode)(torch.randn(3, 64)).sum().backward()
        with torch.no_grad():
            ours(torch.randn(3, 64))
    merge(ours, unload=False)
    unmerge(ours)
    assert torch.equal(parameter, before)
    assert parameter._version == version
    # and yet the rotation keeps to the constraint: ‖Q_j‖_F ≤ 0.01 / √4
    packed = ours[0].rotation.effective(parameter.detach())
    assert torch.linalg.matrix_norm(reference.skew(packed, 16)).amax() <= 0.005 * (1 + 1e-6)


def test_block_size_per_module() -> None:
    assert not {"block_size_pattern", "rank_pattern"} & set(peft.OFTConfig.__dataclass_fields__)
    base = nn.ModuleDict({"wide": nn.Linear(64, 8), "narrow": nn.Linear(24, 8)})
    model = wrap_model(base, block_size=32, block_size_pattern={"narrow": 8})
    assert {name: tuple(p.shape) for name, p in our_generators(model).items()} == {"wide": (2, 496), "narrow": (3, 28)}


def test_conv1d_of_gpt2() -> None:
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(Conv1D(24, 64)).double()
    with pytest.raises(TypeError, match="not supported"):
        peft_model(base, oft_block_size=16, target_modules=["0"])
    ours = wrap_model(base, block_size=16, target_modules=["0"])
    randomize(ours)
    conv, x = ours[0].base_layer, torch.randn(3, 5, 64, dtype=torch.float64)
    R = reference.cayley_neumann(reference.skew(our_generators(ours)["0"].detach(), 16), 4)
    expected = reference.oft_linear(x, R, conv.weight.T, conv.bias)
    assert relative(ours(x), expected) < 1e-12
    merge(ours)
    assert type(ours[0]) is Conv1D
    assert relative(ours(x), expected) < 1e-12


@pytest.mark.parametrize("tokens", [2, 64], ids=["input-form", "weight-form"])
def test_adapter_names_by_row_are_not_ignored_in_silence(tokens: int) -> None:
    ours, _ = linear_pair()
    with pytest.raises(TypeError, match="adapter_names"):
        ours[0](torch.randn(tokens, 64), adapter_names=["default"] * tokens)
