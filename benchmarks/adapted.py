"""Whole models, each adapted by one method, for the suites that compare them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import models
from measure import Row, relative_error
from methods import METHODS, attach, available
from options import Options


def together(options: Options, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A model for each method, on tensors that they share (but ``full``, which trains its own), and what is missing.

    Raises:
        SystemExit: a fresh adapter changes what its base computes.
        MissingError: the model is not there.
    """
    names, missing = available(names)
    found: dict[str, Any] = {}
    ids = tokens(options, 2, 16)
    for nf4 in sorted({METHODS[name].nf4 for name in names}):
        base = models.load(options.model, options.device, options.dtype, nf4=nf4, seed=options.seed)
        # In training mode: in an evaluation, bitsandbytes would repack 4-bit weights on a CPU and round their scales.
        with torch.no_grad():
            expected = base(ids).logits
        for name in names:
            if METHODS[name].nf4 == nf4:
                model = (copy.deepcopy if name == "full" else models.twin)(base)
                found[name] = attach(name, model, options.sizes).train()
                _check_fresh(name, found[name], ids, expected)
    return {name: found[name] for name in names}, missing


@torch.no_grad()
def _check_fresh(name: str, model: Any, ids: Tensor, expected: Tensor) -> None:
    logits = model(ids).logits
    error = relative_error(logits, expected)
    limit = 1e-4 if logits.dtype == torch.float32 else 5e-2
    if not error < limit:
        raise SystemExit(f"{name}: a fresh adapter changes the logits by {error:.1e} of them; nothing was timed")


def tokens(options: Options, batch: int, length: int) -> Tensor:
    """Random token ids, the same ones for a seed."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(3, 128, (batch, length), generator=generator).to(options.device)


def in_own_memory(model: Any) -> Any:
    """The model with its weights out of the mapped file, whose pages the system drops or keeps as it likes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def common(options: Options, group: str, **fields: Any) -> Row:
    """The columns that all rows of a group share."""
    sizes = options.sizes
    return {"group": group, "model": options.model, **fields, "block_size": sizes.block_size, "rank": sizes.rank}


def base_of(name: str, options: Options) -> str:
    return "NF4" if METHODS[name].nf4 else options.dtype_name


def by_base(
    options: Options, measure: Callable[[Row, list[str], Options], Iterator[Row]], *methods: list[str]
) -> Iterator[Row]:
    """For each list of methods on one base, rows of those that are wanted, if any.

    ``measure`` is called with the columns that all rows of the group share and the methods that can run here.
    """
    for own in methods:
        asked = [name for name in options.choose(own) if name in own]
        group = f"{options.model}, {base_of(own[0], options)}"
        if asked and options.wanted(group):
            shared = common(options, group)
            names, missing = available(asked)
            yield from missing_rows(shared, missing)
            if names:
                yield from measure(shared, names, options)


def missing_rows(shared: Row, missing: dict[str, str]) -> Iterator[Row]:
    """A row for each method that cannot run here."""
    return ({**shared, "method": name, "missing": reason} for name, reason in missing.items())
