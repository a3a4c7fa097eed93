"""A wrapped model is the same object, and behaves like it."""

from __future__ import annotations

import torch
from torch import nn

from conftest import adapted_paths, block_sizes, randomize
from oftv2 import OFTConfig, print_trainable_parameters, unwrap_model, wrap_model


def test_the_wrapped_model_is_the_same_object_and_behaves_like_it(tiny_llama):
    model = tiny_llama()
    ids = torch.arange(3, 9)[None]
    kind, config, body = type(model), model.config, model.model
    plain, generated = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    model.note = "mine"
    assert wrap_model(model, block_size=8) is model
    assert isinstance(model, kind)
    assert model.config is config
    assert model.model is body
    assert model.note == "mine"
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.get_input_embeddings() is body.embed_tokens
    assert not model.training
    assert not any(module.training for module in model.modules())
    layer = body.layers[0].self_attn.q_proj
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (64, 64, (64, 64))
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    randomize(model, std=0.2)
    assert not torch.allclose(model(ids).logits, plain)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == generated.shape


def test_fields_go_on_top_of_a_config(tiny_llama):
    config = OFTConfig(block_size=8, target_modules=("q_proj",))
    model = wrap_model(tiny_llama(), config, block_size=16)
    assert set(block_sizes(model).values()) == {16}
    assert adapted_paths(model) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert config.block_size == 8


def test_wrapping_prints_nothing(tiny_llama, capfd, recwarn):
    unwrap_model(wrap_model(tiny_llama(), block_size=8))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_print_trainable_parameters_uses_the_known_words(tiny_llama, capsys):
    model = wrap_model(tiny_llama(), block_size=8, target_modules=("q_proj",))
    base = sum(p.numel() for name, p in model.named_parameters() if "generators" not in name)
    capsys.readouterr()
    print_trainable_parameters(model)
    trains = 2 * 8 * 28  # layers, blocks, numbers in a block
    total = base + trains
    expected = f"trainable params: {trains:,} || all params: {total:,} || trainable%: {100 * trains / total:.4f}\n"
    assert capsys.readouterr().out == expected


def test_the_class_of_a_wrapped_model_makes_plain_models(tiny_llama, base_folder):
    wrapped = wrap_model(tiny_llama(), block_size=16)
    for model in (type(wrapped)(wrapped.config), type(wrapped).from_pretrained(base_folder)):
        assert type(model) is type(tiny_llama())
        model.train()(torch.zeros(1, 2, dtype=torch.long))


def test_a_model_that_is_wrapped_in_inference_mode_trains_later_on():
    model = nn.Sequential(nn.Linear(16, 4))
    with torch.inference_mode():
        wrap_model(model, block_size=8)
    model(torch.randn(3, 16)).sum().backward()
    assert model[0].generators["default"].grad is not None
