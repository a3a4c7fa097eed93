"""Safetensors files some rows of a tensor at a time: reading and writing take the same memory whatever a file's size.

A file is eight bytes with the length of its header, a header in JSON (dtype, shape and place of each tensor), and the
tensors' bytes one after another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import AdapterError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 23
_LONGEST_HEADER = 100_000_000  # what the safetensors library takes


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype by the format's name, its shape, and its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor of a floating-point dtype."""
        return cls(NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)


class TensorFile:
    """A safetensors file that is there; only its header is read until a tensor is asked for.

    Args:
        path (Path): the file.

    Attributes:
        entries (dict[str, Entry]): the tensors by name.
        metadata (dict[str, str]): the file's notes.

    Raises:
        AdapterError: no such file, or a truncated one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length) if length <= _LONGEST_HEADER else b"")
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            places = {name: tuple(value["data_offsets"]) for name, value in header.items()}
            self.entries = {
                name: Entry(value["dtype"], tuple(value["shape"]), places[name][1] - places[name][0])
                for name, value in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{path} cannot be read as a safetensors file, it may be truncated: {error}") from error
        self._places = {name: (8 + length + start, 8 + length + end) for name, (start, end) in places.items()}
        end = max((end for _, end in self._places.values()), default=8 + length)
        if path.stat().st_size != end:
            raise AdapterError(f"{path} has {path.stat().st_size:,} bytes where its header tells of {end:,}: truncated")

    def read(self, name: str, rows: slice) -> Tensor:
        """Some rows of a floating-point tensor, in memory of their own; a scalar is one row."""
        entry = self.entries[name]
        dtype, shape = DTYPES[entry.dtype], (rows.stop - rows.start, *entry.shape[1:])
        size = dtype.itemsize * math.prod(shape[1:])
        return self.raw(name, rows.start * size, rows.stop * size).view(dtype).view(shape)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The bytes of a tensor of any dtype, or those from ``start`` to ``stop``."""
        first, end = self._places[name]
        first, end = first + start, end if stop is None else min(end, first + stop)
        data = torch.empty(end - first, dtype=torch.uint8)  # torch's own memory is aligned, which products depend on
        with open(self.path, "rb") as file:
            file.seek(first)
            if file.readinto(data.numpy().data) != end - first:
                raise AdapterError(f"{self.path} ends in the middle of {name}")
        return data

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of one tensor of any dtype, a few megabytes at a time."""
        start, end = self._places[name]
        left = end - start
        with open(self.path, "rb") as file:
            file.seek(start)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise AdapterError(f"{self.path} ends in the middle of {name}")
                left -= len(piece)
                yield piece


def tensor_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on the CPU, a few megabytes at a time."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


def write_tensors(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    pieces: Callable[[str], Iterable[bytes | memoryview]],
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes a safetensors file, and waits until the disk has it.

    Args:
        path (Path): the file.
        entries (Mapping[str, Entry]): what it is to hold.
        metadata (Mapping[str, str]): its notes.
        pieces (Callable): gives the bytes of a tensor by its name; asked for one after another.
        progress (Callable): told how many bytes were written since the last call.

    Raises:
        RuntimeError: a tensor of another size than its entry says.
    """
    # Wide dtypes first, as the safetensors library does: every tensor then starts at a multiple of its item size.
    names = sorted(entries, key=lambda name: (-entries[name].size // max(1, math.prod(entries[name].shape)), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        entry = entries[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (end, end + entry.size)}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = _write_all(file, pieces(name), progress)
            if written != entries[name].size:
                raise RuntimeError(f"{name}: {written} bytes where {entries[name].size} were announced")
        file.flush()
        os.fsync(file.fileno())


def _write_all(file: BinaryIO, pieces: Iterable[bytes | memoryview], progress: Callable[[int], object]) -> int:
    """On its own, so that nothing of a tensor is held any more while the next one is made."""
    written = 0
    for piece in pieces:
        file.write(piece)
        written += len(piece)
        progress(len(piece))
    return written
