"""An adapter merged into a model on disk, some rows of a tensor at a time, so that memory does not grow with the model.

The result is an ordinary model of transformers'. It appears in one step, and a merge that was stopped goes on after the
last complete file.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .adapter_file import CONFIG_FILE, AdapterFile, write_json
from .checkpoint import INDEX_FILE, MODEL_CONFIG, Checkpoint, open_checkpoint
from .checkpoint_plan import Piece, Plan, make_plan
from .errors import AdapterError
from .layers import is_conv1d
from .merging import row_slices, scaled_rows
from .model_card import write_merged_card
from .reading import read_adapter, tensors_file
from .safetensors_stream import DTYPES, tensor_pieces, write_tensors
from .work_folder import WorkFolder

_SPARE = 1 << 24  # bytes for what is beside the weights


def merge_checkpoint(
    base: str,
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    as_trained: bool = False,
    force: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Merges an adapter into the safetensors of a model's folder, without loading the model.

    Args:
        base (str): a folder of transformers' layout, or a model's name on the Hub.
        adapter (str | os.PathLike): what :func:`oftv2.load_adapter` takes.
        out (str | os.PathLike): the folder to write.
        dtype (torch.dtype | None): of all floating-point weights; ``None`` leaves each as it is stored.
        check_base (bool): refuse a model whose weights are not those that the adapter was trained on, by a sketch of
            them, or that has this adapter merged into them already.
        as_trained (bool): see :func:`oftv2.load_adapter`.
        force (bool): replace a model in ``out``, once the new one is complete.
        progress (Callable): called with the number of bytes to write; gives an object like ``tqdm``.

    Returns:
        list[str]: what the user should know of the result.

    Raises:
        AdapterError: an adapter that does not fit, a base that cannot be read, or a folder that would be lost.
    """
    target, source = Path(out), open_checkpoint(str(base))
    _check_target(target, (source.folder, Path(adapter)), force=force)
    plan = make_plan(source, read_adapter(adapter, as_trained=as_trained), dtype, check_base=check_base)
    with WorkFolder(target.resolve(), _inputs(source, Path(adapter), dtype, as_trained)) as work:
        _check_space(work.path, plan)
        bar = progress(plan.size) if progress is not None else None
        for name, pieces in plan.files.items():
            _write_file(work.path / name, source, plan.adapter, pieces, bar)
        if bar is not None:
            bar.close()
        notes = [*plan.notes, *_write_rest(work.path, source, plan, str(base))]
        work.finish()
    return notes


def _check_target(out: Path, inputs: Iterable[Path], *, force: bool) -> None:
    for path in inputs:
        if out.exists() and (out.samefile(path) or out.resolve() in path.resolve().parents):
            raise AdapterError(f"{out} holds {path}, which is needed: choose another folder to write")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise AdapterError(f"{out} is a file or a link: choose a folder to write")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise AdapterError(f"{out} exists and is not empty: choose another folder, or use --force")
    if not (out / MODEL_CONFIG).is_file():
        raise AdapterError(f"{out} is no model's folder (it has no {MODEL_CONFIG}), and --force replaces no other")


def _check_space(folder: Path, plan: Plan) -> None:
    done = sum((folder / name).stat().st_size for name in plan.files if (folder / name).exists())
    needed, free = plan.size - done + _SPARE, shutil.disk_usage(folder).free
    if free < needed:
        raise AdapterError(f"{folder.parent} has {free / 1e9:.1f} GB left, and {needed / 1e9:.1f} GB are needed")


def _inputs(base: Checkpoint, adapter: Path, dtype: torch.dtype | None, as_trained: bool) -> dict[str, Any]:
    """What the result is made from: work that was begun with anything else is not taken up."""
    tensors = tensors_file(adapter)
    parts = [tensors, tensors.parent / CONFIG_FILE]
    stats = {name: file.path.stat() for name, file in base.files.items()}
    return {
        "oftv2": __version__,
        "base": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "config": base.config,
        "adapter": [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts if part.is_file()],
        "dtype": str(dtype),
        "as_trained": as_trained,
    }


def _write_file(path: Path, base: Checkpoint, adapter: AdapterFile, pieces: dict[str, Piece], bar: Any) -> None:
    """Writes one file of weights, if it is not there already."""
    update = bar.update if bar is not None else lambda size: None
    if path.exists():
        update(sum(piece.entry.size for piece in pieces.values()))
        return

    def data(key: str) -> Iterable[bytes | memoryview]:
        piece = pieces[key]
        if piece.copied and piece.source is not None and piece.entry == base.entry(piece.source):
            return base.where[piece.source].pieces(piece.source)
        return (part for rows in merged_rows(base, adapter, piece) for part in tensor_pieces(rows))

    original = base.files[path.name].metadata
    begun = path.with_name(f"{path.name}.begun")
    write_tensors(
        begun, {key: piece.entry for key, piece in pieces.items()}, {"format": "pt", **original}, data, update
    )
    os.replace(begun, path)


def merged_rows(base: Checkpoint, adapter: AdapterFile, piece: Piece) -> Iterator[Tensor]:
    """A tensor of the merged checkpoint, some rows at a time; rotated in float32 or wider, and rounded once.

    A weight whose rows are not rotated each on its own comes whole: of a ``Conv1D``, or of a convolution with groups.
    """
    key, target, dtype = piece.source or "", piece.target, DTYPES[piece.entry.dtype]
    stored = DTYPES[base.entry(key).dtype] if key else dtype
    wide = torch.promote_types(stored, torch.float32)
    trained = torch.atleast_1d(adapter.parameter(piece.trained)) if piece.trained else None
    slices: Iterable[slice] = row_slices(piece.entry.shape)
    if target is not None:
        _, groups = target.layer_class.rotated_features(target.module)
        if groups > 1 or is_conv1d(target.module):
            slices = [slice(0, piece.entry.shape[0])]
        delta = target.rotation(adapter.config).delta(adapter.generators(target.name).to(wide))
    scale = adapter.output_scales.get(target.name) if target is not None else None
    for part in slices:
        rows = base.where[key].read(key, part) if trained is None else trained[part]
        rows = rows.to(stored)
        if scale is not None:
            rows = scaled_rows(rows, scale[part]).to(stored)
        if target is not None:
            rows = target.layer_class.rotated_weight(target.module, rows if dtype == stored else rows.to(wide), delta)
        yield rows.to(dtype)


def _write_rest(folder: Path, base: Checkpoint, plan: Plan, base_name: str) -> list[str]:
    """Everything but the weights; what was left behind."""
    kept, left = base.side_files()
    for path in kept:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(base.folder / path, folder / path)
    if base.index is not None:
        weight_map = {key: name for name, pieces in plan.files.items() for key in pieces}
        metadata = {**base.index.get("metadata", {}), "total_size": plan.size}
        if "total_parameters" in metadata:
            shapes = [piece.entry.shape for pieces in plan.files.values() for piece in pieces.values()]
            metadata["total_parameters"] = sum(math.prod(shape) for shape in shapes)
        write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / MODEL_CONFIG, plan.config)
    write_merged_card(folder, base.folder, base_name, plan.adapter)
    return [f"not copied from {base.folder}: {', '.join(left)}"] if left else []
