"""Buffers of modules that train in full, such as a head's running statistics: each adapter has its own."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer

import oftv2
from conftest import assert_close
from merged_checkpoints import run
from oftv2 import AdapterError, TargetWarning, load_adapter, save_adapter, set_adapter, wrap_model
from peers import from_peft
from trainer_runs import arguments

FILE = "adapter_model.safetensors"
FIELDS = {"block_size": 8, "modules_to_save": ("1",)}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8))


def passed(model, seed=1):
    """The model after a training pass, which moves the statistics."""
    model.train()(3 + torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)))
    return model


def answer(model):
    with torch.no_grad():
        return model.eval()(torch.randn(4, 32, generator=torch.Generator().manual_seed(2)))


def same(one, other):
    return torch.equal(answer(one), answer(other))


def test_they_are_saved_and_loaded(tmp_path):
    trained = passed(wrap_model(plain(), **FIELDS))
    for layout in ("peft", "oftv2"):
        save_adapter(trained, tmp_path / layout, format=layout)
        loaded = load_adapter(plain(), tmp_path / layout)
        assert same(loaded, trained)
        assert loaded[1].num_batches_tracked == 1
        again = passed(wrap_model(plain(), **FIELDS), seed=3)
        assert not same(again, trained)
        assert same(load_adapter(again, tmp_path / layout), trained)
    assert_close("PEFT", answer(from_peft(plain(), tmp_path / "peft")), answer(trained), 1e-6)


def test_training_goes_on_after_loading(tmp_path):
    save_adapter(passed(wrap_model(plain(), **FIELDS)), tmp_path)
    loaded = load_adapter(plain(), tmp_path, trainable=True)
    assert not any(buffer.requires_grad for buffer in loaded.buffers())
    passed(loaded)
    loaded(torch.randn(16, 32)).square().sum().backward()
    assert loaded[0].generators["default"].grad.any()
    assert loaded[1].weight.grad.any()


def test_those_of_pefts_files_are_loaded(tmp_path):
    theirs = peft.OFTConfig(oft_block_size=8, target_modules=["0"], modules_to_save=["1"])
    theirs = passed(peft.get_peft_model(plain(), theirs))
    theirs.save_pretrained(tmp_path)
    assert_close("y", answer(load_adapter(plain(), tmp_path)), answer(theirs), 1e-6)


def test_another_kind_of_number_is_refused(tmp_path):
    save_adapter(passed(wrap_model(plain(), **FIELDS)), tmp_path)
    model = plain()
    model[1].num_batches_tracked = torch.zeros(())
    with pytest.raises(AdapterError, match=r"1\.num_batches_tracked: torch\.int64 in the file, torch\.float32 here"):
        load_adapter(model, tmp_path)


def test_adapters_have_their_own():
    model = passed(wrap_model(plain(), **FIELDS))
    oftv2.add_adapter(model, "other", block_size=8, modules_to_save=("1",))
    oftv2.add_adapter(model, "third", block_size=8, modules_to_save=())
    first = copy.deepcopy(model)
    assert same(set_adapter(model, "other"), plain())
    other = copy.deepcopy(passed(model, seed=4))
    with oftv2.disable_adapter(model):
        passed(model, seed=5)  # what this moves is not the base model's
        model.eval()
    assert same(model, other)
    with oftv2.disable_adapter(model):
        assert same(model, plain())
    assert same(set_adapter(model, "default"), first)
    passed(set_adapter(model, "third"))
    assert same(set_adapter(model, "other"), other)
    restored = wrap_model(plain(), **FIELDS)
    oftv2.add_adapter(restored, "other", block_size=8, modules_to_save=("1",))
    oftv2.add_adapter(restored, "third", block_size=8, modules_to_save=())
    restored.load_state_dict(set_adapter(model, "default").state_dict())
    assert same(set_adapter(restored, "other"), other)
    assert same(oftv2.merge(copy.deepcopy(model)), first)
    assert same(oftv2.unwrap_model(model), plain())


def test_statistics_that_no_adapter_holds_are_warned_of():
    with pytest.warns(TargetWarning, match=r"of 1 frozen layers \(1, a BatchNorm1d.*modules_to_save=\['1'\]"):
        wrap_model(plain(), block_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap_model(plain(), **FIELDS)
        model = plain()
        model[1] = nn.BatchNorm1d(8, track_running_stats=False)
        wrap_model(model, block_size=8)


def test_training_that_is_turned_on_again_passes_them_over():
    """As after peft's prepare_model_for_kbit_training, which freezes everything."""
    model = wrap_model(segformer(), block_size=8)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False).enable_input_require_grads()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    assert not any(buffer.requires_grad for buffer in model.buffers())


def segformer():
    torch.manual_seed(0)
    lists = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2]}
    heads = {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32}
    return SegformerForSemanticSegmentation(SegformerConfig(num_encoder_blocks=2, num_labels=3, **lists, **heads))


def test_trainers_and_merges_of_files_keep_them(tmp_path):
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    rows = [{"pixel_values": image, "labels": (image[0] > 0).long()} for image in images]
    segformer().save_pretrained(tmp_path / "base")

    def trained(folder, **resumed):
        model = wrap_model(SegformerForSemanticSegmentation.from_pretrained(tmp_path / "base"), block_size=8)
        Trainer(model, arguments(folder), train_dataset=rows).train(**resumed)
        return model.eval()

    straight = trained(tmp_path / "runs")
    norm = straight.decode_head.batch_norm
    assert norm.num_batches_tracked > 3
    resumed = trained(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-3"))
    with torch.no_grad():
        expected = straight(images).logits
        assert torch.equal(resumed(images).logits, expected)
        save_adapter(straight, tmp_path / "adapter")
        assert "base_model.model.decode_head.batch_norm.running_var" in load_file(tmp_path / "adapter" / FILE)
        assert run(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
        merged = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "merged").eval()
        assert_close("merged", merged(images).logits, expected, 1e-5)
        assert torch.equal(merged.decode_head.batch_norm.running_var, norm.running_var)
