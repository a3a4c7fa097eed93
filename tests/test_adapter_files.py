"""Files of adapters that share a model: loaded beside others, saved by name, swapped in place, resumed."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

import oftv2
from conftest import build, snapshot
from named_adapters import HEAD, alone, output, randomize, three, trainable
from oftv2 import AdapterError
from oftv2.state import adapter_parameters
from small_models import VECTORS, linear
from trainer_runs import ROWS, arguments


@pytest.fixture
def folders(tmp_path):
    """The three adapters of ``three()``, each saved from a model of its own."""
    return {name: oftv2.save_adapter(alone(name), tmp_path / name, format="oftv2") for name in "abc"}


def test_loading_beside_others(folders):
    model = oftv2.load_adapter(build(linear), folders["a"], adapter_name="a")
    before = output(model)
    for name in "bc":
        assert oftv2.load_adapter(model, folders[name], adapter_name=name) is model
        assert oftv2.active_adapters(model) == ["a"]
        assert torch.equal(output(model), before)
    assert trainable(model) == set()
    for names in ("b", "c", "a", ["a", "b"], ["c", "a"]):
        oftv2.set_adapter(model, names, trainable=False)
        assert torch.equal(output(model), output(oftv2.set_adapter(three(), names)))
    assert trainable(model) == set()
    oftv2.unwrap_model(model)
    assert torch.equal(output(model), output(build(linear)))


def test_every_adapter_is_saved_by_its_name_whatever_is_active(folders, tmp_path):
    model = three()
    for active in ("a", "c", ["b", "a"]):
        oftv2.set_adapter(model, active)
        for name in "abc":
            again = oftv2.save_adapter(model, tmp_path / "again", adapter_name=name, format="oftv2")
            wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (folders[name], again))
            assert wanted.keys() == found.keys()
            assert all(torch.equal(value, found[key]) for key, value in wanted.items())
            assert torch.equal(output(oftv2.load_adapter(build(linear), again)), output(alone(name)))
    with pytest.raises(AdapterError, match=r"'b', 'a' are active together.*give its name"):
        oftv2.save_adapter(model, tmp_path / "none")
    with pytest.raises(AdapterError, match="no adapter 'd' in this model; it has 'a', 'b', 'c'"):
        oftv2.save_adapter(model, tmp_path / "none", adapter_name="d")
    assert not (tmp_path / "none").exists()


def test_loading_over_one_of_several(folders):
    model = three()
    for name in "abc":
        randomize(model, name, 9)
    oftv2.load_adapter(model, folders["c"], adapter_name="c")  # inactive
    oftv2.load_adapter(model, folders["a"], adapter_name="a")  # active
    assert trainable(model) == trainable(alone("a"))
    assert torch.equal(output(model), output(alone("a")))
    assert torch.equal(output(oftv2.set_adapter(model, "c")), output(alone("c")))
    before = snapshot(model)
    with pytest.raises(AdapterError, match="adapted in this model, not in the file"):
        oftv2.load_adapter(model, folders["a"], adapter_name="b")
    with pytest.raises(AdapterError, match=r"has no adapter 'default'.*one of 'a', 'b', 'c'"):
        oftv2.load_adapter(model, folders["a"])
    with pytest.raises(AdapterError, match="trainable=True, and only active adapters train"):
        oftv2.load_adapter(model, folders["a"], adapter_name="a", trainable=True)
    assert snapshot(model) == before


class TestHotswap:
    def fill(self, name, seed):
        """Another adapter of the same kind as ``name``."""
        return randomize(alone(name), name, seed)

    @pytest.mark.parametrize("name", "abc")
    @pytest.mark.parametrize("active", "abc")
    def test_values_change_in_place(self, name, active, tmp_path):
        other = self.fill(name, 7)
        oftv2.save_adapter(other, tmp_path, format="oftv2")
        model = oftv2.set_adapter(three(), active)
        output(model)  # fills the caches
        parameters = adapter_parameters(model, name)
        places = [parameter.data_ptr() for parameter in parameters]
        assert oftv2.hotswap_adapter(model, tmp_path, adapter_name=name) is model
        assert all(x is y for x, y in zip(adapter_parameters(model, name), parameters, strict=True))
        assert [parameter.data_ptr() for parameter in parameters] == places
        assert oftv2.active_adapters(model) == [active]
        assert torch.equal(output(model), output(other if active == name else alone(active)))
        assert torch.equal(output(oftv2.set_adapter(model, name)), output(other))

    def test_what_the_new_adapter_lacks_is_the_identity(self, tmp_path):
        less = oftv2.wrap_model(build(linear), block_size=2, neumann_terms=2, target_modules=["0"])
        oftv2.save_adapter(randomize(less, "default"), tmp_path)
        model = oftv2.wrap_model(build(linear), block_size=2, neumann_terms=2, target_modules=["0", "2"], **HEAD)
        randomize(model, "default", 5)
        oftv2.hotswap_adapter(model, tmp_path)
        assert torch.equal(output(model), output(less))
        assert not model[2].generators["default"].any()

    def test_a_kept_rotation_is_rewritten_where_it_is(self, tmp_path):
        """A captured CUDA graph reads Δ in the memory where it was when the graph was captured."""
        fields = {"block_size": 8, "block_share": True}
        model, other = (randomize(oftv2.wrap_model(build(linear), **fields), "default", seed) for seed in (1, 2))
        oftv2.save_adapter(other, tmp_path)
        output(model)
        with torch.no_grad():
            kept = [layer.delta(dtype) for layer in (model[0], model[2]) for dtype in (None, torch.bfloat16)]
            oftv2.hotswap_adapter(model, tmp_path)
            wanted = [layer.delta(dtype) for layer in (other[0], other[2]) for dtype in (None, torch.bfloat16)]
            assert all(torch.equal(here, there) for here, there in zip(kept, wanted, strict=True))
            again = [layer.delta(dtype) for layer in (model[0], model[2]) for dtype in (None, torch.bfloat16)]
            assert all(here is there for here, there in zip(kept, again, strict=True))

    def test_a_compiled_model_is_not_compiled_again(self, tmp_path):
        oftv2.save_adapter(self.fill("a", 7), tmp_path)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model = three()
        oftv2.set_adapter(model, ["a", "b"], trainable=False)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad():
            torch.testing.assert_close(compiled(VECTORS), output(model))
            before = output(model)
            frames = counter.frame_count
            oftv2.hotswap_adapter(model, tmp_path, adapter_name="a")
            torch.testing.assert_close(compiled(VECTORS), output(model))
        assert not torch.allclose(output(model), before, atol=1e-3)
        assert counter.frame_count == frames == 1

    def test_everything_that_does_not_fit_is_listed(self, folders):
        model = three()
        before = snapshot(model)
        with pytest.raises(AdapterError) as caught:
            oftv2.hotswap_adapter(model, folders["c"], adapter_name="b")
        for message in (
            "0: in the file, not adapted in this model",
            "parameters trained in full differ between the file and this model: 4.weight",
        ):
            assert message in str(caught.value)
        with pytest.raises(AdapterError) as caught:
            oftv2.hotswap_adapter(model, folders["b"], adapter_name="a")
        for message in ("4: in the file", "2: block_size is 4 in the file, 8 here", "2: parametrization is 'cayley'"):
            assert message in str(caught.value)
        with pytest.raises(AdapterError, match="no adapter 'd'"):
            oftv2.hotswap_adapter(model, folders["b"], adapter_name="d")
        assert snapshot(model) == before
        oftv2.merge(model, unload=False)
        with pytest.raises(AdapterError, match="is merged"):
            oftv2.hotswap_adapter(model, folders["a"], adapter_name="a")


# ---------------------------------------------------------------------------------------------- PEFT


def test_peft_computes_the_same_sequences(tmp_path):
    """PEFT goes through adapters in the order in which they were activated, too."""
    fields = {
        "a": {"block_size": 8, "target_modules": ["0", "2"]},
        "b": {"block_size": 4, "target_modules": ["2", "4"]},
    }
    model = oftv2.wrap_model(build(linear), adapter_name="a", **fields["a"])
    oftv2.add_adapter(model, "b", **fields["b"])
    for seed, name in enumerate("ab"):
        randomize(model, name, seed)
        oftv2.save_adapter(model, tmp_path / name, adapter_name=name, format="peft")
    theirs = peft.PeftModel.from_pretrained(build(linear), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    both = []
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        theirs.base_model.set_adapter(names)
        both.append(output(oftv2.set_adapter(model, names)))
        torch.testing.assert_close(both[-1], output(theirs), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[2], both[3], atol=1e-3)


def test_peft_adapters_are_loaded_beside_others(tmp_path):
    config = peft.OFTConfig(oft_block_size=4, target_modules=["2"], modules_to_save=["4"], use_cayley_neumann=False)
    theirs = peft.get_peft_model(build(linear), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = three()
    oftv2.set_adapter(model, "c")  # which trained the same head
    oftv2.load_adapter(model, tmp_path, adapter_name="theirs")
    torch.testing.assert_close(output(oftv2.set_adapter(model, "theirs")), output(theirs), rtol=1e-5, atol=1e-6)
    assert torch.equal(output(oftv2.set_adapter(model, "c")), output(alone("c")))


# ---------------------------------------------------------------------------------------------- transformers


def several(make):
    """A tiny Llama with three adapters, two of which train its head in full; the second is active."""
    model = oftv2.wrap_model(make(), adapter_name="one", block_size=16, target_modules=["q_proj"])
    oftv2.add_adapter(model, "two", block_size=16, target_modules=["v_proj"], modules_to_save=["lm_head"])
    oftv2.add_adapter(model, "three", block_size=8, target_modules=["lm_head"], modules_to_save=["norm"])
    oftv2.set_adapter(model, "two")
    return model


def test_trainer_checkpoints_restore_every_adapter(tiny_llama, tmp_path):
    straight = several(tiny_llama)
    for seed, name in enumerate(("one", "three")):
        randomize(straight, name, seed)
    Trainer(straight, arguments(tmp_path / "straight"), train_dataset=ROWS).train()
    resumed = several(tiny_llama)
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    Trainer(resumed, arguments(tmp_path / "resumed"), train_dataset=ROWS).train(resume_from_checkpoint=str(checkpoint))
    wanted, found = straight.state_dict(), resumed.state_dict()
    assert "_oftv2.three.model.norm.weight" in wanted
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_save_pretrained_has_peft_s_layout(tiny_llama, tmp_path):
    model = several(tiny_llama)
    for seed, name in enumerate(oftv2.adapter_names(model)):
        randomize(model, name, seed)
    ids = ROWS[0]["input_ids"][None]
    model.set_adapter(["two", "one"])
    assert model.active_adapters() == ["two", "one"]
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"one", "three"}
    again = oftv2.load_adapter(tiny_llama(), tmp_path, adapter_name="two")
    for name in ("one", "three"):
        oftv2.load_adapter(again, tmp_path / name, adapter_name=name)
    for names in ("one", "two", "three", ["two", "one"], ["one", "three"]):
        logits = [oftv2.set_adapter(m, names).eval()(ids).logits for m in (model, again)]
        assert torch.equal(*logits)
    model.set_adapter("one")
    model.delete_adapter("two")
    assert oftv2.adapter_names(model) == ["one", "three"]
    assert torch.equal(model(ids).logits, oftv2.set_adapter(again, "one")(ids).logits)


def test_an_adapted_output_head_is_watched_as_it_comes_and_goes(tiny_llama):
    model = several(tiny_llama)
    ids = ROWS[0]["input_ids"][None]

    def past_the_head():
        hidden = model.model(ids)[0]
        return hidden @ model.lm_head.weight.T

    model.forward = lambda *args, **kwargs: past_the_head()
    model.train()
    model(ids)  # two is active, and trains no rotation of the head
    oftv2.set_adapter(model, "three")
    with pytest.raises(AdapterError, match="lm_head: this training step reads the output head's weight itself"):
        model(ids)
    oftv2.set_adapter(model, "one")
    oftv2.delete_adapter(model, "three")
    assert type(model.lm_head) is nn.Linear
    assert not model.lm_head._forward_pre_hooks
    model(ids)


def test_grouped_projections_with_several(tiny_llama):
    models = []
    for grouped in (False, True):
        model = oftv2.wrap_model(tiny_llama(), adapter_name="a", block_size=16, group_projections=grouped)
        oftv2.add_adapter(model, "b", block_size=8, target_modules=["gate_proj", "up_proj"])
        oftv2.add_adapter(model, "c", block_size=8, target_modules=["up_proj"])
        for seed, name in enumerate("abc"):
            randomize(model, name, seed)
        models.append(model)
    ids = ROWS[0]["input_ids"][None]
    for names in ("a", "b", "c", ["a", "b"], ["a", "c"], ["c", "b", "a"]):
        logits = [oftv2.set_adapter(model, names).train()(ids).logits for model in models]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_the_reference_of_preference_training_keeps_the_sequence(tiny_llama):
    model = several(tiny_llama)
    for seed, name in enumerate(oftv2.adapter_names(model)):
        randomize(model, name, seed)
    oftv2.set_adapter(model, ["one", "two"])
    ids = ROWS[0]["input_ids"][None]
    wanted = model(ids).logits
    reference = oftv2.reference_model(model)
    randomize(model, "one", 8)
    randomize(model, "two", 9)
    assert not torch.allclose(model(ids).logits, wanted, atol=1e-2)
    assert torch.equal(reference(ids).logits, wanted)
