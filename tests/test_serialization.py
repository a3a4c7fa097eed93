"""What is saved comes back bit for bit: every kind of layer, setting and dtype, into plain and into wrapped models."""

from __future__ import annotations

import json
import pathlib

import pytest
import safetensors.torch
import torch
from torch import nn

from conftest import block_sizes, build, perturb, randomize, trainable
from oftv2 import AdapterError, OFTConfig, disable_adapter, load_adapter, merge, save_adapter, unwrap_model, wrap_model
from small_models import IDS, VECTORS, answer, embedding, gpt2, linear

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(8))


def conv2d():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3))


CASES = {
    "linear": (linear, VECTORS, {"block_size": 8}),
    "conv1d": (gpt2, IDS, {"block_size": 8}),
    "embedding": (embedding, IDS, {"block_size": 4, "target_modules": ("0", "1")}),
    "conv2d": (conv2d, IMAGES, {"block_size": 4, "target_modules": ("0", "2", "4"), "block_size_pattern": {"2": 16}}),
    "modules-to-save": (linear, VECTORS, {"block_size": 8, "modules_to_save": ("4",)}),
    "tied-head-to-save": (gpt2, IDS, {"block_size": 8, "modules_to_save": ("lm_head",)}),
    "bias-all": (linear, VECTORS, {"block_size": 8, "bias": "all", "target_modules": ("0",)}),
    "bias-oft-only": (gpt2, IDS, {"block_size": 8, "bias": "oft_only", "target_modules": ("c_attn", "mlp.c_proj")}),
    "bias-and-modules": (linear, VECTORS, {"block_size": 8, "bias": "all", "modules_to_save": ("4",)}),
    "block-share": (linear, VECTORS, {"block_size": 8, "block_share": True}),
    "block-size-pattern": (linear, VECTORS, {"block_size": 8, "block_size_pattern": {"0": 16, "2|4": 4}}),
    "adjust-block-size": (linear, VECTORS, {"block_size": 32, "adjust_block_size": True}),
    "num-blocks": (linear, VECTORS, {"num_blocks": 4}),
    "adjusted-num-blocks": (linear, VECTORS, {"num_blocks": 5, "adjust_block_size": True}),
    "cayley": (linear, VECTORS, {"block_size": 8, "parametrization": "cayley"}),
    "other-numbers": (
        linear,
        VECTORS,
        {"block_size": 8, "neumann_terms": 6, "constraint": 0.3, "scale_generators": True, "dropout": 0.2},
    ),
}


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("make", "inputs", "fields"), CASES.values(), ids=CASES.keys())
def test_round_trip_is_bit_exact(make, inputs, fields, tmp_path):
    model = build(make)
    plain = answer(model, inputs)
    trained = perturb(wrap_model(model, **fields))
    wanted = answer(trained, inputs)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    assert save_adapter(trained, tmp_path) == tmp_path

    fresh = build(make)
    loaded = load_adapter(fresh, tmp_path)
    assert loaded is fresh
    assert torch.equal(answer(loaded, inputs), wanted)
    assert block_sizes(loaded) == block_sizes(trained)
    assert trainable(loaded) == set()

    wrapped = wrap_model(build(make), **fields)
    filled = answer(wrapped, inputs)  # fills the cache of rotations, which the load must drop
    torch.testing.assert_close(filled, plain, rtol=1e-6, atol=1e-6)
    load_adapter(wrapped, tmp_path)
    assert torch.equal(answer(wrapped, inputs), wanted)
    assert trainable(wrapped) == trainable(trained)
    for mine, theirs in zip(trained.state_dict().items(), wrapped.state_dict().items(), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize(("make", "inputs", "fields"), CASES.values(), ids=CASES.keys())
def test_a_loaded_adapter_saves_to_the_same_files_and_comes_off_again(make, inputs, fields, tmp_path):
    plain = answer(build(make), inputs)
    save_adapter(perturb(wrap_model(build(make), **fields)), tmp_path / "a")
    loaded = load_adapter(build(make), tmp_path / "a")
    save_adapter(loaded, tmp_path / "b")
    first, second = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "b" / "adapter_model.safetensors"
    with safetensors.safe_open(first, "pt") as one, safetensors.safe_open(second, "pt") as two:
        assert one.metadata() == two.metadata()
        assert sorted(one.keys()) == sorted(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in sorted(one.keys()))
    assert (tmp_path / "a/adapter_config.json").read_bytes() == (tmp_path / "b/adapter_config.json").read_bytes()
    with disable_adapter(loaded):
        assert torch.equal(answer(loaded, inputs), plain)
    assert torch.equal(answer(unwrap_model(loaded), inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ("4",)}], ids=["generators", "and-a-module"])
def test_round_trip_on_bases_of_other_dtypes(dtype, fields, tmp_path):
    trained = perturb(wrap_model(build(linear, dtype), block_size=8, **fields))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for name, p in trained.named_parameters() if "generators" in name} == {wide}
    save_adapter(trained, tmp_path)
    loaded = load_adapter(build(linear, dtype), tmp_path)
    assert torch.equal(answer(loaded, VECTORS.to(dtype)), answer(trained, VECTORS.to(dtype)))


def test_an_adapter_trained_on_fp32_loads_into_a_bf16_base_without_loss(tmp_path):
    trained = wrap_model(build(linear), block_size=8)
    randomize(trained)
    save_adapter(trained, tmp_path)
    loaded = load_adapter(build(linear, torch.bfloat16), tmp_path)
    theirs = dict(loaded.named_parameters())
    for name, parameter in trained.named_parameters():
        if "generators" in name:
            assert theirs[name].dtype == torch.float32
            assert torch.equal(theirs[name], parameter)
    torch.testing.assert_close(
        answer(loaded, VECTORS.bfloat16()).float(), answer(trained, VECTORS), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("flag", [None, True, False])
def test_trainable(wrapped, flag, tmp_path):
    fields = {"block_size": 8, "modules_to_save": ("4",), "bias": "oft_only"}
    trained = perturb(wrap_model(build(linear), **fields))
    save_adapter(trained, tmp_path)
    model = wrap_model(build(linear), **fields) if wrapped else build(linear)
    load_adapter(model, tmp_path, trainable=flag)
    trains = wrapped if flag is None else flag
    assert trainable(model) == (trainable(trained) if trains else set())


def test_training_goes_on_from_where_it_was(tmp_path):
    def step(model):
        model.zero_grad()
        model(VECTORS).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * parameter.grad
        return model

    trained = step(wrap_model(build(linear), block_size=8))
    save_adapter(trained, tmp_path)
    resumed = load_adapter(build(linear), tmp_path, trainable=True)
    assert torch.equal(answer(step(resumed), VECTORS), answer(step(trained), VECTORS))


def test_loading_replaces_an_adapter_that_was_loaded_before(tmp_path):
    for seed in (1, 2):
        model = wrap_model(build(linear), block_size=8)
        randomize(model, seed=seed)
        save_adapter(model, tmp_path / str(seed))
    wanted = answer(model, VECTORS)
    again = load_adapter(build(linear), tmp_path / "1")
    assert not torch.allclose(answer(again, VECTORS), wanted)
    assert torch.equal(answer(load_adapter(again, tmp_path / "2"), VECTORS), wanted)


def test_a_transformers_model_generates_the_same_after_a_round_trip(tiny_llama, tmp_path):
    trained = wrap_model(tiny_llama(), block_size=8)
    randomize(trained, std=0.2)
    save_adapter(trained, tmp_path)
    loaded = load_adapter(tiny_llama(), tmp_path)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=8, do_sample=False),
        trained.generate(ids, max_new_tokens=8, do_sample=False),
    )


# ---------------------------------------------------------------------------------------------- the files


def test_the_files_hold_the_adapter_and_nothing_else(tmp_path):
    model = wrap_model(build(linear), block_size=32, adjust_block_size=True, modules_to_save=("4",))
    folder = save_adapter(perturb(model), str(tmp_path / "new" / "folder"))
    assert isinstance(folder, pathlib.Path)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == files
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "base_model.model.0.oft_R.weight": (1, 32 * 31 // 2),
        "base_model.model.2.oft_R.weight": (1, 24 * 23 // 2),
        "base_model.model.4.weight": (4, 16),
        "base_model.model.4.bias": (4,),
    }
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["oftv2"])
    assert description["block_sizes"] == {"0": 32, "2": 24}  # what adjust_block_size chose
    assert OFTConfig.from_dict(description["config"]) == OFTConfig(adjust_block_size=True, modules_to_save=("4",))


def test_the_json_beside_it_is_not_needed(tmp_path):
    trained = perturb(wrap_model(build(linear), block_size=8))
    save_adapter(trained, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(answer(load_adapter(build(linear), tmp_path), VECTORS), answer(trained, VECTORS))


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint.tmp").write_text("mine too")
    save_adapter(wrap_model(build(linear), block_size=8), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint.tmp").read_text() == "mine too"


def test_an_adapter_has_its_name_in_the_model_and_none_in_the_file(tmp_path):
    trained = perturb(wrap_model(build(linear), block_size=8, adapter_name="french"))
    with pytest.raises(AdapterError, match=r"no adapter 'german' in this model; it has 'french'"):
        save_adapter(trained, tmp_path / "german", adapter_name="german")
    assert not (tmp_path / "german").exists()
    save_adapter(trained, tmp_path, adapter_name="french")
    loaded = load_adapter(build(linear), tmp_path, adapter_name="english")
    assert all("generators.english" in name for name, _ in loaded.named_parameters() if "generators" in name)
    assert torch.equal(answer(loaded, VECTORS), answer(trained, VECTORS))


# ---------------------------------------------------------------------------------------------- what is not saved


def bad_value(value):
    def spoil(model):
        with torch.no_grad():
            model[2].generators["default"][0, 3] = value

    return spoil


def bad_module(model):
    with torch.no_grad():
        model[4].weight[1, 1] = float("nan")


REFUSED = {
    "nan": (bad_value(float("nan")), r"NaN or Inf in .*\b2\.oft_R"),
    "inf": (bad_value(float("inf")), r"NaN or Inf in .*\b2\.oft_R"),
    "nan-in-a-module": (bad_module, r"NaN or Inf in .*\b4\.weight"),
    "merged": (lambda model: merge(model, unload=False), r"merged.*unmerge"),
    "unloaded": (merge, r"no oftv2 adapter.*wrap_model or load_adapter"),
    "unwrapped": (unwrap_model, r"no oftv2 adapter.*wrap_model or load_adapter"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_loaded_is_not_written_over_a_good_adapter(spoil, message, tmp_path):
    model = perturb(wrap_model(build(linear), block_size=8, modules_to_save=("4",)))
    wanted = answer(model, VECTORS)
    save_adapter(model, tmp_path)
    spoil(model)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(AdapterError, match=message):
            save_adapter(model, folder)
    assert not (tmp_path / "new").exists()
    assert torch.equal(answer(load_adapter(build(linear), tmp_path), VECTORS), wanted)
