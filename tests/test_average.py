"""The average of adapters: a rotation again, the closed form where there is one, and independent of where one looks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oftv2
from conftest import build, snapshot
from named_adapters import FIELDS, output, randomize
from oftv2 import AdapterError, averaging, reference
from oftv2.averaging import (
    NoMeanError,
    inverse_cayley,
    karcher_mean,
    log_rotation,
    nearest_rotation,
    rotation_angles,
)
from small_models import linear

WIDE = torch.float64


def rotations(count, blocks, size, std=0.3, seed=0):
    """Random rotations ``(count, blocks, size, size)``, no two of them half a turn apart."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(count * blocks, size * (size - 1) // 2, generator=generator, dtype=WIDE) * std / size**0.5
    return reference.cayley(reference.skew(packed, size)).view(count, blocks, size, size)


def exp(S):
    """The exponential of skew-symmetric matrices; torch's own ``matrix_exp`` errs by 2e-11 at norms of 0.03."""
    angles, vectors = torch.linalg.eigh(1j * S)
    return ((vectors * torch.exp(-1j * angles)[..., None, :]) @ vectors.mH).real


def equal(count):
    return torch.full((count,), 1 / count, dtype=WIDE)


def planar(*degrees):
    """Rotations of the plane, ``(k, 1, 2, 2)``."""
    angles = torch.tensor(degrees, dtype=WIDE).deg2rad()
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([cosines, sines, -sines, cosines], dim=-1).view(-1, 1, 2, 2)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.integers(0, 1000))


@settings(max_examples=50)
@given(SHAPES)
def test_it_is_a_rotation_at_which_the_logarithms_cancel(shape):
    count, blocks, size, seed = shape
    R = rotations(count, blocks, size, seed=seed)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=WIDE) + 0.1
    weights /= weights.sum()
    mean = karcher_mean(R, weights)
    assert torch.linalg.matrix_norm(mean.mT @ mean - torch.eye(size, dtype=WIDE)).max() < 1e-12
    assert (torch.linalg.det(mean) > 0).all()
    assert torch.einsum("k,krij->rij", weights, log_rotation(mean.mT @ R)).abs().max() < 1e-12


@settings(max_examples=20)
@given(SHAPES)
def test_it_does_not_depend_on_the_order_or_on_where_one_looks(shape):
    count, blocks, size, seed = shape
    R, (P, S) = rotations(count, blocks, size, seed=seed), rotations(2, blocks, size, std=3.0, seed=seed + 1)
    weights = torch.linspace(1, 2, count, dtype=WIDE)
    weights /= weights.sum()
    mean = karcher_mean(R, weights)
    torch.testing.assert_close(karcher_mean(R.flip(0), weights.flip(0)), mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(karcher_mean(P @ R @ S, weights), P @ mean @ S, rtol=0, atol=1e-11)
    torch.testing.assert_close(karcher_mean(R.mT, weights), mean.mT, rtol=0, atol=1e-11)
    blocks_alone = torch.cat([karcher_mean(R[:, i : i + 1], weights) for i in range(blocks)])
    torch.testing.assert_close(blocks_alone, mean, rtol=0, atol=1e-11)


@given(st.lists(st.floats(-44, 44), min_size=1, max_size=5), st.integers(0, 100))
def test_closed_form_of_rotations_of_the_plane(degrees, seed):
    weights = torch.rand(len(degrees), generator=torch.Generator().manual_seed(seed), dtype=WIDE) + 0.01
    weights /= weights.sum()
    mean = karcher_mean(planar(*degrees), weights)
    angle = (weights * torch.tensor(degrees, dtype=WIDE)).sum().item()
    torch.testing.assert_close(mean, planar(angle)[0], rtol=0, atol=1e-12)


def test_one_or_one_that_counts_is_itself_and_two_meet_half_way():
    A, B = rotations(2, 3, 6)
    torch.testing.assert_close(karcher_mean(A[None], equal(1)), A, rtol=0, atol=1e-12)
    torch.testing.assert_close(karcher_mean(torch.stack([A, B]), torch.tensor([0.0, 1.0])), B, rtol=0, atol=1e-12)
    half = A @ exp(log_rotation(A.mT @ B) / 2)
    torch.testing.assert_close(karcher_mean(torch.stack([A, B]), equal(2)), half, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 7, 32])
def test_logarithms_and_the_inverse_cayley_transform(size):
    R = rotations(1, 5, size, std=2.0)[0]
    torch.testing.assert_close(exp(log_rotation(R)), R, rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.cayley(inverse_cayley(R)), R, rtol=0, atol=1e-12)
    reflected = R.clone()
    reflected[:, 0] *= -1
    assert (torch.linalg.det(nearest_rotation(reflected)) > 0.999).all()
    torch.testing.assert_close(nearest_rotation(1.7 * R), R, rtol=0, atol=1e-12)
    angles = torch.tensor([30.0, 70.0], dtype=WIDE).deg2rad()
    torch.testing.assert_close(rotation_angles(planar(30, -70)[:, 0]), angles, rtol=1e-3, atol=0)


@pytest.mark.parametrize("degrees", [0.0, 0.01, 1.0, 30.0, 75.0, 79.0, 120.0, 179.0])
def test_logarithms_of_small_and_large_rotations_in_one_batch(degrees):
    """By the series of products, and by eigenvectors where it would be long."""
    generator = torch.Generator().manual_seed(0)
    turn = planar(degrees, -degrees / 2, degrees / 3)[:, 0]
    frame = rotations(1, 1, 6, std=2.0)[0, 0]
    R = torch.stack([frame @ torch.block_diag(*turn) @ frame.mT, *rotations(1, 4, 6, std=0.1)[0]])
    R = R[torch.randperm(5, generator=generator)]
    found = log_rotation(R)
    torch.testing.assert_close(found, -found.mT, rtol=0, atol=1e-15)
    torch.testing.assert_close(exp(found), R, rtol=0, atol=1e-13)
    assert torch.linalg.matrix_norm(found, 2).max() <= math.pi
    torch.testing.assert_close(torch.stack([log_rotation(one) for one in R]), found, rtol=0, atol=1e-14)


def test_the_nearest_rotation_is_that_of_the_singular_value_decomposition():
    R = rotations(1, 4, 8)[0]
    generator = torch.Generator().manual_seed(0)
    for noise in (0.0, 1e-6, 0.03, 0.3, 3.0):
        matrices = R + noise * torch.randn(R.shape, generator=generator, dtype=WIDE)
        left, _, right = torch.linalg.svd(matrices)
        left[..., -1] *= torch.linalg.det(left @ right)[:, None]
        torch.testing.assert_close(nearest_rotation(matrices), left @ right, rtol=0, atol=1e-12)
        torch.testing.assert_close(nearest_rotation(matrices[1]), (left @ right)[1], rtol=0, atol=1e-12)


def test_ordinary_adapters_take_products_and_no_decompositions(monkeypatch):
    """Which take seconds for many blocks, and minutes for large ones."""
    for name in ("_decomposed", "_artanh"):
        monkeypatch.setattr(averaging, name, None)
    packed = 0.02 * torch.randn(3, 4, 32 * 31 // 2, generator=torch.Generator().manual_seed(0), dtype=WIDE)
    R = torch.stack([reference.cayley_neumann(reference.skew(one, 32), 4) for one in packed])
    mean = karcher_mean(nearest_rotation(R), equal(3))
    assert torch.linalg.matrix_norm(mean.mT @ mean - torch.eye(32, dtype=WIDE)).max() < 1e-12


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ((10, 190), "half a turn apart"),
        ((0, 120, 240), "more than a quarter turn from their mean"),
        ((0, 10, 175), "more than a quarter turn"),
    ],
)
def test_where_there_is_no_unique_mean(degrees, message):
    good = planar(*[0] * len(degrees))
    with pytest.raises(NoMeanError, match=f"block 1: .*{message}"):
        karcher_mean(torch.cat([good, planar(*degrees)], dim=1), equal(len(degrees)))


# ---------------------------------------------------------------------------------------------- in a model


def several(**fields):
    """A model with adapters of other sizes, parametrizations and layers."""
    model = oftv2.wrap_model(build(linear), adapter_name="a", block_size=8, **fields)
    oftv2.add_adapter(model, "b", block_size=4, parametrization="cayley", target_modules=["2", "4"], **fields)
    oftv2.add_adapter(model, "c", block_size=12, neumann_terms=2, target_modules=["2"], **fields)
    for seed, name in enumerate("abc"):
        randomize(model, name, seed)
    return model


def dense(layer, name):
    """The nearest rotation to that of an adapter, the identity where the layer lacks it."""
    if name not in layer.rotations:
        return torch.eye(layer.base_layer.in_features, dtype=WIDE)
    delta = layer.rotations[name].delta(layer.generators[name].detach().double())
    return nearest_rotation(torch.block_diag(*delta) + torch.eye(layer.base_layer.in_features, dtype=WIDE))


@pytest.mark.parametrize("names", ["a", ["a", "b"], ["c", "a"], ["b", "c"], ["a", "b", "c"]], ids=str)
def test_it_is_a_new_adapter_of_the_mean_rotations(names, tmp_path):
    model = several()
    before = output(model)
    weights = [1.0, 2.0, 3.0][: len(names)]
    assert oftv2.average_adapters(model, names, weights) is model
    assert torch.equal(output(model), before)
    assert oftv2.active_adapters(model) == ["a"]
    assert oftv2.adapter_names(model) == ["a", "b", "c", "average"]
    for layer in model[::2]:
        present = [name for name in names if name in layer.rotations]
        assert ("average" in layer.rotations) == bool(present)
        if not present:
            continue
        shares = torch.tensor(weights, dtype=WIDE) / sum(weights)
        wanted = karcher_mean(torch.stack([dense(layer, name)[None] for name in names]), shares)[0]
        found = dense(layer, "average")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # its generators are float32
        assert torch.linalg.matrix_norm(found.mT @ found - torch.eye(len(found), dtype=WIDE)) < 1e-12
        assert layer.rotations["average"].block_size == math.lcm(*(layer.rotations[n].block_size for n in present))
    oftv2.set_adapter(model, "average")
    averaged = output(model)
    oftv2.save_adapter(model, tmp_path, format="oftv2")
    torch.testing.assert_close(output(oftv2.load_adapter(build(linear), tmp_path)), averaged)
    model.train()(torch.randn(3, 32)).sum().backward()
    assert all(layer.generators["average"].grad.any() for layer in model[::2] if "average" in layer.rotations)


def test_one_shared_block_stays_one():
    model = oftv2.wrap_model(build(linear), adapter_name="a", block_size=8, block_share=True)
    oftv2.add_adapter(model, "b", block_size=4, block_share=True)
    randomize(randomize(model, "a", 1), "b", 2)
    oftv2.average_adapters(model, ["a", "b"], adapter_name="both")
    assert model[0].generators["both"].shape == (1, 28)
    wanted = karcher_mean(torch.stack([dense(model[0], name)[None] for name in "ab"]), equal(2))[0]
    torch.testing.assert_close(dense(model[0], "both"), wanted, rtol=0, atol=1e-6)


def opposite():
    """In the second block of layer 2, half a turn between the two."""
    model = several()
    for name, angle in (("x", -90.0), ("y", 90.0)):
        oftv2.add_adapter(model, name, block_size=2, target_modules=["2"], parametrization="cayley")
        model[2].generators[name].data[1] = math.tan(math.radians(angle) / 2)
    return model


REFUSED = {
    "unknown": (lambda m: oftv2.average_adapters(m, ["a", "d"]), "no adapter 'd' in this model"),
    "none": (lambda m: oftv2.average_adapters(m, []), "no adapter is named"),
    "twice": (lambda m: oftv2.average_adapters(m, ["a", "a"]), "'a' is named twice"),
    "taken": (
        lambda m: oftv2.average_adapters(m, ["a", "b"], adapter_name="c"),
        "an adapter 'c' in this model already",
    ),
    "few weights": (lambda m: oftv2.average_adapters(m, ["a", "b"], [1.0]), "2 adapters want as many weights"),
    "negative": (lambda m: oftv2.average_adapters(m, ["a", "b"], [1.0, -1.0]), "numbers from 0 up"),
    "nan": (lambda m: oftv2.average_adapters(m, ["a", "b"], [1.0, math.nan]), "numbers from 0 up"),
    "zeros": (lambda m: oftv2.average_adapters(m, ["a", "b"], [0, 0]), "not all of them 0"),
    "half a turn": (
        lambda m: oftv2.average_adapters(m, ["x", "y"]),
        "2: the adapters 'x', 'y' have no average: block 1: two of them are half a turn apart",
    ),
    "nan generators": (
        lambda m: (m[2].generators["b"].data.fill_(math.nan), oftv2.average_adapters(m, ["a", "b"])),
        "2: the generators of 'b' hold NaN",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_left_as_it_was(call, message):
    model = opposite()
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=message):
        call(model)
    assert list(model.state_dict()) == before
    assert oftv2.adapter_names(model) == ["a", "b", "c", "x", "y"]


def test_base_parameters_trained_in_full_are_no_rotations():
    model = oftv2.wrap_model(build(linear), adapter_name="a", **FIELDS["a"])
    oftv2.add_adapter(model, "c", **FIELDS["c"])
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"'c' trained 4\.weight in full, which is no rotation"):
        oftv2.average_adapters(model, ["a", "c"])
    assert snapshot(model) == before
