"""Files of a checkpoint that bitsandbytes quantized, read as if their weights were stored in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._quant_ops import Weight4bit, dequantize_4bit, with_plain_scales
from .errors import AdapterError
from .safetensors_stream import Entry, TensorFile, tensor_pieces

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_PARTS_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)
_PARTS_8BIT = ("SCB", "weight_format")
_STEP = 1 << 20  # weights at a time: a multiple of every block size


class DequantizedFile(TensorFile):
    """A file with its quantized weights in float32, and without what they are made of.

    Args:
        file (TensorFile): the file as it is.
        where (Mapping[str, TensorFile]): the file of every tensor of the checkpoint.

    Raises:
        AdapterError: a weight whose parts are missing, or in another layout.
    """

    def __init__(self, file: TensorFile, where: Mapping[str, TensorFile]) -> None:
        super().__init__(file.path)
        self._where = where
        self._states: dict[str, dict[str, Any]] = {}
        stored = self.entries
        self.entries = {}
        for name, entry in stored.items():
            state = next((name + end for end in _STATES if name + end in where), None)
            if state is not None:
                self._states[name] = json.loads(bytes(where[state].raw(state).tolist()))
                self.entries[name] = Entry.of(torch.float32, tuple(self._states[name]["shape"]))
            elif _scales(name) in where:
                self.entries[name] = Entry.of(torch.float32, entry.shape)
            elif not _is_part(name, where):
                self.entries[name] = entry

    def read(self, name: str) -> Tensor:
        if name in self._states:
            return self._read_4bit(name, self._states[name])
        if _scales(name) in self._where:
            return self._read_8bit(name)
        return super().read(name)

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        if name in self._states or _scales(name) in self._where:
            return tensor_pieces(self.read(name))
        return super().pieces(name)

    def _read_4bit(self, name: str, state: dict[str, Any]) -> Tensor:
        packed, absmax, code = self.raw(name), self._part(name + ".absmax"), self._part(name + ".quant_map").float()
        nested, blocksize2 = [], 0
        if "nested_blocksize" in state:
            nested = [self._part(f"{name}.nested_{part}").float() for part in ("quant_map", "absmax")]
            nested.append(torch.tensor(state["nested_offset"]))
            blocksize2 = state["nested_blocksize"]
        size = state["blocksize"]
        whole = with_plain_scales(Weight4bit(packed, absmax, code, nested, state["shape"], size, blocksize2))
        out = torch.empty(self.entries[name].shape)
        for start in range(0, out.numel(), _STEP):
            part = out.view(-1)[start : start + _STEP]
            scales = whole.absmax[start // size :]
            piece = whole._replace(packed=packed[start // 2 :][: _STEP // 2], absmax=scales, shape=[part.numel()])
            part.copy_(dequantize_4bit(piece, torch.float32))
        return out

    def _read_8bit(self, name: str) -> Tensor:
        layout = name.removesuffix("weight") + "weight_format"
        if layout in self._where and self._where[layout].raw(layout).item() != 0:
            raise AdapterError(f"{name} is stored in a layout of bitsandbytes' own: save the model anew with today's")
        weight = self.raw(name).view(torch.int8).view(self.entries[name].shape)
        return weight.float().mul_(self._part(_scales(name)).float()[:, None] / 127)

    def _part(self, name: str) -> Tensor:
        if name not in self._where:
            raise AdapterError(f"the checkpoint lacks {name}, without which the weight cannot be dequantized")
        file = self._where[name]
        data = file.raw(name)
        return data.view(torch.float32) if data.numel() and file.entries[name].dtype == "F32" else data


def _scales(name: str) -> str:
    """The scales of an LLM.int8 weight."""
    return name.removesuffix("weight") + "SCB" if name.endswith(".weight") else ""


def _is_part(name: str, where: Mapping[str, TensorFile]) -> bool:
    if any(name.endswith(end) and name.removesuffix(end) in where for end in _PARTS_4BIT):
        return True
    parent, _, leaf = name.rpartition(".")
    return leaf in _PARTS_8BIT and f"{parent}.SCB" in where
