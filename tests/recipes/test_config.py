"""Every mistake in a recipe is told, all at once, with its place, what is allowed and the nearest known name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quest.errors import UsageError
from llm_quest.recipes.config import (
    config_differences,
    config_to_yaml,
    find_recipe_file,
    load_raw_config,
    parse_config,
    recipe_names,
)
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME
from llm_quest.recipes.pretrain_config import PretrainConfig
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml

GOOD = "recipe: pretrain\nmodel:\n  preset: llama3.2-tiny\n"


def told(text: str, *pairs: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        parse_config(PretrainConfig, apply_overrides(read_yaml(text, "my.yaml"), pairs))
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("pair", "path", "said"),
    [
        ("optimizer.lrr=1", "optimizer.lrr", "did you mean 'lr'?; allowed here: name, lr,"),
        ("optimzer.lr=1", "optimzer", "did you mean 'optimizer'?"),
        ("steps=many", "steps", "'many' is not a whole number >= 1"),
        ("steps=0", "steps", "0 is not a whole number >= 1"),
        ("steps=1.5", "steps", "1.5 is not a whole number"),
        ("optimizer.lr=-1", "optimizer.lr", "-1 is not a number > 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "inf is not a number"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan is not a number"),
        ("optimizer.name=muno", "optimizer.name", "'muno' is not one of adamw, muon, did you mean 'muon'?"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1", "2 is not"),
        ("optimizer=adamw", "optimizer", "'adamw' is not a group of keys (name, lr,"),
        ("schedule.shape=cosin", "schedule.shape", "did you mean 'cosine'?"),
        ("schedule.warmup=2000", "", "schedule.warmup 2000 is longer than the run of 1000 steps"),
        ("batch={rows: 10, micro_rows: 4}", "batch", "micro_rows 4 must divide rows 10; the nearest below is 2"),
        ("tokenizer.vocab=10", "tokenizer.vocab", "10 is not a whole number >= 300 <= 1000000"),
        ("data.held_out=1", "data.held_out", "1 is not a number > 0 < 0.5"),
        ("model.page=llama", "model", "exactly one of preset, page, load (preset and page given"),
        ("precision=fp8", "precision", "'fp8' is not one of auto, fp32, bf16"),
        ("compile=maybe", "compile", "is not true or false or one of auto"),
        ("max_time=soon", "max_time", "like 90s, 30m or 2h"),
        ("samples.prompts=hello", "samples.prompts", "'hello' is not a list (text)"),
        ("recipe=sft", "recipe", "'sft' is not one of pretrain"),
    ],
)
def test_a_wrong_setting_is_told_with_its_key_and_what_is_allowed(pair: str, path: str, said: str) -> None:
    lines = told(GOOD, pair)
    places = (f"argument {pair!r}: {path}", f"my.yaml:2: {path}", "my.yaml: schedule.warmup")
    assert any(line.startswith(places) and said in line for line in lines), lines


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines() -> None:
    text = "recipe: pretrain\nstep: 10\nmodel:\n  preset: llama3.2-tiny\n"
    text += "batch:\n  rows: x\n  lenght: 8\noptimizer: {lr: 0}\n"
    lines = told(text)
    assert [line.split(": ")[:2] for line in lines] == [
        ["my.yaml:8", "optimizer.lr"],
        ["my.yaml:6", "batch.rows"],
        ["my.yaml:7", "batch.lenght"],
        ["my.yaml:2", "step"],
    ]


def test_a_missing_key_is_told_with_what_it_takes() -> None:
    assert told("recipe: pretrain") == ["my.yaml: model: missing; give a group of keys (preset, page, sizes, load)"]


@pytest.mark.parametrize("name", ["pretrain", "tiny"])
def test_a_resolved_config_is_itself_a_valid_input(name: str, tmp_path: Path) -> None:
    config = parse_config(
        PretrainConfig, load_raw_config(name, ["optimizer.lr=1e-5", "samples.prompts=['no', '1e3', 'a: b', \"é\\n\"]"])
    )
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert parse_config(PretrainConfig, load_raw_config(str(tmp_path / "config.yaml"))) == config
    assert parse_config(PretrainConfig, load_raw_config(str(tmp_path))) == config


def test_differences_name_what_changed_but_for_what_is_free() -> None:
    config = parse_config(PretrainConfig, read_yaml(GOOD, "a"))
    other = parse_config(
        PretrainConfig,
        apply_overrides(
            read_yaml(GOOD, "b"), ["optimizer.lr=0.5", "device=cpu", "checkpoint.every=7", "batch.length=9"]
        ),
    )
    assert config_differences(config, other, KEYS_FREE_ON_RESUME) == [
        "optimizer.lr: 0.001 -> 0.5",
        "batch.length: 256 -> 9",
    ]


def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert {"pretrain", "tiny"} <= set(recipe_names())
    with pytest.raises(UsageError, match="did you mean 'pretrain'"):
        find_recipe_file("pretrian")
    with pytest.raises(UsageError, match=r"there is no file .*none\.yaml"):
        find_recipe_file(str(tmp_path / "none.yaml"))
