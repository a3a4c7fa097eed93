"""Files of a checkpoint that bitsandbytes quantized, read as if their weights were stored in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._quant_ops import Weight4bit, dequantize_4bit
from .errors import AdapterError
from .merging import row_slices
from .safetensors_stream import Entry, TensorFile, tensor_pieces

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_PARTS_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)
_PARTS_8BIT = ("SCB", "weight_format")


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

    def read(self, name: str, rows: slice) -> Tensor:
        if name in self._states:
            return self._read_4bit(name, rows)
        if _scales(name) in self._where:
            return self._read_8bit(name, rows)
        return super().read(name, rows)

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        if name in self._states or _scales(name) in self._where:
            parts = row_slices(self.entries[name].shape)
            return (piece for rows in parts for piece in tensor_pieces(self.read(name, rows)))
        return super().pieces(name)

    def _read_4bit(self, name: str, rows: slice) -> Tensor:
        state, shape = self._states[name], self.entries[name].shape
        size, size2 = state["blocksize"], state.get("nested_blocksize", 1)
        start, stop = (row * math.prod(shape[1:]) for row in (rows.start, rows.stop))
        first = start - start % (size * size2)  # where a scale begins, and if scales are quantized, one of theirs
        packed = self.raw(name, first // 2, -(-stop // 2))
        absmax = self._part(name + ".absmax", first // size, -(-stop // size))
        nested = []
        if "nested_blocksize" in state:
            scales = self._part(name + ".nested_absmax", first // (size * size2), -(-stop // (size * size2)))
            nested = [self._part(name + ".nested_quant_map").float(), scales.float()]
            nested.append(torch.tensor(state["nested_offset"]))
        code = self._part(name + ".quant_map").float()
        weight = Weight4bit(packed, absmax, code, nested, [2 * packed.numel()], size, size2)
        return dequantize_4bit(weight, torch.float32)[start - first : stop - first].view(-1, *shape[1:])

    def _read_8bit(self, name: str, rows: slice) -> Tensor:
        layout = name.removesuffix("weight") + "weight_format"
        if layout in self._where and self._where[layout].raw(layout).item() != 0:
            raise AdapterError(f"{name} is stored in a layout of bitsandbytes' own: save the model anew with today's")
        width = self.entries[name].shape[1]
        weight = self.raw(name, rows.start * width, rows.stop * width).view(torch.int8).view(-1, width)
        return weight.float().mul_(self._part(_scales(name), rows.start, rows.stop).float()[:, None] / 127)

    def _part(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One of the tensors that a weight is made of, of one dimension, or its values from ``start`` to ``stop``."""
        if name not in self._where:
            raise AdapterError(f"the checkpoint lacks {name}, without which the weight cannot be dequantized")
        file = self._where[name]
        wide = file.entries[name].dtype == "F32"
        size = 4 if wide else 1
        data = file.raw(name, start * size, None if stop is None else stop * size)
        return data.view(torch.float32) if wide else data


def _scales(name: str) -> str:
    """The scales of an LLM.int8 weight."""
    return name.removesuffix("weight") + "SCB" if name.endswith(".weight") else ""


def _is_part(name: str, where: Mapping[str, TensorFile]) -> bool:
    if any(name.endswith(end) and name.removesuffix(end) in where for end in _PARTS_4BIT):
        return True
    parent, _, leaf = name.rpartition(".")
    return leaf in _PARTS_8BIT and f"{parent}.SCB" in where
