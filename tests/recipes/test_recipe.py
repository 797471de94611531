"""The contract of a recipe: one of your own costs one file and one line, and trains, resumes and reports like those
of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quest.cli.inspect_batch import load_batch_view
from llm_quest.cli.train import estimate_cost, start_training
from llm_quest.errors import UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.recipe import Recipe, get_recipe, load_recipe
from llm_quest.recipes.settings_reference import make_page

OWN_RECIPE = '''
"""A copying recipe: the model learns to repeat the second token."""

from typing import Literal

import torch
from pydantic import model_validator

from llm_quest.data.batch import TokenBatch
from llm_quest.data.vocabulary import train_bpe
from llm_quest.models.build import build, preset
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.auto import resolve_auto
from llm_quest.recipes.config_schema import BatchedConfig
from llm_quest.recipes.recipe import Job, Recipe
from llm_quest.train.rng_state import derive_seed


class CopyConfig(BatchedConfig):
    recipe: Literal["copy"]
    length: int = 8
    repeats: int = 8

    @model_validator(mode="after")
    def check_length(self):
        if self.repeats > self.length:
            raise ValueError(f"repeats {self.repeats} is more than length {self.length}; lower it")
        return self


class CopyLoader:
    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def batches(self, step):
        tokens = torch.full((self.rows, self.length), 5 + step % 3)
        return [TokenBatch(tokens, tokens.clone())]

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def build_copy(config, context):
    config = resolve_auto(config, context)
    model = build(preset("llama3.2-tiny").config, seed=derive_seed(config.seed, "init"))
    loader = CopyLoader(config.batch_size, config.length)
    tokenizer = train_bpe(["a b c"], 280)
    return Job(config, NextTokenLoss(model), loader, [], {"tokenizer": tokenizer.hash}, {"source": "copies"}, tokenizer)


RECIPE = Recipe("copy", CopyConfig, build_copy)
'''


@pytest.fixture
def copy_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy_recipe_of_a_test.py").write_text(OWN_RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(RECIPES, "copy", "copy_recipe_of_a_test")  # the one line


@pytest.mark.usefixtures("copy_recipe")
def test_a_recipe_of_ones_own_costs_one_file_and_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    pairs = ["max_steps=6", "warmup_steps=1", "batch_size=4", "device=cpu", "logging_steps=1"]
    outcome = start_training("copy", pairs, out=tmp_path / "run", quiet=True, log=said.append)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert outcome.status == "finished"
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "report.html").is_file()
    assert start_training(str(tmp_path / "run"), [], out=None, quiet=True, log=said.append).step == 6, "it resumes"
    assert "precision: auto" not in (tmp_path / "run" / "config.yaml").read_text(), "the written config is resolved"
    view = load_batch_view("copy", pairs, step=0, rows=1, log=said.append)
    assert (view.rows, view.length) == (1, 8)
    cost = estimate_cost("copy", pairs, measure=False, log=said.append)
    assert cost.units_per_step == 4 * 8
    assert "repeats" in "\n".join(make_page("copy").lines())


def test_rows_of_a_recipe_without_a_tokenizer_cannot_be_shown_and_the_message_says_what_to_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OWN_RECIPE.replace('{"source": "copies"}, tokenizer)', '{"source": "copies"})')
    (tmp_path / "untold_recipe_of_a_test.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(RECIPES, "copy", "untold_recipe_of_a_test")
    with pytest.raises(UsageError, match="copy has no tokenizer to show its tokens with; give its Job one"):
        load_batch_view("copy", ["device=cpu"], step=0, rows=1, log=print)


@pytest.mark.usefixtures("copy_recipe")
def test_a_dry_run_tells_all_mistakes_of_ones_own_recipe_and_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError) as error:
            start_training(
                "copy", ["lenght=4", "max_steps=0"], out=tmp_path / "run", dry_run=dry_run, quiet=True, log=print
            )
        told = str(error.value).splitlines()
        assert len(told) == 2
        assert "lenght: unknown key, did you mean 'length'?" in told[1]
        with pytest.raises(UsageError, match="repeats 9 is more than length 8"):
            start_training("copy", ["repeats=9"], out=tmp_path / "run", dry_run=dry_run, quiet=True, log=print)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_of_the_table_is_one_of_that_name(name: str) -> None:
    recipe = get_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.Config.model_fields["recipe"].annotation.__args__ == (name,)
    assert load_recipe(name, [])[0] is recipe
