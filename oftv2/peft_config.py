"""PEFT's names for the fields of an OFT configuration, in this library's, and back again.

PEFT counts terms in its own way: ``num_cayley_neumann_terms = t`` is ``I + 2Q + … + 2Q^(t−2) + Q^(t−1)``, which is
``k = t − 2`` here from ``t = 5`` on; ``t = 3`` and ``t = 4`` are both ``k = 2``; ``t = 2`` is ``I + 2Q``, which only
``parametrization="neumann"`` makes; below that nothing rotates. Its exact transform is the transpose of this library's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# PEFT's name to this library's, where the value is the same; 0 and None stand for "not given" in the first two.
_RENAMED = {
    "oft_block_size": "block_size",
    "r": "num_blocks",
    "module_dropout": "dropout",
    "layers_to_transform": "layers",
}
_CONVERTED = ("use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps")
ALIASES = (*_RENAMED, *_CONVERTED)
# Fields of PEFT's that say nothing about the adapter's function, or nothing that would hold here.
WITHOUT_MEANING = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
_SAME = ("target_modules", "exclude_modules", "modules_to_save", "bias", "block_share", "layers_pattern")
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose heads PEFT trains in full without being asked
DEFAULT_TERMS = 5
DEFAULT_EPS = 6e-5
_DEFAULT_BLOCK_SIZE = 32


def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with PEFT's names replaced by this library's.

    Raises:
        ValueError: both names of one field, or a number of terms that has no counterpart.
    """
    out = {name: value for name, value in fields.items() if name not in ALIASES}
    given = {name for name, value in fields.items() if value not in (None, 0)}
    if {"r", "oft_block_size"} <= given:
        raise ValueError("r and oft_block_size are both given, and each follows from the other: leave one of them out")
    for theirs, ours in _RENAMED.items():
        if theirs not in fields:
            continue
        if ours in fields:
            raise ValueError(f"{theirs} is PEFT's name for {ours}, and both are given: leave one of them out")
        value = fields[theirs]
        if theirs in ("r", "oft_block_size") and theirs not in given:
            continue
        out[ours] = (value,) if theirs == "layers_to_transform" and isinstance(value, int) else value
    if "use_cayley_neumann" in fields or "num_cayley_neumann_terms" in fields:
        _no_others(fields, ("use_cayley_neumann", "num_cayley_neumann_terms"), ("parametrization", "neumann_terms"))
        terms = fields.get("num_cayley_neumann_terms", DEFAULT_TERMS)
        out |= series(fields.get("use_cayley_neumann", True), terms)
    if "coft" in fields or "eps" in fields:
        _no_others(fields, ("coft", "eps"), ("constraint",))
        out["constraint"] = fields.get("eps", DEFAULT_EPS) if fields.get("coft", False) else None
    return out


def _no_others(fields: Mapping[str, Any], theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    both = [name for name in ours if name in fields]
    if both:
        named = " and ".join(name for name in theirs if name in fields)
        raise ValueError(f"{named} (PEFT's) and {both[0]} set the same thing: leave one of them out")


def series(use_cayley_neumann: bool, terms: int) -> dict[str, Any]:
    """The fields that make the rotation of PEFT's series of ``terms`` terms, or of its exact transform.

    Raises:
        ValueError: fewer than two terms, which rotate nothing.
    """
    if not use_cayley_neumann:
        return {"parametrization": "cayley"}
    if not isinstance(terms, int) or terms < 2:
        raise ValueError(f"num_cayley_neumann_terms={terms!r}: in PEFT such a series is the identity; use 3 or more")
    if terms == 2:
        return {"parametrization": "neumann", "neumann_terms": 1}
    return {"parametrization": "cayley_neumann", "neumann_terms": max(2, terms - 2)}


def series_before_018(terms: int) -> dict[str, Any]:
    """The same for PEFT before 0.18, which doubled the last power too: ``I + 2Q + … + 2Q^(t−1)``."""
    return series(True, terms) if terms <= 2 else {"parametrization": "neumann", "neumann_terms": terms - 1}


def from_peft(values: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a PEFT configuration, as fields of this library's.

    Raises:
        ValueError: not an OFT configuration, no modules named, or a field that is unknown and set.
    """
    kind, task = (getattr(values.get(name), "value", values.get(name)) for name in ("peft_type", "task_type"))
    if kind not in (None, "OFT"):
        raise ValueError(f"peft_type={kind!r} is another kind of adapter; this library takes OFT")
    known = {*WITHOUT_MEANING, *_SAME, *ALIASES, "init_weights"}
    unknown = [name for name, value in values.items() if name not in known and value not in (None, False, [], {}, "")]
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not known of PEFT's OFT; a newer PEFT than this library knows")
    if values.get("target_modules") is None:
        raise ValueError('target_modules is None, which leaves the choice to PEFT: name them, or use "all-linear"')
    size = 0 if values.get("r") else _DEFAULT_BLOCK_SIZE
    given = {"oft_block_size": size, "num_cayley_neumann_terms": DEFAULT_TERMS, **values}
    fields = renamed({name: value for name, value in given.items() if name in (*_SAME, *ALIASES)})
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        if isinstance(fields.get(name), (set, frozenset, list)):
            fields[name] = tuple(sorted(fields[name]))
    if isinstance(fields["target_modules"], str) and fields["target_modules"].lower() == "all-linear":
        fields["target_modules"] = "all-linear"
    fields["modules_to_save"] = fields.get("modules_to_save") or (None if task in _WITH_HEADS else ())
    if not fields.get("layers"):
        fields.pop("layers", None)
        fields.pop("layers_pattern", None)
    if values.get("init_weights", True) is False:
        fields["init"] = "normal"
    return fields


def to_peft(parametrization: str, terms: int) -> dict[str, Any] | None:
    """PEFT's fields for a series or the exact transform; None where it has none."""
    if parametrization == "cayley":
        return {"use_cayley_neumann": False, "num_cayley_neumann_terms": DEFAULT_TERMS}
    if parametrization == "cayley_neumann" and terms >= 2:
        return {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms + 2}
    if parametrization == "neumann" and terms == 1:
        return {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2}
    return None
