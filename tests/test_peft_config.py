"""PEFT's configurations and the names of its fields."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
from torch import nn

from oftv2 import ConfigError, OFTConfig, wrap_model
from small_models import linear


def test_pefts_configuration_becomes_this_librarys():
    theirs = peft.OFTConfig(
        r=4,
        oft_block_size=0,
        target_modules=["v", "q"],
        exclude_modules="k",
        module_dropout=0.1,
        num_cayley_neumann_terms=6,
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        bias="all",
        block_share=True,
        coft=True,
        eps=0.1,
    )
    assert OFTConfig.from_peft(theirs.to_dict()) == OFTConfig(
        num_blocks=4,
        target_modules=("q", "v"),
        exclude_modules="k",
        dropout=0.1,
        neumann_terms=4,
        layers=(0, 2),
        layers_pattern=("layers",),
        bias="all",
        block_share=True,
        constraint=0.1,
        modules_to_save=(),
    )
    assert OFTConfig.from_peft(theirs) == OFTConfig.from_peft(theirs.to_dict())
    assert OFTConfig.from_peft({"target_modules": "all-linear"}) == OFTConfig(neumann_terms=3, modules_to_save=())


@pytest.mark.parametrize(("task", "heads"), [("SEQ_CLS", None), ("QUESTION_ANS", None), ("CAUSAL_LM", ())])
def test_heads_that_peft_trains_for_a_task_train(task, heads):
    assert OFTConfig.from_peft(peft.OFTConfig(target_modules=["q"], task_type=task)).modules_to_save == heads
    named = peft.OFTConfig(target_modules=["q"], task_type=task, modules_to_save=["score"])
    assert OFTConfig.from_peft(named).modules_to_save == ("score",)


def test_fields_that_say_nothing_here_are_to_be_left_out():
    with pytest.raises(ConfigError, match=r"'inference_mode', 'task_type' of PEFT's, .*leave it out.*from_peft takes"):
        wrap_model(linear(), task_type="CAUSAL_LM", inference_mode=False)


SAME = {
    "size": ({"oft_block_size": 16}, {"block_size": 16}),
    "blocks": ({"r": 4, "oft_block_size": 0}, {"num_blocks": 4}),
    "dropout": ({"module_dropout": 0.25}, {"dropout": 0.25}),
    "exact": ({"use_cayley_neumann": False}, {"parametrization": "cayley"}),
    "terms": ({"num_cayley_neumann_terms": 8}, {"neumann_terms": 6}),
    "layers": ({"layers_to_transform": 0}, {"layers": (0,)}),
}


@pytest.mark.parametrize(("theirs", "ours"), SAME.values(), ids=SAME.keys())
def test_fields_under_pefts_names(theirs, ours):
    one, other = (wrap_model(nn.Sequential(nn.Linear(32, 8)), **fields) for fields in (theirs, ours))
    assert one._oftv2.configs == other._oftv2.configs
    config = OFTConfig(**theirs)
    assert config == OFTConfig(**ours) == dataclasses.replace(config) == OFTConfig.from_json(config.to_json())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"oft_block_size": 8, "block_size": 8}, "oft_block_size is PEFT's name for block_size"),
        ({"r": 8, "num_blocks": 8}, "r is PEFT's name for num_blocks"),
        ({"r": 8, "oft_block_size": 8}, "r and oft_block_size are both given"),
        ({"module_dropout": 0.1, "dropout": 0.1}, "module_dropout is PEFT's name for dropout"),
        ({"use_cayley_neumann": True, "parametrization": "cayley"}, "set the same thing"),
        ({"num_cayley_neumann_terms": 6, "neumann_terms": 4}, "set the same thing"),
        ({"num_cayley_neumann_terms": 1}, "is the identity"),
        ({"layers_to_transform": [0], "layers": (0,)}, "layers_to_transform is PEFT's name for layers"),
    ],
    ids=str,
)
def test_a_field_under_both_names_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        wrap_model(linear(), **fields)
    with pytest.raises(ConfigError, match=message):
        OFTConfig(**fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LORA", "target_modules": ["q"]}, "another kind of adapter"),
        ({"target_modules": None}, "leaves the choice to PEFT"),
        ({"target_modules": ["q"], "rank_pattern": {"q": 3}}, "rank_pattern"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_taken_over(values, message):
    with pytest.raises(ConfigError, match=message):
        OFTConfig.from_peft(values)


def test_layers_are_counted_in_the_named_lists():
    tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), "heads": nn.ModuleList()})
    tower["heads"].append(nn.Linear(8, 8))
    model = wrap_model(copy.deepcopy(tower), block_size=4, layers=(0, 1), layers_pattern="layers")
    assert [name for name, layer in model.named_modules() if hasattr(layer, "rotations")] == ["layers.0", "layers.1"]
