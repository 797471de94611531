"""Reinforcement pre-training and its control, tiny: files, bits, bills and mistakes."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
from pathlib import Path

import pytest

from llm_quest.data.problems import parse_task
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.rpt.control import RptControlConfig
from llm_quest.recipes.rpt.documents import RptDocuments, encode_problem, split_problems, unique_problems
from llm_quest.recipes.rpt.positions import find_or_load_positions, select_positions
from llm_quest.recipes.rpt.prompts import Position, make_prompt_builder
from llm_quest.recipes.rpt.recipe import RptConfig, position_question
from llm_quest.recipes.rpt.start_model import reasoning_tokenizer
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from tests.recipes.tuned import metrics, weights

RECIPE = """
recipe: rpt
data: {source: "registers:longest=2", num_documents: 400}
model:
  family: llama
  config:
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 2
    intermediate_size: 64
warmup:
  pretrain: {max_steps: 10, batch_size: 16, learning_rate: 5e-3}
  sft: {max_steps: 75, batch_size: 16, target_accuracy: 0.05, num_examples: 40, learning_rate: 5e-3}
selection: {entropy_threshold: 1.2}
prompts_per_rollout: 8
num_generations: 4
max_new_tokens: 24
max_steps: 4
learning_rate: 1e-3
weight_decay: 0.0
lr_scheduler_type: constant
warmup_steps: 0
eval_steps: 0
eval_positions_per_bucket: 12
save_steps: 1
save_total_limit: 9
precision: fp32
logging_steps: 1
"""

CONTROL = """
recipe: rpt_control
rpt_run: null
batch_size: 16
learning_rate: 1e-3
weight_decay: 0.0
lr_scheduler_type: constant
warmup_steps: 0
eval_steps: 0
save_steps: 1
save_total_limit: 99
precision: fp32
logging_steps: 1
"""


def train_rpt(out: Path, *pairs: str) -> list[str]:
    settings, said = apply_overrides(read_yaml(RECIPE, "recipe.yaml"), list(pairs)), []
    run_recipe(get_recipe("rpt"), parse_config(RptConfig, settings), settings, out, quiet=True, log=said.append)
    return said


def train_control(out: Path, run: Path, *pairs: str) -> list[str]:
    settings, said = apply_overrides(read_yaml(CONTROL, "control.yaml"), [f"rpt_run={run}", *pairs]), []
    run_recipe(
        get_recipe("rpt_control"), parse_config(RptControlConfig, settings), settings, out, quiet=True, log=said.append
    )
    return said


@pytest.fixture(scope="module")
def rpt_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("runs") / "rpt"
    return out, train_rpt(out)


def from_(run: Path, *pairs: str) -> list[str]:
    return [
        "model=null",
        f"model.load={run / 'warmup'}",
        "warmup=null",
        f"selection.proxy_model={run / 'base'}",
        *pairs,
    ]


def test_a_run_keeps_its_places_its_tables_and_its_bill(rpt_run: tuple[Path, list[str]]):
    out, said = rpt_run
    places, tables = (json.loads((out / f"{name}.json").read_text()) for name in ("positions", "foretold"))
    assert all(entropy > 1.2 for _, _, entropy in places["train"])
    assert set(places["facts"]["dropped_places"]) <= {"the document ends there"}
    told = next(line for line in said if line.startswith("places"))
    assert f"{len(places['train']):,} to think about, {len(places['held_out'])} held out" in told
    assert set(tables) == {"before", "after"}
    assert sum(one["count"] for one in tables["after"]["buckets"]) == len(places["held_out"])
    rows = metrics(out)
    spent = [row["teraflops"] * 1e12 for row in rows]
    assert places["flops"] < spent[0] < spent[1] < spent[3]
    assert rows[0]["log_ratio"] < 1e-5
    assert any(row["grad_norm"] > 0 for row in rows), "some group was mixed, so the bits below mean something"
    assert {"eval/plain_hard", "eval/thought_hard", "eval/accuracy", "eval/unread"} <= set(rows[-1])
    assert load(out).config.vocab_size == load(out / "base").config.vocab_size


def test_a_reference_is_paid_for(rpt_run: tuple[Path, list[str]], tmp_path: Path):
    train_rpt(tmp_path / "run", *from_(rpt_run[0], "kl_coef=0.1", "max_steps=1"))
    first, other = metrics(rpt_run[0])[0], metrics(tmp_path / "run")[0]
    assert first["completions/mean_length"] == other["completions/mean_length"], "the same samples"
    assert other["teraflops"] > first["teraflops"]


def test_held_out_places_are_hard_and_easy_ones_and_learned_from_are_hard_ones(
    rpt_run: tuple[Path, list[str]], tmp_path: Path
):
    task, proxy, tokenizer = (
        parse_task("registers:longest=2"),
        load(rpt_run[0] / "base"),
        load_tokenizer(rpt_run[0] / "base"),
    )
    documents = [encode_problem(one, tokenizer) for one in unique_problems(task, "train", 12)]
    asking = make_prompt_builder(tokenizer, documents, prefix="", suffix="<think>", max_target_tokens=1)
    text = RptDocuments(documents[:6], documents[6:], asking)
    middle = statistics.median(one.entropy for one in select_positions(proxy, documents, min_entropy=-1.0))
    config = parse_config(
        RptConfig, apply_overrides(read_yaml(RECIPE, "recipe.yaml"), [f"selection.entropy_threshold={middle}"])
    )
    found = find_or_load_positions(config, proxy, 0.0, text, tmp_path)
    assert min(one.entropy for one in found.train) > middle
    assert min(one.entropy for one in found.held_out) < middle < max(one.entropy for one in found.held_out)


def test_every_place_is_asked_for_once_an_epoch_in_an_order_of_its_own():
    task = parse_task("registers:longest=2")
    tokenizer = reasoning_tokenizer(task)
    documents = [encode_problem(one, tokenizer) for one in unique_problems(task, "train", 6)]
    text = RptDocuments(
        documents, [], make_prompt_builder(tokenizer, documents, prefix="", suffix="<think>", max_target_tokens=1)
    )
    found = [Position(n, place, 1.0) for n, ids in enumerate(documents) for place in (1, len(ids) - 2)]
    every = {text.prompt_builder.build_prompt(documents[one.document], one.place) for one in found}
    orders = [[position_question(text, found, 7, epoch * 12 + n) for n in range(12)] for epoch in (0, 1)]
    assert [set(order) for order in orders] == [every, every]
    assert orders[0] != orders[1]
    assert orders[0] != [position_question(text, found, 8, n) for n in range(12)]


def test_no_held_out_document_is_learned_from():
    config = parse_config(RptConfig, apply_overrides(read_yaml(RECIPE, "recipe.yaml"), []))
    train, held = split_problems(config.data, config.seed)
    assert train
    assert held
    assert not {one.key for one in train} & {one.key for one in held}


def test_a_resumed_run_has_the_same_bits_the_same_places_and_the_same_bill(
    rpt_run: tuple[Path, list[str]], tmp_path: Path
):
    out = tmp_path / "stopped"
    shutil.copytree(rpt_run[0], out)
    for step in (3, 4):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    kept = json.loads((out / "positions.json").read_text())
    (out / "positions.json").write_text(json.dumps({**kept, "facts": {**kept["facts"], "train_places": -7}}))
    train_rpt(out)
    assert weights(out, 4) == weights(rpt_run[0], 4)
    assert [row["teraflops"] for row in metrics(out)] == [row["teraflops"] for row in metrics(rpt_run[0])]
    assert json.loads((out / "positions.json").read_text())["facts"]["train_places"] == -7, "found once, and kept"


def test_a_run_from_a_folder_is_the_run_that_made_the_folder(rpt_run: tuple[Path, list[str]], tmp_path: Path):
    train_rpt(tmp_path / "run", *from_(rpt_run[0]))
    assert weights(tmp_path / "run", 4) == weights(rpt_run[0], 4)


def test_the_control_spends_what_rpt_spent(rpt_run: tuple[Path, list[str]], tmp_path: Path):
    said = train_control(tmp_path / "run", rpt_run[0])
    rows, limit = metrics(tmp_path / "run"), metrics(rpt_run[0])[-1]["teraflops"]
    assert rows[-2]["teraflops"] < limit <= rows[-1]["teraflops"]
    assert f"compute: {limit:.4g} teraflops of RPT are {len(rows)} steps of 16 documents" in said
    tables = [json.loads((run / "foretold.json").read_text()) for run in (rpt_run[0], tmp_path / "run")]
    assert tables[0]["before"] == tables[1]["before"], "the same start, looked at in the same places"
    before = weights(tmp_path / "run", len(rows))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{len(rows):08d}")
    train_control(tmp_path / "run", rpt_run[0], f"max_steps={len(rows)}")
    assert weights(tmp_path / "run", len(rows)) == before


def test_a_control_that_learns_the_selected_places_alone(rpt_run: tuple[Path, list[str]], tmp_path: Path):
    train_control(tmp_path / "all", rpt_run[0])
    train_control(tmp_path / "some", rpt_run[0], "targets=selected")
    everything, some = metrics(tmp_path / "all")[0], metrics(tmp_path / "some")[0]
    assert some["num_targets"] < everything["num_targets"]
    assert some["teraflops"] == everything["teraflops"], "a row is read whole, whatever is learned from it"


@pytest.mark.parametrize("reward", ["format", "random"])
def test_controls_of_the_reward(reward: str, rpt_run: tuple[Path, list[str]], tmp_path: Path):
    train_rpt(tmp_path / "run", *from_(rpt_run[0], f"reward={reward}", "max_steps=2"))
    first, other = metrics(rpt_run[0])[0], metrics(tmp_path / "run")[0]
    assert first["completions/mean_length"] == other["completions/mean_length"], "the same samples"
    assert first["reward"] < other["reward"]


def test_a_text_file_is_read_in_the_models_own_ids(rpt_run: tuple[Path, list[str]], tmp_path: Path):
    """Characters that the tokenizer has not are places that cannot be answered: counted, not asked."""
    file = tmp_path / "text.txt"
    lines = [f"a{i % 3}b+{i % 7}c*{i % 5}: {i}" for i in range(60)]
    file.write_text("\n\n".join(lines))
    source = [f"data.source={file}", "data.num_documents=null", "data.separator=\n\n", "data.held_out=0.2"]
    pairs = from_(rpt_run[0], *source, "max_steps=1", "selection.entropy_threshold=0", "data.max_document_tokens=9")
    said = train_rpt(tmp_path / "run", *pairs)
    places = json.loads((tmp_path / "run" / "positions.json").read_text())
    assert places["facts"]["train_documents"] > 48, "cut to nine tokens each"
    assert places["facts"]["dropped_places"]["the document ends there"] >= 48
    assert any("dropped, the document ends there" in line for line in said)
    train_control(tmp_path / "control", tmp_path / "run")
    assert metrics(tmp_path / "control")[-1]["teraflops"] >= metrics(tmp_path / "run")[-1]["teraflops"]


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (["warmup=null"], "has not learned to think"),
        (["data.source=builtin", "data.num_documents=null"], "only a task's documents"),
        (["data.source=builtin"], "data.num_documents has no effect on builtin"),
        (["model=null", "model.load=x"], "warmup has no effect"),
        (["data.held_out=0.2"], "data.held_out has no effect on a task"),
        (["prompt.prefix=Think."], "leave prompt.prefix and prompt.suffix out"),
        (["model=null", "model.load=x", "warmup=null", "prompt.suffix=<answer>"], "no other tag"),
        (["reward=prefx"], "did you mean 'prefix'"),
        (["selection.entropy_threshold=-1"], "selection.entropy_threshold"),
        (["top_p=0.9"], "another distribution"),
        (["loss_kwargs.cap=3"], "no effect on grpo"),
    ],
)
def test_settings_without_sense_are_refused_before_anything_runs(pairs: list[str], told: str):
    with pytest.raises(UsageError, match=told):
        parse_config(RptConfig, apply_overrides(read_yaml(RECIPE, "recipe.yaml"), pairs))


def test_mistakes_that_only_the_run_can_see(rpt_run: tuple[Path, list[str]], tmp_path: Path):
    start = from_(rpt_run[0])
    with pytest.raises(DataError, match=r"finds none harder than 9 nats; lower selection.entropy_threshold"):
        train_rpt(tmp_path / "a", *start, "selection.entropy_threshold=9")
    with pytest.raises(UsageError, match="context of 128 has no room for any text: 127 new tokens and 1"):
        train_rpt(tmp_path / "b", *start, "max_new_tokens=127")
    with pytest.raises(UsageError, match="no room for texts of 120 tokens"):
        train_rpt(tmp_path / "c", *start, "data.max_document_tokens=120")
    with pytest.raises(UsageError, match="the task registers has no option deepest"):
        train_rpt(tmp_path / "d", *start, "data.source=registers:deepest=3")
    (tmp_path / "short.txt").write_text("a")
    source = [f"data.source={tmp_path / 'short.txt'}", "data.num_documents=null"]
    with pytest.raises(DataError, match="cannot be held out"):
        train_rpt(tmp_path / "e", *start, *source)
    with pytest.raises(UsageError, match="is no run folder; train one first"):
        train_control(tmp_path / "f", tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"steps follows from what .* spent and is \d+, not 7"):
        train_control(tmp_path / "g", rpt_run[0], "max_steps=7")
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "config.yaml").write_text(CONTROL)
    with pytest.raises(UsageError, match="recipe rpt_control; give one of rpt"):
        train_control(tmp_path / "i", tmp_path / "h")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(rpt_run[0], unfinished)
    (unfinished / "summary.json").unlink()
    with pytest.raises(UsageError, match="is not finished"):
        train_control(tmp_path / "j", unfinished)
    shutil.copytree(unfinished, tmp_path / "rpt")  # a run folder with a recipe's name is the folder
    with contextlib.chdir(tmp_path), pytest.raises(UsageError, match="is not finished"):
        train_control(tmp_path / "l", Path("rpt"))
    kept = json.loads((rpt_run[0] / "positions.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(rpt_run[0], other)
    kept["key"]["documents"] = "of another text"
    (other / "positions.json").write_text(json.dumps(kept))
    with pytest.raises(DataError, match="belong to another text"):
        train_control(tmp_path / "k", other)
