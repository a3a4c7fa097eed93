"""The configuration of an adapter: frozen, validated on construction, JSON in and out."""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import peft_config

ALL_LINEAR = "all-linear"
DEFAULT_BLOCK_SIZE = 32
_PARAMETRIZATIONS = ("cayley_neumann", "cayley", "neumann")
_BIAS = ("none", "all", "oft_only")
_INIT = ("identity", "normal")


class ConfigError(ValueError):
    """A field of :class:`OFTConfig` has a value that is not allowed."""


@dataclass(frozen=True)
class OFTConfig:
    r"""What to rotate, and how.

    Each chosen layer ``y = x Wᵀ`` becomes ``y = (x R) Wᵀ`` with ``R`` block-diagonal and orthogonal (OFTv2,
    arXiv 2506.19847). ``R`` is made from trainable skew-symmetric generators ``Q``, which start at zero, so a fresh
    adapter changes nothing.

    Args:
        block_size: size ``b`` of the blocks of ``R``; must divide the size of the input that is rotated. A layer
            trains ``in_features · (b − 1) / 2`` numbers. Default 32, unless ``num_blocks`` is given.
        num_blocks: instead of ``block_size``: the number of blocks, so that ``b = in_features / num_blocks``.
        neumann_terms: ``k`` in ``R = (I + Q)(I + Q + … + Qᵏ)``. An even ``k`` is far more orthogonal than the odd
            number after it: the error is ``‖Q‖^(2k+2)``, against ``2‖Q‖^(k+1)`` for odd ``k``. Default 4.
        parametrization: ``"cayley_neumann"`` (the truncated series, no inverse), ``"cayley"`` (the exact transform
            ``(I + Q)(I − Q)⁻¹``, orthogonal for every ``Q``) or ``"neumann"`` (``I + 2Q + … + 2Qᵏ``, far less
            orthogonal: what PEFT before 0.18 used, to load its adapters exactly).
        target_modules: ``"all-linear"`` (every linear layer but the output head, and but experts in stacked weights),
            a regular expression that must match the whole module path, or a list of names, each an exact module path
            or its last components; ``"all-linear"`` may be one of them.
        exclude_modules: like ``target_modules``; what matches is left alone, with all that is inside it.
        layers: only modules inside these transformer layers (the first number in the module path).
        layers_pattern: names of the lists that ``layers`` counts in, such as ``"layers"`` or ``"h"``; ``None`` takes
            any.
        modules_to_save: names of modules to train in full and to save with the adapter. ``None`` takes the task heads
            of a transformers model other than the language-model head, and the classifiers of timm's (they are new,
            and useless untrained).
        block_size_pattern: ``{pattern: block_size}`` for modules whose path ends with a match of the pattern.
        dropout: multiplicative dropout: probability with which a block is the identity in a training step.
        constraint: COFT: bounds the generators' Frobenius norm; each of the ``r`` blocks is scaled into
            ``‖Q_j‖_F ≤ constraint / √r`` on its way into ``R``. The parameters themselves are never rewritten.
        block_share: one block, used for the whole layer.
        scale_generators: uses ``Q / (2√(b−1))`` in place of ``Q``, so that one learning rate fits every block size.
        bias: ``"none"``, ``"oft_only"`` (train the biases of the rotated layers) or ``"all"`` (every bias).
        init: ``"identity"`` (zero generators) or ``"normal"`` (standard deviation 0.02; for tests and studies).
        adjust_block_size: take the nearest divisor where ``block_size`` does not divide a layer, rather than refuse.

    PEFT's names are taken too: ``oft_block_size``, ``r``, ``module_dropout``, ``layers_to_transform``,
    ``use_cayley_neumann`` with ``num_cayley_neumann_terms`` (in PEFT's count), ``coft`` with ``eps``. The fields have
    the names and meanings above.

    Raises:
        ConfigError: names the field, its value, and what is allowed; or a field given under both of its names.
    """

    block_size: int | None = None
    num_blocks: int | None = None
    neumann_terms: int = 4
    parametrization: str = "cayley_neumann"
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] | None = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    block_size_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    dropout: float = 0.0
    constraint: float | None = None
    block_share: bool = False
    scale_generators: bool = False
    bias: str = "none"
    init: str = "identity"
    adjust_block_size: bool = False

    def __post_init__(self) -> None:
        self._check_block_sizes()
        if not _is_int(self.neumann_terms) or self.neumann_terms < 1:
            self._fail("neumann_terms", "an integer of at least 1; an even one is better: 2, 4 or 6")
        self._check_choice("parametrization", _PARAMETRIZATIONS)
        self._check_choice("bias", _BIAS)
        self._check_choice("init", _INIT)
        for name in ("block_share", "scale_generators", "adjust_block_size"):
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "True or False")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            self._fail("dropout", "a number from 0 up to, not including, 1")
        if self.constraint is not None and not (_is_number(self.constraint) and self.constraint > 0):
            self._fail("constraint", "a positive number, or None")
        self._check_names()
        if self.layers is not None:
            self._freeze("layers", self.layers, lambda v: _is_int(v) and v >= 0, "a list of layer numbers from 0 up")
        if self.layers_pattern is not None:
            names = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
            self._freeze("layers_pattern", names, _is_regex, "a list of names or regular expressions, or None")
            if self.layers is None:
                self._fail("layers_pattern", "it together with layers, or None")

    def _check_block_sizes(self) -> None:
        if self.block_size is not None and self.num_blocks is not None:
            self._fail("num_blocks", f"not together with block_size={self.block_size}: set one of them to None")
        if self.block_size is None and self.num_blocks is None:
            object.__setattr__(self, "block_size", DEFAULT_BLOCK_SIZE)
        if self.block_size is not None and not (_is_int(self.block_size) and self.block_size >= 2):
            self._fail("block_size", "an integer of at least 2 (a 1×1 block has nothing to train)")
        if self.num_blocks is not None and not (_is_int(self.num_blocks) and self.num_blocks >= 1):
            self._fail("num_blocks", "an integer of at least 1")
        pattern = self.block_size_pattern
        if not isinstance(pattern, Mapping):
            self._fail("block_size_pattern", "a dictionary of patterns to block sizes")
        for key, size in pattern.items():
            self._check_regex("block_size_pattern", key)
            if not _is_int(size) or size < 2:
                self._fail("block_size_pattern", f"block sizes of at least 2, and {key!r} has {size!r}")
        object.__setattr__(self, "block_size_pattern", dict(pattern))

    def _check_names(self) -> None:
        if self.exclude_modules is None:
            object.__setattr__(self, "exclude_modules", ())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                if name == "exclude_modules" or value != ALL_LINEAR:
                    self._check_regex(name, value)
            else:
                every = f"{ALL_LINEAR!r}, " if name == "target_modules" else ""
                self._freeze(name, value, _is_name, f"{every}a regular expression or a list of module names")
        if self.target_modules == ():
            self._fail("target_modules", f"{ALL_LINEAR!r}, a regular expression, or at least one module name")
        if self.modules_to_save is not None:
            self._freeze("modules_to_save", self.modules_to_save, _is_name, "a list of module names, or None")

    def _check_regex(self, name: str, value: Any) -> None:
        if not _is_name(value):
            self._fail(name, "a non-empty regular expression")
        try:
            re.compile(value)
        except re.error as error:
            self._fail(name, f"a valid regular expression ({value!r}: {error})")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._fail(name, " or ".join(repr(choice) for choice in allowed))

    def _freeze(self, name: str, value: Any, check: Any, allowed: str) -> None:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            self._fail(name, allowed)
        items = tuple(value)
        if not all(check(item) for item in items):
            self._fail(name, allowed)
        if isinstance(value, (set, frozenset)):
            items = tuple(sorted(items))
        object.__setattr__(self, name, items)

    def _fail(self, name: str, allowed: str) -> None:
        raise ConfigError(f"OFTConfig.{name} = {getattr(self, name)!r} is not allowed: use {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OFTConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: for unknown fields, with the ones that exist, and for values that are not allowed.
        """
        _refuse_unknown(values)
        return cls(**values)

    @classmethod
    def from_peft(cls, values: Any) -> OFTConfig:
        """The configuration that does what one of PEFT's does: a ``peft.OFTConfig``, its dictionary, or what
        ``adapter_config.json`` holds.

        Raises:
            ConfigError: another kind of adapter, fields that this library does not know, values that it does not take.
        """
        return cls(**_translated(peft_config.from_peft, values.to_dict() if hasattr(values, "to_dict") else values))

    @staticmethod
    def with_own_names(values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields under this library's names or PEFT's (``oft_block_size``, ``r``, ``module_dropout``,
        ``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``layers_to_transform``, ``coft`` with ``eps``), under
        this library's.

        Raises:
            ConfigError: a field under both of its names, or one that there is not.
        """
        own = _translated(peft_config.renamed, values)
        _refuse_unknown(own)
        return own

    def to_json(self) -> str:
        """The configuration as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> OFTConfig:
        """The inverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration must be a JSON object, and this is a {type(values).__name__}")
        return cls.from_dict(values)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(OFTConfig)]
    unknown = sorted(set(values) - set(known))
    if useless := [name for name in unknown if name in peft_config.WITHOUT_MEANING]:
        raise ConfigError(
            f"OFTConfig has no field {', '.join(map(repr, useless))} of PEFT's, which would change nothing here: "
            "leave it out; OFTConfig.from_peft takes a whole configuration of PEFT's"
        )
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=2)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ConfigError(f"OFTConfig has no field {', '.join(map(repr, unknown))}{hint} It has {', '.join(known)}")


def _taking_pefts_names(own: Callable[..., None]) -> Callable[..., None]:
    """The ``__init__`` of :class:`OFTConfig` for fields under PEFT's names as well."""

    @functools.wraps(own)
    def init(self: OFTConfig, *args: Any, **fields: Any) -> None:
        own(self, *args, **OFTConfig.with_own_names(fields))

    return init


OFTConfig.__init__ = _taking_pefts_names(OFTConfig.__init__)  # type: ignore[method-assign]


def _translated(translate: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return translate(values)
    except ValueError as error:
        raise ConfigError(f"PEFT's configuration: {error}") from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_regex(value: Any) -> bool:
    try:
        return _is_name(value) and bool(re.compile(value))
    except re.error:
        return False


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
