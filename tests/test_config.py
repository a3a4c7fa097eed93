"""The configuration: every field checked, frozen, and JSON in and out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oftv2 import ConfigError, OFTConfig

INVALID = {
    "block_size": (1, 0, -8, True, 32.0, "32", (32,)),
    "num_blocks": (0, -1, True, 2.0, "4"),
    "neumann_terms": (0, -2, True, 4.0, "4", None),
    "parametrization": ("Cayley", "", None, ["cayley"]),
    "target_modules": (None, (), [], "", "(", ("q_proj", ""), ("q_proj", 3), b"q_proj", 7),
    "exclude_modules": ("", "[", ("",), (None,), 7),
    "layers": (3, "3", (-1,), (0, 1.0), (True,), ("0",)),
    "layers_pattern": (("",), (1,), 7, "layers", "(", ("h", "[")),
    "modules_to_save": ("score", ("",), (1,), b"score", 7),
    "block_size_pattern": (None, [("q_proj", 8)], {"q_proj": 1}, {"q_proj": 8.0}, {"q_proj": True}, {"(": 8}, {"": 8}),
    "dropout": (-0.1, 1.0, 1, True, "0.1", None, float("nan")),
    "constraint": (0, -1.0, True, "1", float("nan"), float("inf")),
    "block_share": (0, 1, None, "yes"),
    "scale_generators": (0, 1, None, "yes"),
    "bias": ("lora_only", None, True),
    "init": ("zeros", None, 0),
    "adjust_block_size": (0, 1, None, "yes"),
}
ALLOWED = {
    "block_size": "at least 2",
    "num_blocks": "at least 1",
    "neumann_terms": "2, 4 or 6",
    "parametrization": "'cayley_neumann' or 'cayley'",
    "target_modules": "regular expression",
    "exclude_modules": "regular expression",
    "layers": "a list of layer numbers",
    "layers_pattern": "regular expressions|together with layers",
    "modules_to_save": "a list of module names, or None",
    "block_size_pattern": "pattern|regular expression|at least 2",
    "dropout": "from 0 up to, not including, 1",
    "constraint": "a positive number, or None",
    "block_share": "True or False",
    "scale_generators": "True or False",
    "bias": "'none' or 'all' or 'oft_only'",
    "init": "'identity' or 'normal'",
    "adjust_block_size": "True or False",
}


def test_the_table_of_invalid_values_covers_every_field():
    assert set(INVALID) == set(ALLOWED) == {field.name for field in dataclasses.fields(OFTConfig)}


@pytest.mark.parametrize(
    ("field", "value"),
    [pytest.param(field, value, id=f"{field}={value!r}") for field, values in INVALID.items() for value in values],
)
def test_an_invalid_value_is_refused_with_field_value_and_what_is_allowed(field, value):
    with pytest.raises(ConfigError, match=ALLOWED[field]) as caught:
        OFTConfig(**{field: value})
    assert f"OFTConfig.{field} = " in str(caught.value)
    assert (repr(value) if value != [] else "()") in str(caught.value)


@pytest.mark.parametrize("field", ["layers", "target_modules", "exclude_modules", "modules_to_save"])
def test_a_set_of_mixed_types_is_refused_like_a_list(field):
    with pytest.raises(ConfigError, match=f"OFTConfig.{field} = "):
        OFTConfig(**{field: {1, "a"}})


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_block_size_and_num_blocks_exclude_each_other():
    with pytest.raises(ConfigError, match=r"OFTConfig.num_blocks = 4 .*block_size=16.*None"):
        OFTConfig(block_size=16, num_blocks=4)


def test_the_block_size_is_32_unless_the_number_of_blocks_is_given():
    assert OFTConfig().block_size == 32
    assert OFTConfig(num_blocks=4).block_size is None
    assert OFTConfig(num_blocks=4).num_blocks == 4


def test_defaults_are_the_documented_ones():
    assert OFTConfig().to_dict() == {
        "block_size": 32,
        "num_blocks": None,
        "neumann_terms": 4,
        "parametrization": "cayley_neumann",
        "target_modules": "all-linear",
        "exclude_modules": [],
        "layers": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "block_size_pattern": {},
        "dropout": 0.0,
        "constraint": None,
        "block_share": False,
        "scale_generators": False,
        "bias": "none",
        "init": "identity",
        "adjust_block_size": False,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 2},
        {"num_blocks": 1},
        {"neumann_terms": 1},
        {"target_modules": r".*\.(q|v)_proj"},
        {"dropout": 0},
        {"constraint": 1},
        {"layers": ()},
        {"modules_to_save": ()},
        {"block_size_pattern": {r"mlp\..*": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_values_at_the_edge_of_what_is_allowed_are_accepted(fields):
    config = OFTConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("kind", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_sequences_become_tuples(kind):
    config = OFTConfig(
        target_modules=kind(["q", "v"]), exclude_modules=kind(["k"]), layers=kind([0, 2]), modules_to_save=kind(["s"])
    )
    assert (config.target_modules, config.exclude_modules) == (("q", "v"), ("k",))
    assert (config.layers, config.modules_to_save) == ((0, 2), ("s",))


def test_a_set_of_names_has_one_order():
    assert OFTConfig(target_modules={"v", "q", "k"}).target_modules == ("k", "q", "v")
    assert OFTConfig(layers=range(3)).layers == (0, 1, 2)


def test_fields_cannot_be_assigned():
    config = OFTConfig()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


def test_equal_configs_have_one_hash():
    sizes = {"q_proj": 16}
    assert len({OFTConfig(block_size_pattern=sizes), OFTConfig(block_size_pattern=dict(sizes)), OFTConfig()}) == 2


def test_what_the_caller_passed_in_can_change_without_changing_the_config():
    pattern, names = {"q_proj": 8}, ["q_proj"]
    config = OFTConfig(block_size_pattern=pattern, target_modules=names)
    pattern["q_proj"] = 1
    names.append("")
    assert config == OFTConfig(block_size_pattern={"q_proj": 8}, target_modules=("q_proj",))


def test_replace_validates_again():
    config = OFTConfig(block_size=8, bias="all")
    assert dataclasses.replace(config, block_size=16) == OFTConfig(block_size=16, bias="all")
    with pytest.raises(ConfigError, match=r"OFTConfig\.bias = 'some'"):
        dataclasses.replace(config, bias="some")


def test_unknown_fields_are_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError,
        match=r"'blocksize', 'rank'; did you mean 'block_size'.*It has .*adjust",
    ):
        OFTConfig.from_dict({"rank": 8, "blocksize": 32, "block_size": 32})
    with pytest.raises(ConfigError, match=r"'blocksize'; did you mean 'block_size'"):
        OFTConfig(blocksize=32)
    with pytest.raises(ConfigError, match=r"no field 'rank'\. It has block_size"):
        OFTConfig(rank=32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "not valid JSON", id="empty"),
        pytest.param('{"block_size": 32', "not valid JSON", id="truncated"),
        pytest.param("[32]", "JSON object, and this is a list", id="list"),
        pytest.param("null", "JSON object, and this is a NoneType", id="null"),
        pytest.param('{"block_size": 1}', r"OFTConfig.block_size = 1", id="value"),
        pytest.param('{"dropout": NaN}', r"OFTConfig.dropout = nan", id="nan"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        OFTConfig.from_json(text)


def test_missing_fields_in_json_take_their_defaults():
    assert OFTConfig.from_json("{}") == OFTConfig()
    assert OFTConfig.from_json('{"num_blocks": 4}') == OFTConfig(num_blocks=4)


NAMES = st.lists(st.text(min_size=1, max_size=12), max_size=4)
PATTERNS = st.from_regex(r"[a-z_]{1,8}(\\\.[0-9]+)?(\.\*)?", fullmatch=True)
SIZES = st.integers(2, 4096)


def _sometimes(**fields):
    return st.fixed_dictionaries({}, optional=fields)


FIELDS = st.tuples(
    st.one_of(st.just({}), st.builds(dict, block_size=SIZES), st.builds(dict, num_blocks=st.integers(1, 512))),
    _sometimes(
        neumann_terms=st.integers(1, 12),
        parametrization=st.sampled_from(["cayley_neumann", "cayley"]),
        target_modules=st.one_of(st.just("all-linear"), PATTERNS, NAMES.filter(bool)),
        exclude_modules=st.one_of(PATTERNS, NAMES),
        layers=st.one_of(st.none(), st.lists(st.integers(0, 200), max_size=5)),
        modules_to_save=st.one_of(st.none(), NAMES),
        block_size_pattern=st.dictionaries(PATTERNS, SIZES, max_size=3),
        dropout=st.floats(0, 1, exclude_max=True),
        constraint=st.one_of(st.none(), st.floats(0, exclude_min=True, allow_infinity=False), st.integers(1, 10)),
        block_share=st.booleans(),
        scale_generators=st.booleans(),
        bias=st.sampled_from(["none", "all", "oft_only"]),
        init=st.sampled_from(["identity", "normal"]),
        adjust_block_size=st.booleans(),
    ),
).map(lambda parts: {**parts[0], **parts[1]})


@settings(max_examples=200, deadline=None)
@given(FIELDS)
def test_every_valid_config_survives_json(fields):
    config = OFTConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    assert OFTConfig.from_json(config.to_json()) == config
    assert OFTConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()
    assert list(config.to_dict()["block_size_pattern"]) == list(fields.get("block_size_pattern", {}))  # the first wins
