"""Every mistake in a recipe is told, all at once, with its place, what is allowed and the nearest known name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from llm_quest.errors import UsageError
from llm_quest.recipes.config import (
    config_differences,
    config_to_yaml,
    find_recipe_file,
    load_raw_config,
    load_run_config,
    nested_schema,
    parse_config,
    recipe_names,
)
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME
from llm_quest.recipes.grpo import GrpoConfig
from llm_quest.recipes.old_keys import OLD_KEYS
from llm_quest.recipes.other_names import METHODS
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.schema import StrictModel
from llm_quest.recipes.vit import VitConfig
from llm_quest.recipes.vlm_config import VlmConfig
from llm_quest.recipes.yaml_io import ConfigProblem, apply_overrides, read_yaml, read_yaml_file

GOOD = "recipe: pretrain\nmodel:\n  preset: llama3.2-tiny\n"


def config_problems(text: str, *pairs: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        parse_config(PretrainConfig, apply_overrides(read_yaml(text, "my.yaml"), pairs))
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("pair", "path", "said"),
    [
        ("samples.promts=1", "samples.promts", "did you mean 'prompts'?; allowed here: every_steps, prompts,"),
        ("lerning_rate=1", "lerning_rate", "did you mean 'learning_rate'?"),
        ("max_steps=many", "max_steps", "'many' is not a whole number >= 1"),
        ("max_steps=0", "max_steps", "0 is not a whole number >= 1"),
        ("max_steps=1.5", "max_steps", "1.5 is not a whole number"),
        ("learning_rate=-1", "learning_rate", "-1 is not a number > 0"),
        ("learning_rate=.inf", "learning_rate", "inf is not a number"),
        ("learning_rate=.nan", "learning_rate", "nan is not a number"),
        ("optim=muno", "optim", "did you mean 'muon'?"),
        ("adam_betas=[0.9, 2]", "adam_betas.1", "2 is not"),
        ("tokenizer=bpe", "tokenizer", "'bpe' is not a group of keys (vocab_size, load)"),
        ("lr_scheduler_type=cosin", "lr_scheduler_type", "did you mean 'cosine'?"),
        ("warmup_steps=2000", "", "warmup_steps 2000 is more than max_steps 1000"),
        ("micro_batch_size=5", "", "micro_batch_size 5 must divide batch_size 32; the nearest below is 4"),
        ("tokenizer.vocab_size=10", "tokenizer.vocab_size", "10 is not a whole number >= 300 <= 1000000"),
        ("data.held_out=1", "data.held_out", "1 is not a number >= 0 < 0.5"),
        ("model.family=llama", "model", "exactly one of preset, family, load (preset and family given"),
        ("precision=fp8", "precision", "'fp8' is not one of auto, fp32, bf16"),
        ("compile=maybe", "compile", "is not true or false or one of auto"),
        ("max_time=soon", "max_time", "like 90s, 30m or 2h"),
        ("samples.prompts=hello", "samples.prompts", "'hello' is not a list (text)"),
        ("recipe=sft", "recipe", "'sft' is not one of pretrain"),
    ],
)
def test_a_wrong_setting_is_told_with_its_key_and_what_is_allowed(pair: str, path: str, said: str) -> None:
    lines = config_problems(GOOD, pair)
    places = (f"argument {pair!r}: {path}", f"my.yaml:2: {path}", "my.yaml: warmup_steps", "my.yaml: micro_batch_size")
    assert any(line.startswith(places) and said in line for line in lines), lines


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("rewards=[{name: my_rewards.py}]", "rewards.0.name: 'my_rewards.py' is not one of correct,"),
        ("rewards=[{name: corect}]", "did you mean 'correct'?"),
        ("rewards=[{name: correct, wieght: 2}]", "did you mean 'weight'?"),
        ("rewards=[{name: correct, weight: much}]", "rewards.0.weight: 'much' is not a number (factor"),
    ],
)
def test_a_wrong_setting_in_an_entry_of_a_list_is_told_by_what_the_entry_may_hold(pair: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(GrpoConfig, apply_overrides(read_yaml("recipe: grpo\n", "my.yaml"), [pair]))
    assert any(said in line for line in str(error.value).splitlines()), str(error.value)


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines() -> None:
    text = "recipe: pretrain\nstep: 10\nmodel:\n  preset: llama3.2-tiny\n"
    text += "batch_size: x\nsamples:\n  lenght: 8\nlearning_rate: 0\n"
    lines = config_problems(text)
    assert [line.split(": ")[:2] for line in lines] == [
        ["my.yaml:8", "learning_rate"],
        ["my.yaml:5", "batch_size"],
        ["my.yaml:7", "samples.lenght"],
        ["my.yaml:2", "step"],
    ]


def test_a_missing_key_is_told_with_what_it_takes() -> None:
    assert config_problems("recipe: pretrain") == [
        "my.yaml: model: missing; give a group of keys (preset, family, config, load)"
    ]


@pytest.mark.parametrize("name", ["pretrain", "tiny"])
def test_a_resolved_config_is_itself_a_valid_input(name: str, tmp_path: Path) -> None:
    config = parse_config(
        PretrainConfig, load_raw_config(name, ["learning_rate=1e-5", "samples.prompts=['no', '1e3', 'a: b', \"é\\n\"]"])
    )
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert parse_config(PretrainConfig, load_raw_config(str(tmp_path / "config.yaml"))) == config
    assert parse_config(PretrainConfig, load_raw_config(str(tmp_path))) == config


def test_differences_name_what_changed_but_for_what_is_free() -> None:
    config = parse_config(PretrainConfig, read_yaml(GOOD, "a"))
    other = parse_config(
        PretrainConfig,
        apply_overrides(read_yaml(GOOD, "b"), ["learning_rate=0.5", "device=cpu", "save_steps=7", "sequence_length=9"]),
    )
    assert config_differences(config, other, KEYS_FREE_ON_RESUME) == [
        "learning_rate: 0.001 -> 0.5",
        "sequence_length: 256 -> 9",
    ]


def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert {"pretrain", "tiny"} <= set(recipe_names())
    with pytest.raises(UsageError, match="did you mean 'pretrain'"):
        find_recipe_file("pretrian")
    with pytest.raises(UsageError, match=r"there is no file .*none\.yaml"):
        find_recipe_file(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("old", list(OLD_KEYS))
def test_every_old_key_is_an_error_that_names_the_new_one(old: str) -> None:
    pair = f"{old}=1"
    assert f"argument {pair!r}: {old} is now {OLD_KEYS[old]}" in config_problems(GOOD, pair)


def test_every_new_key_is_known_and_no_old_one_is() -> None:
    known = {
        name for name in recipe_names() for name in schema_keys(get_recipe(load_raw_config(name).tree["recipe"]).Config)
    }
    assert not known & set(OLD_KEYS), known & set(OLD_KEYS)
    new = {word for value in OLD_KEYS.values() for word in value.partition(" (")[0].replace(" and ", ", ").split(", ")}
    free = {key for key in new if key.startswith(("model.config.", "loss_kwargs.", "data.columns."))}
    assert new - free <= known, new - free - known


def schema_keys(schema: type[StrictModel], before: str = "") -> set[str]:
    """Every key of a schema, groups included."""
    found = set()
    for name, field in schema.model_fields.items():
        found.add(before + name)
        inner = [part for one in (field.annotation, *get_args(field.annotation)) if (part := nested_schema(one))]
        for part in inner:
            found |= schema_keys(part, f"{before}{name}.")
    return found


def test_every_key_of_an_old_group_is_told_with_its_line() -> None:
    assert config_problems(GOOD + "optimizer:\n  name: muon\n  lr: 1e-3\nkl: null\n") == [
        "my.yaml:5: optimizer.name is now optim",
        "my.yaml:6: optimizer.lr is now learning_rate",
        "my.yaml:7: kl is now kl_coef",
    ]


def test_a_value_of_another_name_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match=r"data\.source: scenes is now synthetic_shapes"):
        parse_config(VlmConfig, apply_overrides(load_raw_config("vlm"), ["data.source=scenes"]))


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(GOOD + "optimizer: {lr: 1e-3}\nsteps: 3\n")
    with pytest.raises(
        UsageError, match=r"cannot be resumed: start a new run from its weights with model.load="
    ) as error:
        parse_config(PretrainConfig, load_raw_config(str(tmp_path / "run")))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("run", "schema"), [("pretrain", PretrainConfig), ("vit", VitConfig), ("grpo", GrpoConfig)])
def test_what_a_run_of_an_earlier_version_was_trained_on_is_read(run: str, schema: type[StrictModel]) -> None:
    folder = Path(__file__).parents[1] / "data" / "v1" / "runs" / run
    old, new = read_yaml_file(folder / "config.yaml").tree, parse_config(schema, load_run_config(folder))
    assert new.model_dump()["max_steps"] == old["steps"]
    assert new.model_dump()["learning_rate"] == old["optimizer"]["lr"]


@pytest.mark.parametrize(
    ("name", "command"),
    [("orpo", "dpo loss_type=orpo"), ("SimPO", "dpo loss_type=simpo"), ("ppo", "grpo loss_type=ppo"),
     ("rloo", "grpo advantage_estimator=leave_one_out"), ("lora", "sft techniques='[lora]'"), ("rm", "reward")],
)  # fmt: skip
def test_a_method_that_other_programs_have_a_trainer_for_is_told_with_its_command(name: str, command: str) -> None:
    """And not with the recipe whose name looks alike: orpo is no grpo. The command is one that is read."""
    with pytest.raises(UsageError, match=re.escape(f"that method is quest train {command}")):
        load_raw_config(name)
    recipe, *pairs = shlex.split(command)
    settings = load_raw_config(recipe, pairs)
    parse_config(get_recipe(recipe).Config, settings)


def test_every_method_of_the_table_is_a_command_that_is_read() -> None:
    for command in METHODS.values():
        recipe, *pairs = shlex.split(command)
        parse_config(get_recipe(recipe).Config, load_raw_config(recipe, pairs))


def test_a_missing_space_behind_a_colon_is_told() -> None:
    settings = load_raw_config("grpo", ["rewards=[{name:model}]"])
    with pytest.raises(UsageError, match="a space is missing behind its colon: name: model"):
        parse_config(get_recipe("grpo").Config, settings)


def test_a_path_of_images_is_a_folder() -> None:
    assert load_raw_config("vit", ["data.path=a"]).tree["data"]["source"] == "folder"
    assert load_raw_config("vit", ["data.path=a", "data.source=cifar10"]).tree["data"]["source"] == "cifar10"


def test_what_is_changed_in_settings_is_not_in_those_of_the_next_reader():
    """A text is parsed once in a process."""
    first = read_yaml("a: {b: [1, 2]}\nc: 1\na: 2", "x.yaml")
    assert first.problems
    first = read_yaml("a: {b: [1, 2]}", "x.yaml")
    first.tree["a"]["b"].append(3)
    first.locations.clear()
    first.problems.append(ConfigProblem("x", "", "y"))
    again = read_yaml("a: {b: [1, 2]}", "x.yaml")
    assert again.tree == {"a": {"b": [1, 2]}}
    assert again.location(("a", "b", "1")) == "x.yaml:1"
    assert not again.problems
    assert read_yaml("a: {b: [1, 2]}", "y.yaml").location(("a",)) == "y.yaml:1"
