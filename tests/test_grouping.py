"""Gate and up projections rotated together: the same results, in fewer operators."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import oftv2
from conftest import OperatorCounter, assert_close, randomize


@pytest.fixture
def pair(tiny_llama):
    """Two equal wrapped models, the second with its projections grouped."""
    models = [oftv2.wrap_model(tiny_llama(), block_size=16, group_projections=grouped) for grouped in (False, True)]
    for model in models:
        randomize(model)
    return models


TOKENS = torch.arange(24).view(2, 12)


def gradients(model, **options):
    model.train(options.pop("training", True))
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def test_loss_and_gradients_are_the_same(pair):
    (loss, expected), (grouped_loss, actual) = map(gradients, pair)
    torch.testing.assert_close(grouped_loss, loss)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], 2e-5)


def test_one_operator_serves_both_projections(pair):
    plain, grouped = pair
    counts = []
    for model in pair:
        with OperatorCounter() as counter:
            model.train()(TOKENS)
        counts.append(counter.names)
    assert "rotate_group" not in counts[0]
    assert counts[1].count("rotate_group") == len(grouped.model.layers)
    assert counts[0].count("rotate") - counts[1].count("rotate") == 2 * len(plain.model.layers)
    assert counts[0].count("cayley_neumann") - counts[1].count("cayley_neumann") == len(plain.model.layers)


def test_in_eval_the_rotations_come_from_the_cache(pair):
    plain, grouped = (model.eval() for model in pair)
    with torch.no_grad():
        expected = plain(TOKENS).logits
        torch.testing.assert_close(grouped(TOKENS).logits, expected)
        with OperatorCounter() as counter:
            torch.testing.assert_close(grouped(TOKENS).logits, expected)
    assert "cayley_neumann" not in counter.names
    assert "rotate_group" in counter.names


@pytest.mark.parametrize("config", [{"dropout": 0.5}, {"parametrization": "cayley"}, {"block_share": True}], ids=str)
def test_every_kind_of_rotation(tiny_llama, config):
    models = [oftv2.wrap_model(tiny_llama(), block_size=16, group_projections=g, **config) for g in (False, True)]
    losses = []
    for model in models:
        randomize(model)
        torch.manual_seed(5)
        losses.append(gradients(model)[0])
    torch.testing.assert_close(*losses)


def test_hooks_on_a_projection_are_called(pair):
    _, grouped = pair
    seen = []
    grouped.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with OperatorCounter() as counter:
        grouped(TOKENS)
    assert seen == [(2, 12, 160)]
    assert counter.names.count("rotate_group") == len(grouped.model.layers) - 1


def test_hooks_on_a_projections_gradient_are_called(pair):
    _, grouped = pair
    seen = []
    projection = grouped.model.layers[0].mlp.up_proj
    projection.register_full_backward_pre_hook(lambda module, grads: seen.append(grads[0].shape))
    gradients(grouped)
    assert seen == [(2, 12, 160)]


def test_disabled_merged_and_unwrapped(pair, tiny_llama):
    _, grouped = pair
    base = tiny_llama()(TOKENS).logits
    adapted = grouped.eval()(TOKENS).logits
    with oftv2.disable_adapter(grouped):
        torch.testing.assert_close(grouped(TOKENS).logits, base)
    oftv2.merge(grouped)
    assert type(grouped.model.layers[0].mlp) is type(tiny_llama().model.layers[0].mlp)
    torch.testing.assert_close(grouped(TOKENS).logits, adapted, rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_stay_grouped(pair):
    _, grouped = pair
    expected = grouped.eval()(TOKENS).logits
    for other in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        with OperatorCounter() as counter:
            torch.testing.assert_close(other(TOKENS).logits, expected)
        assert "rotate_group" in counter.names
        assert (
            oftv2.unwrap_model(other).state_dict().keys()
            == oftv2.unwrap_model(copy.deepcopy(grouped)).state_dict().keys()
        )


def test_after_loading(pair, tiny_llama, tmp_path):
    plain, _ = pair
    oftv2.save_adapter(plain, tmp_path)
    loaded = oftv2.load_adapter(tiny_llama(), tmp_path)
    assert oftv2.group_projections(loaded) is loaded
    oftv2.group_projections(loaded)  # again: nothing to do, nothing lost
    torch.testing.assert_close(loaded.eval()(TOKENS).logits, plain.eval()(TOKENS).logits)


def test_a_model_without_such_modules_is_refused_untouched():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(oftv2.AdapterError, match=r"no module of this Sequential computes self\.down_proj"):
        oftv2.wrap_model(model, group_projections=True)
    assert type(model[0]) is torch.nn.Linear
    assert model[0].weight.requires_grad
