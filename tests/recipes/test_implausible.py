"""A number that no run can have is refused where it is read, in every recipe, before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest

from llm_quest.errors import UsageError
from llm_quest.models import FAMILIES
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import find_implausible_numbers, nested_schema, takes_number
from llm_quest.recipes.recipe import get_recipe, load_recipe
from llm_quest.recipes.yaml_io import RawConfig


def numeric_keys(schema: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a schema that holds a number."""
    found = []
    for name, field in schema.model_fields.items():
        if takes_number(field.annotation):
            found.append((*path, name))
        elif (part := nested_schema(field.annotation)) is not None:
            found += numeric_keys(part, (*path, name))
    return found


def tree_of(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: tree_of(path[1:], value) if path[1:] else value}


@pytest.mark.parametrize(
    "value", [True, False, 10**20, -(10**20), 10**5000], ids=["true", "false", "1e20", "-1e20", "5000"]
)
@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_every_recipe_refuses_truth_values_and_huge_numbers(name: str, value: Any):
    schema = get_recipe(name).Config
    keys = numeric_keys(schema)
    assert len(keys) > 15
    for path in keys:
        problems = list(find_implausible_numbers(schema, RawConfig(tree_of(path, value), "recipe.yaml")))
        assert [problem.key for problem in problems] == [".".join(path)]
        assert len(str(problems[0])) < 400


def test_plausible_numbers_are_left_to_the_schema():
    tree = {
        "max_steps": 10**7,
        "learning_rate": 1e-3,
        "seed": 2**62,
        "tensorboard": True,
        "model": {"config": {"x": True}},
    }
    assert not list(find_implausible_numbers(get_recipe("pretrain").Config, RawConfig(tree, "recipe.yaml")))


@pytest.mark.parametrize(
    "family", [family.name for family in FAMILIES if family.name not in ("vit", "clip", "vision_language")]
)
def test_a_model_of_implausible_size_is_refused_at_once(family: str):
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "num_attention_heads"):
        if key in next(one for one in FAMILIES if one.name == family).Config.__dataclass_fields__:
            with pytest.raises(UsageError, match=rf"model\.config\.{key}: 1,000,000,000 is more than .*plausible"):
                load_recipe("tiny", [f"model.family={family}", f"model.config.{key}=1000000000"])
