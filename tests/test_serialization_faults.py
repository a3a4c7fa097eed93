"""Damaged files: one error that lists all that is wrong, and the model stays as it was."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from loading_faults import FILE, KEY, beside, plain, read, refused, saved_adapter, wrapped
from oftv2 import AdapterError, hotswap_adapter, load_adapter, wrap_model


@pytest.fixture
def folder(tmp_path):
    return saved_adapter(tmp_path / "adapter")


def rewrite(folder, change_tensors=lambda tensors: None, change_manifest=lambda manifest: None):
    tensors, metadata = read(folder)
    manifest = json.loads(metadata["oftv2"])
    change_tensors(tensors)
    manifest = change_manifest(manifest) or manifest
    safetensors.torch.save_file(tensors, folder / FILE, {**metadata, "oftv2": json.dumps(manifest)})


BASES = pytest.mark.parametrize("make", [plain(), wrapped(), beside], ids=["plain", "wrapped", "beside"])


# ---------------------------------------------------------------------------------------------- unreadable files


@BASES
def test_missing_folder(make, tmp_path):
    refused(make, tmp_path / "nowhere", str(tmp_path / "nowhere"), "is not a folder", "save_adapter")
    refused(make, "user/adapter", "is not a folder", "huggingface_hub.snapshot_download('user/adapter')")


@BASES
def test_missing_file(make, folder):
    refused(make, folder.parent, f"has no {FILE}", f"there is one in {folder}")  # as of a trainer's checkpoints
    (folder / FILE).unlink()
    refused(make, folder, str(folder), f"has no {FILE}")


@BASES
def test_the_file_in_place_of_its_folder(make, folder):
    options = {"adapter_name": "new"} if make is beside else {}
    wanted = load_adapter(make(), folder, **options).state_dict()
    found = load_adapter(make(), folder / FILE, **options).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@BASES
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, "header - 1", "header", "half", "all - 1"], ids=str)
def test_truncated_file(make, folder, kept):
    data = (folder / FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {"header - 1": header - 1, "header": header, "half": len(data) // 2, "all - 1": len(data) - 1}
    (folder / FILE).write_bytes(data[: lengths.get(kept, kept)])
    refused(make, folder, str(folder / FILE), "cannot be read")


GARBAGE = {
    "text": b"this is no safetensors file at all, it is text",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "pickle": b"\x80\x04\x95" + bytes(200),
    "huge-header": (1 << 60).to_bytes(8, "little") + b"{}",
    "bad-json": (4).to_bytes(8, "little") + b"{{{{",
}


@BASES
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(make, folder, data):
    (folder / FILE).write_bytes(data)
    refused(make, folder, str(folder / FILE), "cannot be read")


@BASES
def test_extra_bytes_at_the_end(make, folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes() + b"more")
    refused(make, folder, str(folder / FILE), "cannot be read")


def set_(key, value):
    return lambda manifest: manifest.update({key: value})


def without(key):
    return lambda manifest: {name: value for name, value in manifest.items() if name != key}


MANIFESTS = {
    **{
        f"no-{key}": without(key)
        for key in ("format_version", "layout", "config", "block_sizes", "trained_parameters", "base")
    },
    "list": lambda manifest: [manifest],
    "text": lambda manifest: "manifest",
    "version-text": set_("format_version", "one"),
    "version-null": set_("format_version", None),
    "config-null": set_("config", None),
    "config-text": set_("config", "all-linear"),
    "config-value": set_("config", {"block_size": 1}),
    "config-unknown-field": set_("config", {"block_size": 8, "rank": 4}),
    "sizes-null": set_("block_sizes", None),
    "sizes-text": set_("block_sizes", "abc"),
    "sizes-list": set_("block_sizes", ["0", "2"]),
    "sizes-of-text": set_("block_sizes", {"0": "8", "2": "8"}),
    "sizes-of-null": set_("block_sizes", {"0": None, "2": None}),
    "sizes-of-fractions": set_("block_sizes", {"0": 8.0, "2": 8.0}),
    "sizes-negative": set_("block_sizes", {"0": -8, "2": -8}),
    "sizes-zero": set_("block_sizes", {"0": 0, "2": 0}),
    "trained-null": set_("trained_parameters", None),
    "trained-text": set_("trained_parameters", "4.weight"),
    "trained-numbers": set_("trained_parameters", [4]),
    "trained-nested": set_("trained_parameters", [["4.weight"], ["4.bias"]]),
    "base-null": set_("base", None),
    "base-list": set_("base", ["Sequential"]),
    "base-empty-sketch": lambda manifest: manifest["base"].update(sketches={"0": {}}),
    "base-text-sketch": lambda manifest: manifest["base"].update(sketches={"0": {"quantized": False, "values": "abc"}}),
    "base-unknown-layer": lambda m: m["base"].update(sketches={"head": {"quantized": False, "values": [1.0]}}),
    "base-sketches-list": lambda manifest: manifest["base"].update(sketches=[1, 2]),
}


@BASES
@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_corrupted_description(make, folder, change):
    rewrite(folder, change_manifest=change)
    refused(make, folder, str(folder))


@BASES
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"oftv2": ""}, {"oftv2": "{"}], ids=str)
def test_a_file_that_this_library_did_not_write(make, folder, metadata):
    tensors, _ = read(folder)
    safetensors.torch.save_file(tensors, folder / FILE, metadata)
    (folder / "adapter_config.json").unlink()  # or it would be read as PEFT's
    refused(make, folder, str(folder / FILE), "does not hold an oftv2 adapter")


@BASES
def test_newer_format_version(make, folder):
    rewrite(folder, change_manifest=lambda m: m.update(format_version=3, config={"from": "the future"}))
    refused(make, folder, "format version 3", "reads up to 2", "update oftv2")


# ---------------------------------------------------------------------------------------------- tensors


def replace(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key])})


def fill(key, value):
    def change(tensors):
        tensors[key].view(-1)[-1] = value

    return change


TENSORS = {
    "missing-generators": (lambda t: t.pop(KEY.format(2)), ["missing tensor " + KEY.format(2)]),
    "missing-module": (lambda t: t.pop("base_model.model.4.bias"), ["missing tensor base_model.model.4.bias"]),
    "unexpected": (lambda t: t.update({KEY.format(9): torch.zeros(1)}), ["unexpected tensor " + KEY.format(9)]),
    "nan": (fill(KEY.format(0), float("nan")), [KEY.format(0) + " holds NaN or Inf"]),
    "inf": (fill("base_model.model.4.weight", float("-inf")), ["base_model.model.4.weight holds NaN or Inf"]),
    "one-block-less": (replace(KEY.format(0), lambda x: x[1:].clone()), ["0: ", "(3, 28)", "(4, 28)"]),
    "other-blocks": (replace(KEY.format(2), lambda x: x[:, :6].clone()), ["2: ", "(3, 6)", "(3, 28)"]),
    "flat": (replace(KEY.format(2), lambda x: x.flatten()), ["2: ", "(84,)", "(3, 28)"]),
    "module-shape": (replace("base_model.model.4.weight", lambda x: x.mT.contiguous()), ["(16, 4)", "(4, 16)"]),
    "integers": (replace(KEY.format(0), lambda x: x.long()), [KEY.format(0) + " is torch.int64"]),
}


@BASES
@pytest.mark.parametrize(("change", "messages"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit(make, folder, change, messages):
    rewrite(folder, change)
    refused(make, folder, str(folder), "nothing was loaded", *messages)


@BASES
def test_several_faults_are_all_listed(make, folder):
    def spoil(tensors):
        for key in ("unexpected", "nan", "module-shape"):
            TENSORS[key][0](tensors)
        fill(KEY.format(0), float("nan"))(tensors)
        replace(KEY.format(2), lambda x: x[1:].clone())(tensors)
        del tensors["base_model.model.4.bias"]

    rewrite(folder, spoil, lambda manifest: manifest["block_sizes"].update({"8": 8}))
    error = refused(
        make,
        folder,
        "missing tensor base_model.model.4.bias",
        "missing tensor " + KEY.format(8),
        "unexpected tensor " + KEY.format(9),
        KEY.format(0) + " holds NaN or Inf",
        "2: generators of shape (2, 28) in the file, (3, 28) needed here",
        "4.weight: shape (16, 4) in the file, (4, 16) here",
        "8: ",
    )
    assert len(error.splitlines()) == 1 + 7


def test_a_long_list_of_faults_is_cut(folder):
    rewrite(folder, lambda tensors: tensors.update({f"more.{i}": torch.zeros(1) for i in range(30)}))
    lines = refused(plain(), folder).splitlines()
    assert len(lines) == 1 + 12 + 1
    assert lines[-1].strip() == "… and 18 more"


# ---------------------------------------------------------------------------------------------- models without weights


def test_nothing_is_loaded_onto_the_meta_device(folder):
    """What is copied there is lost, unless another process sends it: FSDP has rank 0 alone load a model."""
    onto_meta = [lambda: plain()().to("meta"), lambda: wrapped()().to("meta"), lambda: beside().to("meta")]
    for make, options in zip(onto_meta, ({}, {}, {"adapter_name": "new"}), strict=True):
        with pytest.raises(AdapterError, match="is on the meta device, where the adapter's values would be lost"):
            load_adapter(make(), folder, **options)
    with pytest.raises(AdapterError, match="is on the meta device"):
        hotswap_adapter(onto_meta[1](), folder)
    with pytest.raises(AdapterError, match=r"weight is on the meta device, .* has to know the base model's values"):
        wrap_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to("meta"), block_size=4, modules_to_save=["1"])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert all(p.is_meta for p in load_adapter(onto_meta[0](), folder).parameters())
    finally:
        torch.distributed.destroy_process_group()
