"""Bases, adapters and merges on disk, for the tests of ``python -m oftv2 merge``."""

from __future__ import annotations

import torch
import transformers

import oftv2
import small_models
from conftest import command_fails, perturb
from oftv2 import load_adapter, save_adapter, wrap_model
from oftv2.__main__ import main

IDS = torch.arange(3, 15).view(2, 6)
SMALL = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama_model(**fields):
    def make():
        torch.manual_seed(1)
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, **fields}
        config = transformers.LlamaConfig(**SMALL, **sizes, num_attention_heads=4, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)

    return make


def make_base(make, dtype, folder, **options):
    model = make().to(dtype)
    model.save_pretrained(folder, **options)
    return type(model)


def make_adapter(cls, base, folder, fields):
    model = perturb(wrap_model(cls.from_pretrained(base, dtype="auto"), **fields))
    save_adapter(model, folder, format="oftv2")


def merged_in_memory(cls, base, adapter):
    return oftv2.merge(load_adapter(cls.from_pretrained(base, dtype="auto"), adapter))


def answer(model):
    return small_models.answer(model.eval(), IDS)


def run(*arguments):
    return main(["merge", *map(str, arguments)])


def fails(capsys, *arguments):
    """The error of a merge that fails."""
    return command_fails(capsys, "merge", *arguments)


def assert_same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def base_and_adapter(folder):
    """Makes a sharded base and an adapter on it in a folder that has room for more."""
    cls = make_base(llama_model(), torch.float32, folder / "base", max_shard_size="100KB")
    make_adapter(cls, folder / "base", folder / "adapter", {"block_size": 16})
    return folder
