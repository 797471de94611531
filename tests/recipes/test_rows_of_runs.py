"""Rows in the runs of every recipe: what is not used is told once and kept in data.json, and what a run records does
not depend on the working directory or on a cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from pydantic.fields import FieldInfo

from llm_quest.errors import DataError, UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import load_run_config, nested_schema, parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.held_out import evaluate_run
from llm_quest.recipes.planning import open_job
from llm_quest.recipes.recipe import Job, get_recipe, load_recipe
from llm_quest.recipes.row_source import RowsConfig
from llm_quest.recipes.schema import LocalPath, StrictModel
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from tests.recipes.every_recipe import COMMON, TEXTS, prepare
from tests.recipes.tuned import WORDS, write_rows

ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "pretrain": lambda one, two: {"text": f"say {one} user {two}\n" * 9},
    "rpt": lambda one, two: {"text": f"say {one} {two} user dog"},
    "sft": lambda one, two: {"prompt": f"say {one} {two}", "completion": one},
    "reward": lambda one, two: {"prompt": f"say {one} {two}", "chosen": one, "rejected": two},
    "dpo": lambda one, two: {"prompt": f"say {one} {two}", "chosen": one, "rejected": two},
    "kto": lambda one, two: {"prompt": f"say {one} {two}", "completion": one, "label": one < two},
    "gkd": lambda one, two: {"prompt": f"say {one} {two}", "completion": one},
    "prm": lambda one, two: {"prompt": f"say {one} {two}", "completions": [one, two], "labels": [True, one < two]},
    "classify": lambda one, two: {"text": f"say {one} {two}", "label": str(one > two)},
    "vlm": lambda one, two: {"image": f"{WORDS.index(one)}.png", "question": f"{two}?", "answer": one},
}
"""A row of each recipe that reads rows into examples; those of GRPO give every key to the rewards."""
BAD = ["{", json.dumps({"surprise": 1})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    prepare(folder)
    random = np.random.default_rng(0)
    for number in range(len(WORDS)):
        Image.fromarray(random.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    for name, make in ROWS.items():
        rows = [make(one, two) | {"id": 7} for one in WORDS for two in WORDS if one != two]
        good = [json.dumps(row) for row in rows]
        (folder / f"{name}-rows.jsonl").write_text("\n".join([*good[:3], *BAD, *good[3:]]), encoding="utf-8")
    return folder


def build(name: str, folder: Path, *pairs: str) -> tuple[Mapping[str, Any], list[str]]:
    """The facts of a job that is built and not run, and what it says."""
    text = f"recipe: {name}\n{COMMON}{TEXTS[name]}".replace("FOLDER", str(folder))
    settings = apply_overrides(read_yaml(text, "a.yaml"), [f"data.source={folder}/{name}-rows.jsonl", *pairs])
    recipe, said = get_recipe(name), list[str]()
    (folder / "planned").mkdir(exist_ok=True)
    config = parse_config(recipe.Config, settings)
    with open_job(recipe, config, settings, said.append, folder / "planned") as job:
        facts: Job = job
        return facts.facts, said


def row_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run's data.json keeps about its rows; of documents it stands in the report of their corpus."""
    found: Mapping[str, Any] = facts.get("corpus", {}).get("drop_report", facts)
    return found


def test_every_recipe_that_reads_rows_is_tried() -> None:
    """Of the others, grpo has rows of its own tests, rpt_control reads the run of rpt, iterative its tasks."""
    reads = {name for name in RECIPES if has_rows(get_recipe(name).Config)}
    assert reads - {"grpo", "iterative", "rpt_control"} == set(ROWS)


def has_rows(schema: type[StrictModel]) -> bool:
    field = schema.model_fields.get("data")
    inner = [nested_schema(part) for part in (field.annotation, *get_args(field.annotation))] if field else []
    return any(issubclass(one, RowsConfig) for one in inner if one is not None)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_bad_rows_and_unread_keys_are_told_once_and_kept(name: str, folder: Path) -> None:
    facts, said = build(name, folder)
    found = row_facts(facts)
    assert found["skipped"]["rows"] == 2, facts
    assert set(found["skipped"]["kinds"]) == {"not JSON", "no known form"}
    assert found["unused_keys"]["id"] == len(WORDS) * (len(WORDS) - 1)
    assert [re.search(r"rows\.jsonl:\d+", one)[0] for one in found["skipped"]["first"]] == [  # type: ignore[index]
        "rows.jsonl:4", "rows.jsonl:5",
    ]  # fmt: skip
    assert sum("skipped: 2 rows cannot be used" in line for line in said) == 1
    assert sum(f"id ({len(WORDS) * (len(WORDS) - 1)})" in line for line in said) == 1


@pytest.mark.parametrize("name", sorted(ROWS))
def test_strict_stops_with_all_rows(name: str, folder: Path) -> None:
    with pytest.raises(DataError) as error:
        build(name, folder, "data.strict=true")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "2 rows cannot be used (1 x not JSON, 1 x no known form)" in lines[0]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_columns_are_mapped_and_mistakes_name_what_there_is(name: str, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / f"{name}-rows.jsonl").read_text().split("\n") if "id" in line]
    key = "question" if name == "vlm" else next(iter(rows[0]))
    for row in rows:
        row["other"] = row.pop(key)
    source = write_rows((folder if name == "vlm" else tmp_path) / f"{name}-other.jsonl", rows)
    facts, _ = build(name, folder, f"data.source={source}", f"data.columns={{{key}: other}}")
    found = row_facts(facts)
    assert found["skipped"]["rows"] == 0
    with pytest.raises(DataError, match=r"other\.jsonl:1: has no column 'nothing' .*'other'"):
        build(name, folder, f"data.source={source}", f"data.columns={{{key}: nothing}}")
    with pytest.raises(UsageError, match=r"data\.columns: no form of row has a key 'nothing'.*known: "):
        build(name, folder, f"data.source={source}", "data.columns={nothing: other}")


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "classify"])
def test_too_few_rows_are_told_with_those_that_were_skipped(name: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a", "label": "x"} if name == "pretrain" else ROWS[name]("cat", "dog")) + "\n{")
    with pytest.raises(
        DataError, match=r"\n1 row cannot be used \(1 x not JSON\), first: .*rows\.jsonl:2: is not JSON"
    ):
        build(name, folder, f"data.source={file}")


def test_bad_rows_of_validation_are_told_too(folder: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"text": "say cat user dog\n" * 9}, {"body": "x"}])
    _, said = build("pretrain", folder, f"data.source={folder}/text.jsonl", f"data.validation={held}")
    assert any("data.validation: skipped: 1 row cannot be used" in line for line in said)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "classify"])
def test_a_weight_of_two_shows_each_row_twice_and_holds_out_no_more(name: str, folder: Path, tmp_path: Path) -> None:
    source = folder / f"{name}-rows.jsonl"
    once, _ = build(name, folder)
    twice, _ = build(name, folder, f"data.source=[{{path: {source}, weight: 2}}]")
    key = "train_rows"
    assert twice["held_out_rows"] == once["held_out_rows"]
    assert twice[key] == 2 * once[key]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("5", "5 is no source: name a file"),
        ("[]", r"\[\] is no source"),
        ("[{path: a.jsonl, weight: 0}]", "weight: .*greater than 0"),
        ("[{file: a.jsonl}]", "a source has the keys path, weight, name, split"),
    ],
)
def test_a_source_of_another_kind_is_told_in_words(value: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"data\.source: .*{said}") as error:
        load_recipe("sft", ["model.load=x", f"data.source={value}"])
    assert len(str(error.value).splitlines()) == 1


PATH_NAMES = re.compile(r"load|path|rpt_run|proxy_model|.*_path")


def path_fields(schema: type[StrictModel], before: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every key that names a file, a folder or a model, groups included."""
    for name, field in schema.model_fields.items():
        if PATH_NAMES.fullmatch(name):
            yield before + name, field
        for part in (field.annotation, *get_args(field.annotation)):
            if (inner := nested_schema(part)) is not None:
                yield from path_fields(inner, f"{before}{name}.")


def holds_absolute_path(field: FieldInfo) -> bool:
    validator = LocalPath.__metadata__[0]
    return validator in field.metadata or "absolute" in f"{field.metadata}{field.annotation}"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_key_that_names_a_file_keeps_its_absolute_path(name: str) -> None:
    fields = dict(path_fields(get_recipe(name).Config, ""))
    assert fields
    assert not [key for key, field in fields.items() if not holds_absolute_path(field)]


def start(folder: Path, out: Path, *pairs: str) -> None:
    """An sft run of names that are relative to the working directory."""
    text = f"recipe: sft\n{COMMON}{TEXTS['sft']}".replace("FOLDER/", "")
    settings = apply_overrides(read_yaml(text, "a.yaml"), ["data.source=sft-rows.jsonl", *pairs])
    recipe = get_recipe("sft")
    run_recipe(recipe, parse_config(recipe.Config, settings), settings, out, quiet=True, log=lambda line: None)


def test_a_run_is_resumed_and_evaluated_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    start(folder, tmp_path / "run", "max_steps=1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = load_run_config(tmp_path / "run")
    assert settings.tree["data"]["source"] == str(folder / "sft-rows.jsonl")
    assert settings.tree["model"]["load"] == str(folder / "base")
    recipe = get_recipe("sft")
    outcome = run_recipe(
        recipe, parse_config(recipe.Config, settings), settings, tmp_path / "run", quiet=True, log=lambda line: None
    )
    assert (outcome.status, outcome.step) == ("finished", 1)
    assert evaluate_run(str(tmp_path / "run"), log=lambda line: None).scores


def test_tokens_from_the_cache_bring_no_other_sources_name_into_a_run(folder: Path, tmp_path: Path) -> None:
    """Two files with the same texts share their tokens; each run names its own file and what it dropped."""
    texts = [{"text": f"say {one} user {two}\n" * 9} for one in WORDS for two in WORDS]
    first = write_rows(tmp_path / "first.jsonl", texts)
    second = write_rows(tmp_path / "second.jsonl", [*texts, {"text": " "}, {"body": "x"}])
    names, folders = [], []
    for source in (first, second):
        facts, _ = build("pretrain", folder, f"data.source={source}")
        found = row_facts(facts)
        names.append((facts["corpus"]["name"], found["skipped"]["rows"], len(found["dropped"])))
        folders.append(facts["folder"])
    assert folders[0] == folders[1]
    assert names == [(str(first), 0, 0), (str(second), 1, 1)]
