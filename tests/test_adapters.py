"""Named adapters in one model: added, activated alone and in sequence, trained in turn, copied."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import oftv2
from conftest import assert_close, build, snapshot
from named_adapters import FIELDS, FIRST, HEAD, alone, output, randomize, three, trainable
from oftv2 import AdapterError, ConfigError, OFTConfig
from oftv2.base import OFTLayer
from small_models import VECTORS, linear

# ---------------------------------------------------------------------------------------------- adding and activating


def test_each_adapter_computes_what_it_computes_alone():
    model = three()
    assert oftv2.adapter_names(model) == ["a", "b", "c"]
    for name in ("a", "b", "c", "a", "c", "b"):
        assert oftv2.set_adapter(model, name) is model
        assert oftv2.active_adapters(model) == [name]
        assert torch.equal(output(model), output(alone(name)))
        assert trainable(model) == trainable(alone(name))
        with oftv2.disable_adapter(model):
            assert torch.equal(output(model), output(build(linear)))
        assert torch.equal(output(model), output(alone(name)))
    assert isinstance(model[0], OFTLayer)
    assert set(model[4].rotations) == {"b"}


def test_an_added_adapter_is_not_active_and_does_not_train():
    model = alone("a")
    before, trains = output(model), trainable(model)
    oftv2.add_adapter(model, "b", OFTConfig(block_size=8, **HEAD, target_modules=["0"]), block_size=2)
    assert oftv2.active_adapters(model) == ["a"]
    assert model[0].rotations["b"].block_size == 2
    assert torch.equal(output(model), before)
    assert trainable(model) == trains
    oftv2.set_adapter(model, "b")
    assert torch.equal(output(model), output(build(linear)))  # it is fresh


def test_a_sequence_goes_through_the_adapters_in_order():
    model = three()
    for names in (["a", "b"], ["b", "a"], ("a", "c"), ["c", "a"]):
        oftv2.set_adapter(model, names)
        assert oftv2.active_adapters(model) == list(names)
        x = VECTORS
        for place, module in enumerate(model):
            if isinstance(module, OFTLayer):
                for name in names:
                    if name in module.rotations:
                        x = oftv2.functional.rotate(x, module.rotations[name].delta(module.generators[name]))
                module = module.base_layer
            x = module(x)
            assert not isinstance(model[place], OFTLayer) or set(model[place].sequence) <= set(names)
        torch.testing.assert_close(output(model), x.detach(), rtol=1e-5, atol=1e-6)


def test_what_trains():
    model = three()
    oftv2.set_adapter(model, ["a", "b"])
    assert trainable(model) == trainable(alone("a")) | trainable(alone("b"))
    oftv2.set_adapter(model, ["a", "b"], trainable=False)
    assert trainable(model) == set()
    oftv2.set_adapter(model, "c")
    assert trainable(model) == trainable(alone("c"))


def test_training_in_turn_is_training_apart():
    model, singles = three(), {name: alone(name) for name in "abc"}
    optimizers = {}
    for step in range(6):
        name = "abc"[step % 3]
        oftv2.set_adapter(model.train(), name)
        for part in (model, singles[name].train()):
            if id(part) + step % 3 not in optimizers:
                own = [parameter for parameter in part.parameters() if parameter.requires_grad]
                optimizers[id(part) + step % 3] = torch.optim.AdamW(own, lr=0.02)
            optimizer = optimizers[id(part) + step % 3]
            optimizer.zero_grad()
            part(VECTORS).square().sum().backward()
            optimizer.step()
    for name, single in singles.items():
        oftv2.set_adapter(model, name)
        torch.testing.assert_close(output(model), output(single), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(output(single), output(alone(name)), atol=1e-2)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save", "state_dict"],
    ids=["deepcopy", "pickle", "torch.save", "state_dict"],
)
def test_copies_keep_every_adapter(duplicate):
    model = three()
    oftv2.set_adapter(model, "b")
    if duplicate == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    elif duplicate == "state_dict":
        other = oftv2.wrap_model(build(linear), adapter_name="a", **FIRST)
        for name in "bc":
            oftv2.add_adapter(other, name, **FIELDS[name])
        oftv2.set_adapter(other, "b")
        assert any("_oftv2.c." in key for key in model.state_dict())
        other.load_state_dict(model.state_dict())
    else:
        other = duplicate(model)
    randomize(model, "b")
    randomize(model, "c")
    for name in "abc":
        oftv2.set_adapter(other, name)
        assert torch.equal(output(other), output(alone(name)))


def test_state_dictionaries_that_do_not_fit():
    model = three()
    key = "_oftv2.c.4.weight"
    state = model.state_dict()
    for wrong, message in (
        ({k: v for k, v in state.items() if k != key}, f"Missing key.*{key}"),
        ({**state, key: torch.zeros(2, 2)}, f"{key}: shape"),
        ({**state, "_oftv2.d.4.weight": torch.zeros(2)}, "Unexpected key.*_oftv2.d.4.weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(wrong)
    model.load_state_dict({k: v for k, v in state.items() if k != key}, strict=False)
    oftv2.unwrap_model(model)
    assert model.state_dict().keys() == build(linear).state_dict().keys()
    model.load_state_dict(build(linear).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_set_aside_follows_the_model_to_another_dtype(dtype):
    model = three().to(dtype)
    for name in "cabc":
        oftv2.set_adapter(model, name)
        assert {p.dtype for path, p in model.named_parameters() if "generators" not in path} == {dtype}
        assert_close(name, model.eval()(VECTORS.to(dtype)).detach(), output(alone(name)), 3e-2)


def test_tied_weights_are_exchanged_in_both_places():
    def tied():
        model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False))
        model[2].weight = model[0].weight
        return model

    model = oftv2.wrap_model(build(tied), block_size=4, target_modules=["1"], modules_to_save=["0"])
    oftv2.add_adapter(model, "b", block_size=4, target_modules=["1"], modules_to_save=["2"])
    base = model[0].weight.detach().clone()
    randomize(model, "default", 1)
    randomize(model, "b", 2)
    assert model[0].weight is model[2].weight
    first = model[0].weight.detach().clone()
    with pytest.raises(AdapterError, match=r"'default' and 'b' both train 2\.weight in full"):
        oftv2.set_adapter(model, ["default", "b"])
    oftv2.set_adapter(model, "b")
    assert model[0].weight is model[2].weight
    assert not torch.equal(model[0].weight, base)
    assert not torch.equal(model[0].weight, first)
    oftv2.set_adapter(model, "default")
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, first)
    oftv2.unwrap_model(model)
    assert torch.equal(model[0].weight, base)


# ---------------------------------------------------------------------------------------------- refused


REFUSED = {
    "wrapped already": (lambda m: oftv2.wrap_model(m), "wrapped already .*'a', 'b', 'c'.*add_adapter"),
    "a taken name": (lambda m: oftv2.add_adapter(m, "b"), "an adapter 'b' in this model already"),
    "a name with a dot": (lambda m: oftv2.add_adapter(m, "x.y"), "without dots"),
    "no name": (lambda m: oftv2.add_adapter(m, ""), "'' is not allowed"),
    "a number": (lambda m: oftv2.add_adapter(m, 3), "3 is not allowed"),
    "a name of torch's": (lambda m: oftv2.add_adapter(m, "train"), "'train' is not allowed: torch uses this name"),
    "no such target": (lambda m: oftv2.add_adapter(m, "d", target_modules=["9"]), "'9' is not the name of any module"),
    "a size": (lambda m: oftv2.add_adapter(m, "d", block_size=5), "block_size=5 does not divide its 32"),
    "a field": (lambda m: oftv2.add_adapter(m, "d", block_size=8, oft_block_size=8), "both"),
    "a config": (
        lambda m: oftv2.add_adapter(m, "d", {"block_size": 8}),
        r"an oftv2.OFTConfig.*block_size=32\)",
    ),
    "a typo": (lambda m: oftv2.add_adapter(m, "d", blocksize=8), "no field 'blocksize'; did you mean 'block_size'"),
    "an option of LoRA's": (lambda m: oftv2.add_adapter(m, "d", lora_alpha=32), "no field 'lora_alpha'.*It has block_"),
    "unknown": (lambda m: oftv2.set_adapter(m, "d"), "no adapter 'd' in this model; it has 'a', 'b', 'c'"),
    "two unknown": (lambda m: oftv2.set_adapter(m, ["a", "d", "e"]), "no adapter 'd', 'e' in this model"),
    "none": (lambda m: oftv2.set_adapter(m, []), "disable_adapter"),
    "twice": (lambda m: oftv2.set_adapter(m, ["a", "b", "a"]), "'a' is named twice"),
    "one parameter": (lambda m: oftv2.set_adapter(m, ["b", "c"]), r"'b' and 'c' both train 4\.bias in full"),
    "delete unknown": (lambda m: oftv2.delete_adapter(m, "d"), "no adapter 'd'"),
    "delete active": (lambda m: oftv2.delete_adapter(m, "a"), r"'a' is active: call set_adapter"),
    "disabled": (lambda m: within_disabled(m, lambda: oftv2.set_adapter(m, "b")), "leave disable_adapter"),
    "merge disabled": (lambda m: within_disabled(m, lambda: oftv2.merge(m)), "leave disable_adapter"),
    "save disabled": (lambda m: within_disabled(m, lambda: oftv2.save_adapter(m, "x")), "leave disable_adapter"),
}


def within_disabled(model, call):
    with oftv2.disable_adapter(model):
        call()


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_left_as_it_was(call, message):
    model = three()
    before = snapshot(model)
    with pytest.raises((AdapterError, ConfigError), match=message):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "call",
    [oftv2.active_adapters, oftv2.adapter_names]
    + [lambda m, f=f: f(m, "a") for f in (oftv2.set_adapter, oftv2.add_adapter, oftv2.delete_adapter)],
)
def test_a_plain_model_is_refused(call):
    with pytest.raises(AdapterError, match="has no oftv2 adapter: call wrap_model or load_adapter first"):
        call(linear())


@pytest.mark.parametrize("outside", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_what_holds_the_model_is_refused_and_says_where_the_model_is(outside, tmp_path):
    holder = outside(linear())
    before = snapshot(holder)
    with pytest.raises(AdapterError, match=r"put the adapter on it first.*inside is model\.(module|_orig_mod)"):
        oftv2.wrap_model(holder, block_size=8)
    assert snapshot(holder) == before
    with pytest.raises(AdapterError, match=r"pass the model inside it here: model\.(module|_orig_mod)"):
        oftv2.save_adapter(outside(three()), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_arguments_that_changed_places(tmp_path):
    for call in (oftv2.save_adapter, oftv2.load_adapter):
        with pytest.raises(AdapterError, match=r"first argument is the model, .* and this is a str"):
            call(str(tmp_path), linear())
