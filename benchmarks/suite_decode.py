"""Generating text with a whole model, adapters in place and merged: the suite ``decode``. Time is of one token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from adapted import base_of, common, missing_rows, together, tokens
from torch import Tensor

from measure import Row, interleave, timings
from merging import MERGE, check_merged
from methods import METHODS, perturb
from options import Options

OWN = ["frozen", "oft", "peft-oft", "peft-oft-accelerated", "lora", "dora"]
OWN_NF4 = ["frozen-nf4", "qoft", "peft-qoft", "qlora"]
MERGED = " merged"


def measure(options: Options) -> Iterator[Row]:
    prompt, new = (8, 4) if options.quick else (32, 16)
    for own in (OWN, OWN_NF4):
        names = options.choose(own)
        for sequences in (1,) if options.quick else (1, 8):
            group = f"{options.model}, {base_of(own[0], options)}, {sequences} sequences, {prompt} + {new} tokens"
            if names and options.wanted(group):
                yield from _measure(group, names, sequences, prompt, new, options)


def _measure(group: str, names: list[str], sequences: int, prompt: int, new: int, options: Options) -> Iterator[Row]:
    shared = common(options, group, sequences=sequences, prompt=prompt, new_tokens=new)
    models, missing = together(options, names)
    yield from missing_rows(shared, missing)
    ids = tokens(options, sequences, prompt)
    for name in list(models):
        model = perturb(name, models[name]).eval()
        if name in MERGE and not METHODS[name].nf4:  # merged, a 4-bit model is another one: 16-bit, or quantized anew
            models[name + MERGED] = MERGE[name](copy.deepcopy(model)).eval()
            check_merged(name, model, models[name + MERGED], ids)
    runs = {name: lambda _, model=model: generate(model, ids, new) for name, model in models.items()}
    samples = interleave(runs, options.device, wall=True, warmup=1, title=group, **options.effort)
    samples = {name: [seconds / new for seconds in taken] for name, taken in samples.items()}
    for name in models:
        method = name.removesuffix(MERGED)
        row = {**shared, "method": method, "merged": name != method, "base": base_of(method, options)}
        yield row | timings(samples, name, METHODS[method].ratios)


@torch.no_grad()
def generate(model: Any, ids: Tensor, new: int) -> Tensor:
    """``new`` tokens after the prompt, greedily, with the cache of keys and values; the prompt's pass is part of it."""
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
