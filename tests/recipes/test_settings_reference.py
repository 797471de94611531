"""Every setting is described; the pages of docs/settings are what the schemas say; a name that another library has for
a setting is answered with ours; every technique is switched on by the words that are printed for it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import pytest
from typer.testing import CliRunner

from llm_quest.cli.main import app
from llm_quest.cli.techniques import list_techniques
from llm_quest.errors import UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import nested_schema
from llm_quest.recipes.other_names import NO_SETTING, OTHER_NAMES, OTHER_VALUES, our_setting, setting_remark
from llm_quest.recipes.recipe import get_recipe, load_recipe
from llm_quest.recipes.schema import StrictModel
from llm_quest.recipes.settings_reference import make_page
from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES

OPEN_KEYS = {
    "loss_kwargs": ("epsilon_low", "epsilon_high"),
    "config": ("num_hidden_layers", "num_attention_heads", "hidden_size"),
}
"""Keys of groups that the schema leaves open."""
SETTINGS = Path(__file__).parents[2] / "docs" / "settings"


def keys_with_descriptions(schema: type[StrictModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in schema.model_fields.items():
        inner = nested_schema(field.annotation)
        yield prefix + name, field.description or (inner.__doc__ if inner else None) or ""
        if get_origin(field.annotation) is dict:
            yield from ((f"{prefix}{name}.{key}", "open") for key in OPEN_KEYS.get(name, ()))
        if inner is not None:
            yield from keys_with_descriptions(inner, f"{prefix}{name}.")


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_setting_is_described(recipe: str):
    keys = dict(keys_with_descriptions(get_recipe(recipe).Config))
    assert len(keys) > 30
    assert [key for key, text in keys.items() if not text.strip() and key != "recipe"] == []


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_page_of_a_recipe_is_current(recipe: str):
    """After a change of a schema: quest settings --write docs/settings"""
    assert (SETTINGS / f"{recipe}.md").read_text(encoding="utf-8") == make_page(recipe).markdown()


def test_there_is_a_page_for_every_recipe_and_no_other():
    assert sorted(file.stem for file in SETTINGS.glob("*.md")) == sorted(RECIPES)


def test_a_page_says_what_a_setting_takes_and_where_it_is_from():
    by_key = {one.key: one for one in make_page("grpo").settings}
    assert (by_key["num_generations"].takes, by_key["num_generations"].default) == ("a whole number >= 1", "8")
    assert by_key["warmup.max_steps"].default == "600"  # of grpo.yaml; the schema's is another
    assert by_key["overlong_buffer_tokens"].papers == ["2503.14476"]
    assert make_page("sft").settings[0].key == "model"  # a recipe's own settings come before those of all


@pytest.mark.parametrize("arguments", [["train", "sft", "--help"], ["settings", "sft"], ["plan", "sft", "-h"]])
def test_the_help_of_a_recipe_lists_its_settings(arguments: list[str]):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0
    assert "metric_for_best_model  (text or null; default: null)" in found.stdout
    assert "data.held_out" in found.stdout


def test_help_for_a_name_that_is_no_recipe_names_those_that_are():
    found = CliRunner().invoke(app, ["train", "stf", "--help"])
    assert isinstance(found.exception, UsageError)
    assert "did you mean 'sft'?" in str(found.exception)


def test_the_settings_are_printed_as_json():
    found = json.loads(CliRunner().invoke(app, ["settings", "dpo", "--json"]).stdout)
    assert {one["key"] for one in found["settings"]} >= {"beta", "data.source", "learning_rate"}


def error_of(recipe: str, *pairs: str) -> str:
    with pytest.raises(UsageError) as error:
        load_recipe(recipe, pairs)
    return str(error.value)


@pytest.mark.parametrize(
    ("recipe", "pair", "ours"),
    [
        ("sft", "lr=1e-3", "learning_rate"),
        ("sft", "epochs=2", "num_train_epochs"),
        ("grpo", "epochs=2", "num_train_epochs"),
        ("rpt_control", "epochs=2", "max_steps"),
        ("grpo", "batch_size=2", "prompts_per_rollout"),
        ("sft", "lora_r=8", "techniques='[{name: lora, rank: 8}]'"),
        ("grpo", "beta=0.1", "kl_coef"),
        ("grpo", "per_device_train_batch_size=4", "micro_batch_tokens"),
        ("dpo", "per_device_train_batch_size=4", "micro_batch_size"),
        ("vit", "hidden_size=64", "model.hidden_size"),
        ("pretrain", "hidden_size=64", "model.config.hidden_size"),
        ("dpo", "output_dir=x", "--out FOLDER"),
    ],
)
def test_another_librarys_name_is_answered_with_ours(recipe: str, pair: str, ours: str):
    assert f"unknown key; here it is {ours}" in error_of(recipe, pair)


@pytest.mark.parametrize(
    ("recipe", "pair", "remedy"),
    [
        ("sft", "packing=true", "always share rows, and do not attend to one another; leave it out"),
        ("dpo", "packing=true", "rows of like length share a micro-batch"),
        ("grpo", "use_vllm=true", "the policy samples in this process itself; leave it out"),
        ("grpo", "reward_model_path=x", "rewards='[{name: model, load: FOLDER}]'"),
        ("dpo", "loss_type=sigmoid", "loss_type: sigmoid is called dpo here"),
        ("sft", "lr_scheduler_type=constant_with_warmup", "constant_with_warmup is called constant here"),
        ("sft", "report_to=wandb", "; write [wandb]"),
    ],
)
def test_what_other_programs_set_is_answered_with_what_to_do(recipe: str, pair: str, remedy: str):
    assert remedy in error_of(recipe, pair)


def test_what_is_said_in_place_of_a_setting_is_no_key_of_the_recipe_and_no_other_name():
    """A remark on a key that a recipe has would never be seen, nor one on a name that is answered with a setting."""
    for name, remarks in NO_SETTING.items():
        assert name not in OTHER_NAMES
        assert set(remarks) <= {*RECIPES, ""}
        for recipe in RECIPES:
            if setting_remark(name, recipe) is not None:
                assert name not in all_keys(recipe), f"{recipe} has {name}"
    for *where, value in OTHER_VALUES:
        recipe, key = where if len(where) > 1 else ("sft", where[0])
        load_recipe(recipe, [f"{key}={OTHER_VALUES[(*where, value)]}"])
        assert value in error_of(recipe, f"{key}={value}")


def all_keys(recipe: str) -> set[str]:
    return {key for key, _ in keys_with_descriptions(get_recipe(recipe).Config)}


@pytest.mark.parametrize("name", sorted(OTHER_NAMES))
def test_no_other_name_leads_to_a_setting_that_is_refused(name: str):
    """The answer is a key of the recipe that was asked; with a value, that value is accepted."""
    answers = {recipe: our_setting(name, all_keys(recipe).__contains__) for recipe in RECIPES}
    assert any(answers.values())
    for recipe, answer in answers.items():
        if answer is None or answer.startswith("--"):
            continue
        for pair in shlex.split(answer):
            key, equals, _ = pair.partition("=")
            assert key in all_keys(recipe)
            if key.startswith("loss_kwargs."):
                load_recipe(recipe, [f"{key}=0.3"])
            if equals and recipe in ("pretrain", "sft", "grpo"):
                load_recipe(recipe, [pair])


def test_a_word_that_nobody_uses_is_answered_with_the_nearest():
    assert "unknown key, did you mean 'learning_rate'?" in error_of("sft", "learning_rat=1")


def test_every_technique_is_listed_with_what_switches_it_on():
    entries = list_techniques().entries
    assert {entry.name for entry in entries} == {*TECHNIQUES, *TRAINING_TECHNIQUES}
    for entry in entries:
        assert len(entry.summary) > 15, entry.name
        assert not re.match(r"[a-z_]+: ", entry.summary), f"{entry.name}: the first sentence is about an option"
        recipe, *pairs = shlex.split(entry.command.replace("RECIPE", "tiny"))
        _, config, _ = load_recipe(recipe, pairs)
        assert entry.name in {one["name"] for one in config.all_techniques} or entry.name == "score_head"
        done = CliRunner().invoke(app, ["train", recipe, *pairs, "--dry-run", "--quiet"])
        assert done.exit_code == 0, f"the run refuses what quest techniques advises: {done.exception}"
    assert "techniques='[lora]'" in "\n".join(list_techniques().lines())
    assert [one.name for one in list_techniques(["LoRA", "direction"]).entries] == ["dora"]
    with pytest.raises(UsageError, match=r"no technique has 'doro'.* did you mean 'dora'"):
        list_techniques(["doro"])
