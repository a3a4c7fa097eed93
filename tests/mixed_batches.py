"""Batches whose rows go through different adapters: a model with three, and what each row is alone."""

from __future__ import annotations

import contextlib

import oftv2
from conftest import randomize

# Twice one adapter, several of one row, none, and one that most layers lack.
ROWS = ["math", None, "chat", ["chat", "code"], "code", "math"]


def wrapped(model, **fields):
    """A model with three adapters of different block sizes, parametrizations and targets, all of them random."""
    oftv2.wrap_model(model, adapter_name="math", block_size=32, **fields)
    oftv2.add_adapter(model, "chat", block_size=16, block_share=True)
    oftv2.add_adapter(model, "code", block_size=8, target_modules=["q_proj", "down_proj"], parametrization="cayley")
    randomize(model)
    return model


@contextlib.contextmanager
def only(model, entry):
    """The model with the adapters of one row, for all of a batch."""
    if entry is None:
        with oftv2.disable_adapter(model):
            yield
        return
    active = oftv2.active_adapters(model)
    oftv2.set_adapter(model, entry, trainable=False)
    yield
    oftv2.set_adapter(model, active, trainable=False)


def one_by_one(model, rows, call):
    """``call(i)`` of every row on its own."""
    out = []
    for i, entry in enumerate(rows):
        with only(model, entry):
            out.append(call(i))
    return out
