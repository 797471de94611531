"""A resumed run is refused where something that decides its numbers is not what it was, and can accept it by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from llm_quest.data.chat import ChatTemplate
from llm_quest.errors import BusyError
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.manifest import describe_changes
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.config_schema import ModelConfig
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.environment_setup import environment_hashes
from llm_quest.recipes.grpo import GrpoConfig
from llm_quest.recipes.policy_prompts import PromptEncoder, problems_of_task
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.reward_specs import RewardSpec
from llm_quest.recipes.run_folder import (
    READ_AS_ROWS,
    fingerprint_parts,
    fingerprint_path,
    init_run_dir,
    iter_paths,
    run_identity,
    without_paths,
)
from llm_quest.recipes.schema import StrictModel, is_local_path
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.rollouts.included_environments import PARAGRAPHS
from tests.recipes.every_recipe import COMMON as RECIPE_COMMON
from tests.recipes.every_recipe import TEXTS, prepare
from tests.recipes.test_grpo import RECIPE as GRPO
from tests.recipes.tuned import COMMON, base, planning_context, write_rows

ROWS = [
    {"messages": [{"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": f"{n} {n + 1}"}]}
    for n in range(40)
]
SFT = """
recipe: sft
batch_size: 4
sequence_length: 40
max_steps: 4
save_steps: 2
"""

CHAT = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"


def train(out: Path, *pairs: str, text: str = SFT, accept: tuple[str, ...] = ()):
    settings = apply_overrides(read_yaml(text + COMMON, "recipe.yaml"), list(pairs))
    recipe = get_recipe("sft")
    config = parse_config(recipe.Config, settings)
    return run_recipe(recipe, config, settings, out, quiet=True, accept=accept, log=lambda line: None)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[str], Path]:
    """A finished run of four steps without its last checkpoint, its settings, and the model it began from."""
    model, out = base(tmp_path / "model"), tmp_path / "run"
    pairs = [f"model.load={model}", f"data.source={write_rows(tmp_path / 'rows.jsonl', ROWS)}"]
    train(out, *pairs)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    return out, pairs, model


def change_weights(model: Path) -> None:
    file = model / "model.safetensors"
    save_file({name: t + torch.rand_like(t) * 1e-3 for name, t in load_file(file).items()}, file)


def test_a_run_whose_base_model_changed_is_refused_and_accepts_it_by_name(run):
    out, pairs, model = run
    change_weights(model)
    with pytest.raises(BusyError, match=r"its model\.load differs(.|\n)*--accept model\.load"):
        train(out, *pairs)
    assert train(out, *pairs, accept=("model.load",)).step == 4
    assert "changed since the checkpoint: model.load" in (out / "events.jsonl").read_text()


def test_settings_that_were_edited_by_hand_are_named(run):
    out, pairs, _ = run
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("adam_epsilon: 1.0e-08", "adam_epsilon: 1.0e-06"))
    assert "1.0e-06" in config.read_text()
    with pytest.raises(
        BusyError, match=r"its settings \(adam_epsilon: 1e-08 -> 1e-06\) differs(.|\n)*--accept settings"
    ):
        train(out, *pairs, "adam_epsilon=1e-6")
    assert train(out, *pairs, "adam_epsilon=1e-6", accept=("settings",)).step == 4


def test_a_run_and_its_model_may_be_moved(run):
    out, pairs, model = run
    moved = model.with_name("moved")
    model.rename(moved)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(moved)))
    assert train(out, pairs[1], f"model.load={moved}").step == 4


def test_what_is_free_on_resume_is_free(run):
    out, pairs, _ = run
    assert train(out, *pairs, "save_steps=3", "logging_steps=1").step == 4


def iter_models(annotation: Any) -> Iterator[type[StrictModel]]:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from iter_models(field.annotation)
    for part in get_args(annotation):
        yield from iter_models(part)


PATH_FIELDS = sorted(
    {
        (model.__name__, name): model
        for recipe in RECIPES
        for model in iter_models(get_recipe(recipe).Config)
        for name, field in model.model_fields.items()
        if is_local_path(field)
    }.items()
)
COMPARED_BY_THE_RECIPE = {
    "source": "rows", "path": "rows or images", "validation": "rows or images", "function": "reward_file_hashes",
    "prompt": "reward_file_hashes", "judge": "its URL is a setting", "model": "a judge's model is a setting",
    "environment": "environment_hashes", "task": "PromptEncoder.identity",
}  # fmt: skip
"""Keys of text that name a file, a folder or a URL and are no LocalPath -> what compares them."""


def make_unchecked(kind: type[StrictModel], **values: Any) -> Any:
    """A config whose required keys are null where they are not given."""
    required = {name: None for name, one in kind.model_fields.items() if one.is_required()}
    return kind.model_construct(**required | values)


@pytest.mark.parametrize(("where", "model"), PATH_FIELDS, ids=lambda one: ".".join(one) if type(one) is tuple else "")
def test_every_file_or_folder_that_a_recipe_names_is_compared_by_content(where, model, tmp_path: Path):
    """A law over the schema: a new key of the type LocalPath is found by its type."""
    file = tmp_path / "file"
    file.write_text("before")
    made = make_unchecked(model, **{where[1]: str(file)})
    if where[1] in READ_AS_ROWS:
        assert where[1] in COMPARED_BY_THE_RECIPE
        return
    ((name, path),) = iter_paths(made)
    before = dict(fingerprint_parts(path))
    file.write_text("after!")
    assert name == where[1]
    assert dict(fingerprint_parts(path)) != before
    assert where[1] not in without_paths(made, made.model_dump(mode="json", warnings=False))


def test_a_text_that_names_a_file_has_the_type_of_one():
    known = {"load", "chat_template_path", "process_reward_model", "proxy_model", "rpt_run", "path"}
    assert known <= {name for (_, name), _ in PATH_FIELDS}
    said = re.compile(r"\b(file|folder|FILE|FOLDER|http)\b")
    models = {model for recipe in RECIPES for model in iter_models(get_recipe(recipe).Config)}
    found = {
        name: field
        for model in models
        for name, field in model.model_fields.items()
        if said.search(field.description or "") and "str" in str(field.annotation) and not is_local_path(field)
    }
    assert set(found) - set(COMPARED_BY_THE_RECIPE) <= {"separator", "columns", "split"}


def test_paths_are_found_wherever_they_are_and_keys_of_ones_own_are_settings():
    """An environment's option that is called path or load is a setting like any other."""
    config = make_unchecked(
        GrpoConfig,
        model=ModelConfig(load="a"), rewards=(RewardSpec(name="correct"), RewardSpec(name="model", load="b")),
        environment_kwargs={"path": "c", "load": "d"},
    )  # fmt: skip
    assert dict(iter_paths(config)) == {"model.load": "a", "rewards.1.load": "b"}
    tree = without_paths(config, config.model_dump(mode="json", warnings=False))
    assert tree["environment_kwargs"] == {"path": "c", "load": "d"}
    assert "load" not in tree["model"]


def find_changes(name: str, change: Callable[[], object]) -> set[str]:
    """Which parts of a fingerprint a change of the files changes."""
    before = dict(fingerprint_parts(name))
    change()
    after = dict(fingerprint_parts(name))
    return {part for part in before | after if before.get(part) != after.get(part)}


def test_a_model_is_compared_by_weights_and_files_whatever_it_is_called(run, monkeypatch: pytest.MonkeyPatch):
    """A folder, a run, RUN@last, an adapter with its base, and what the hub's cache holds under a hub id."""
    out, _, model = run
    assert find_changes(str(model), lambda: None) == set()
    assert find_changes(str(model), lambda: change_weights(model)) == {""}
    ends = model / "generation_config.json"
    assert find_changes(str(model), lambda: ends.write_text('{"eos_token_id": [1, 2]}')) == {".files"}
    newest = out / "checkpoints" / "step-00000002"
    assert (
        {dict(fingerprint_parts(f"{out}{at}"))[""] for at in ("", "@last", "@2")} == {fingerprint_path(newest)} != {""}
    )
    adapter = model.with_name("adapter")
    adapter.mkdir()
    said = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    assert find_changes(str(adapter), lambda: change_weights(model)) == {".base"}
    snapshot = model.with_name("models--some--model") / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(model.parent))
    assert dict(fingerprint_parts("some/model"))[""] == fingerprint_path(model)
    assert find_changes("some/model", lambda: change_weights(snapshot)) == {""}
    assert dict(fingerprint_parts("some/other-model")) == {"": "", ".files": ""}


HELD_OUT = [
    name for name in TEXTS if "/pairs.jsonl" in TEXTS[name] or re.search(r"source: FOLDER/\w+\.jsonl", TEXTS[name])
]


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    prepare(folder)
    return folder


@pytest.mark.parametrize("recipe", HELD_OUT)
def test_held_out_rows_that_change_are_noticed(recipe: str, beginnings: Path, tmp_path: Path):
    """What a run is evaluated on, and its best checkpoint chosen by, lies in a file of its own here."""
    rows = re.search(r"source: (FOLDER/\w+\.jsonl)", TEXTS[recipe])
    assert rows is not None
    source = Path(rows[1].replace("FOLDER", str(beginnings)))
    held_out = tmp_path / "held_out.jsonl"
    lines = source.read_text().splitlines()

    def identity(chosen: list[str]) -> dict[str, str]:
        held_out.write_text("\n".join(chosen))
        text = f"recipe: {recipe}\n{RECIPE_COMMON}{TEXTS[recipe]}".replace("FOLDER", str(beginnings))
        settings = apply_overrides(read_yaml(text, "recipe.yaml"), [f"data.validation={held_out}"])
        made = get_recipe(recipe)
        return dict(made.build(parse_config(made.Config, settings), planning_context(tmp_path)).identity)

    before = identity(lines[:9])
    assert before == identity(lines[:9])
    after = identity(lines[9:18])
    assert {name for name in before if before[name] != after[name]} & {"held_out", "documents"}


def test_problems_of_a_file_a_chat_template_and_a_folder_that_is_searched_are_compared_by_content(tmp_path: Path):
    file, tokenizer = tmp_path / "gsm.jsonl", load_tokenizer(base(tmp_path / "model"))

    def prompts(answer: int, template: str) -> dict[str, str]:
        rows = [{"question": f"question {n}", "answer": f"so #### {answer}"} for n in range(90)]
        problems = problems_of_task(str(write_rows(file, rows)), "", "strict", 5, 0)
        tokenizer.chat_template = template
        return PromptEncoder(tokenizer, ChatTemplate(tokenizer)).identity(problems)

    first, other_rows, other_template = (prompts(*one) for one in ((1, CHAT), (2, CHAT), (1, CHAT + "!")))
    assert {name for name in first if first[name] != other_rows[name]} == {"problems"}
    assert {name for name in first if first[name] != other_template[name]} == {"chat_template"}
    (tmp_path / "notes.md").write_text("red")
    before = environment_hashes("file_search", {"folder": str(tmp_path)})
    PARAGRAPHS.clear()  # as another process finds them
    assert environment_hashes("file_search", {"folder": str(tmp_path)}) == before
    (tmp_path / "notes.md").write_text("blue")
    PARAGRAPHS.clear()
    assert environment_hashes("file_search", {"folder": str(tmp_path)}) != before


def test_a_run_that_has_got_no_further_than_its_warm_up_keeps_its_settings(tmp_path: Path):
    """A warm-up that began with other settings is not gone on with, unless it is accepted; while it trains, no second
    command replaces its config."""

    def begin(rate: str, accept: tuple[str, ...] = ()) -> None:
        settings = apply_overrides(read_yaml(GRPO, "recipe.yaml"), [f"learning_rate={rate}"])
        context = replace(planning_context(tmp_path / "run"), accept=accept)
        init_run_dir(parse_config(GrpoConfig, settings), context)

    begin("1e-3")
    begin("2e-3")
    (tmp_path / "run" / "warmup").mkdir()
    with FileLock(tmp_path / "run" / "warmup" / "run.lock"), pytest.raises(BusyError, match="warmup is in use by"):
        begin("3e-3")
    assert "learning_rate: 0.002" in (tmp_path / "run" / "config.yaml").read_text(), "that of the run that trains"
    checkpoint = tmp_path / "run" / "warmup" / "checkpoints" / "step-00000025"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")
    with pytest.raises(BusyError, match=r"other settings \(learning_rate: 0.002 -> 0.001\)"):
        begin("1e-3")
    begin("1e-3", ("settings",))
    begin("1e-3")


def test_a_group_that_is_added_or_taken_away_is_a_change_and_a_key_of_another_version_is_none():
    def change_messages(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        return list(describe_changes({"settings": json.dumps(before)}, {"settings": json.dumps(after)}).values())

    assert change_messages({"a": 1, "teacher": None}, {"a": 1, "teacher.load": "x", "teacher.beta": 1}) == [
        "settings (teacher: None -> 'a group of keys')"
    ]
    assert change_messages({"e": {}, "c.d": 1}, {"e.x": 1, "c": {}}) == [
        "settings (c: 'a group of keys' -> {}; e: {} -> 'a group of keys')"
    ]
    assert change_messages({"a": 1, "old": 2, "g.old": 1}, {"a": 1, "new": 3, "g.new": 2}) == []
    assert describe_changes({"tokenizer": "a", "reward score": "b"}, {"tokenizer": "a", "data": "c"}) == {
        "reward score": "reward score (there is none now)"
    }


def test_settings_hold_everything_but_what_is_free():
    config = parse_config(
        get_recipe("sft").Config, read_yaml(SFT + COMMON + "model: {load: nowhere}\ndata: {source: x}", "r")
    )
    settings = json.loads(run_identity(config)["settings"])
    assert {"learning_rate", "seed", "model.preset"} <= set(settings)
    assert not {"save_steps", "max_steps", "threads", "model.load", "data.source"} & set(settings)
