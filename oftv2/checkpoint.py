"""A model's folder in the layout of transformers, read without the model: configuration, shards, and what is beside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapter_file import CONFIG_FILE
from .checkpoint_quantized import DequantizedFile
from .errors import AdapterError
from .safetensors_stream import Entry, TensorFile

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_CONFIG = "config.json"
_OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.tflite",
)
# What belongs to the old weights or to their training; an adapter there would be put on top of the merged weights.
_LEFT = (
    *_OTHER_WEIGHTS,
    "*.safetensors",
    "*.index.json",
    "adapter_*",
    "trainer_state.json",
    ".*",
    MODEL_CONFIG,
    "README.md",
)
_FOLDERS = ("additional_chat_templates",)
# Never worth downloading.
_UNWANTED = (*_OTHER_WEIGHTS, "consolidated*", "*/*.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder.

    Attributes:
        folder: where it is.
        config: what its ``config.json`` holds.
        files: its weights by file name.
        index: what its index file holds, or None of a single file.
        where: the file of each tensor by the tensor's name.
        dequantized: of a checkpoint that is quantized, the dtype that its weights get.
    """

    folder: Path
    config: dict[str, Any]
    files: dict[str, TensorFile]
    index: dict[str, Any] | None
    where: dict[str, TensorFile]
    dequantized: torch.dtype | None = None

    def entry(self, key: str) -> Entry:
        """The dtype, shape and size of a tensor."""
        return self.where[key].entries[key]

    def side_files(self) -> tuple[list[Path], list[str]]:
        """Files that a merged model keeps as they are, relative to the folder, and the names of those left behind."""
        kept, left = [], []
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and path.name in _FOLDERS:
                kept += [file.relative_to(self.folder) for file in sorted(path.iterdir()) if file.is_file()]
            elif path.is_dir() or any(path.match(pattern) for pattern in _LEFT):
                left.append(path.name + "/" * path.is_dir())
            else:
                kept.append(path.relative_to(self.folder))
        replaced = {*self.files, INDEX_FILE, MODEL_CONFIG}
        return kept, [name for name in left if name not in replaced]


def open_checkpoint(name: str) -> Checkpoint:
    """Opens a model's folder, or that of a model of the Hub, from the cache where it is there.

    Raises:
        AdapterError: no such folder; one without weights in safetensors, with truncated ones, or with weights that are
            quantized by other libraries than bitsandbytes.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name)
    if not (folder / MODEL_CONFIG).is_file():
        hint = (
            ": it is an adapter's folder; BASE comes first, ADAPTER second" if (folder / CONFIG_FILE).is_file() else ""
        )
        raise AdapterError(f"{folder} has no {MODEL_CONFIG}, so it is no model's folder{hint}")
    config = _json(folder / MODEL_CONFIG)
    files, index = _weights(folder)
    where = {key: file for file in files.values() for key in file.entries}
    listed = None if index is None else set(index["weight_map"])
    if listed is not None and listed != set(where):
        odd = sorted(listed ^ set(where))[0]
        raise AdapterError(f"{folder}: {INDEX_FILE} and the files disagree, about {odd} for one")
    quantization = config.pop("quantization_config", None)
    if not quantization:  # null, where weights were dequantized
        return Checkpoint(folder, config, files, index, where)
    method = quantization.get("quant_method", "unknown method")
    if method != "bitsandbytes":
        raise AdapterError(
            f"the weights in {folder} are quantized ({method}). Merge into the 16-bit model they were made from, or in "
            "memory: load the model, then oftv2.load_adapter(model, ADAPTER), "
            "oftv2.merge(model, dtype=torch.bfloat16) and model.save_pretrained(OUT)"
        )
    files = {name: DequantizedFile(file, where) for name, file in files.items()}
    where = {key: file for file in files.values() for key in file.entries}
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return Checkpoint(folder, config, files, index, where, getattr(torch, name))


def _from_hub(name: str) -> Path:
    missing = f"{name} is not a folder, and there is no such model on the Hub or in the cache"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise AdapterError(f"{name} is not a folder; for a model of the Hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, ignore_patterns=list(_UNWANTED)))
    except (OSError, ValueError) as error:  # no network, no such model, no such name
        raise AdapterError(f"{missing}: {error}") from error


def _weights(folder: Path) -> tuple[dict[str, TensorFile], dict[str, Any] | None]:
    if (folder / WEIGHTS_FILE).is_file():  # transformers' order
        return {WEIGHTS_FILE: TensorFile(folder / WEIGHTS_FILE)}, None
    if not (folder / INDEX_FILE).is_file():
        old = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
        convert = (
            f"; {old} is no safetensors file. Convert it once: "
            f'AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto").save_pretrained(NEW_FOLDER)'
        )
        raise AdapterError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{convert if old else ''}")
    index = _json(folder / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise AdapterError(f"{folder / INDEX_FILE} has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise AdapterError(f"{folder} lacks {', '.join(absent[:3])}, of {len(names)} files in {INDEX_FILE}")
    return {name: TensorFile(folder / name) for name in names}, index


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds no JSON object")
    return value
