"""The key `teacher`: a model learns from another one's distributions, resumes to the bit, and what does not fit is
refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import llm_quest as quest
from llm_quest.cli.train import estimate_cost
from llm_quest.errors import BusyError, UsageError
from llm_quest.files import file_sha256
from llm_quest.hub.load_save import save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.build import build, preset
from tests.recipes.test_config import GOOD, config_problems
from tests.recipes.test_pretrain import BASE, CtrlC, rows, run, weights
from tests.recipes.test_sft import RECIPE, WORDS
from tests.recipes.tuned import base, metrics, start_run, write_rows
from tests.recipes.two import by_two

SMALL = ("model={preset: gpt2-tiny}", "samples.every_steps=0", "eval_baselines=false")


@pytest.fixture
def target(text: Path, tmp_path: Path) -> Path:
    """A teacher that knows the text."""
    run(text, tmp_path / "target", "max_steps=40", "samples.every_steps=0", "eval_steps=0", "eval_baselines=false")
    return tmp_path / "target"


def test_a_draft_learns_from_its_target_and_resumes_to_the_bit(text: Path, target: Path, tmp_path: Path) -> None:
    pairs = (*SMALL, f"teacher.load={target}", "teacher.weight=0.8", "max_steps=20")
    before, said = {file: file_sha256(file) for file in target.rglob("*.safetensors")}, []
    run(text, tmp_path / "whole", *pairs, log=said.append)
    assert {file: file_sha256(file) for file in before} == before
    assert any(line.startswith(f"teacher: {target}, llama-style") for line in said), said
    found = rows(tmp_path / "whole")
    for row in found:
        assert row["loss"] == pytest.approx(0.2 * row["next_token"] + 0.8 * row["distillation"], rel=1e-5)
    assert found[-1]["distillation"] < 0.7 * found[0]["distillation"]
    assert "expected about" not in (tmp_path / "whole" / "events.jsonl").read_text()
    run(text, tmp_path / "cut", *pairs, callbacks=(CtrlC(7),))
    run(text, tmp_path / "cut", *pairs)
    assert weights(tmp_path / "cut", 20) == weights(tmp_path / "whole", 20)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(engine: str, text: Path, target: Path, tmp_path: Path) -> None:
    """Each holds the teacher whole, outside of what the engine shares."""
    pairs = (*SMALL, f"teacher.load={target}", "max_steps=2", "eval_steps=0")
    run(text, tmp_path / "one", *pairs)
    by_two(BASE, [f"data.source={text}", *pairs, f"parallel={engine}"], tmp_path / "two")
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("loss", "next_token", "distillation", "num_targets"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_the_checkpoint_is_the_students_alone_and_held_out_loss_is_plain(text, target: Path, tmp_path: Path) -> None:
    still = (*SMALL, "max_steps=2", "learning_rate=1e-9")
    run(text, tmp_path / "alone", *still)
    run(text, tmp_path / "taught", *still, f"teacher.load={target}")
    alone, taught = (tmp_path / name / "checkpoints" / "step-00000002" for name in ("alone", "taught"))
    assert {file.name for file in alone.iterdir()} == {file.name for file in taught.iterdir()}
    for file in alone.glob("*.safetensors"):
        assert (taught / file.name).stat().st_size == file.stat().st_size
    row, plain = rows(tmp_path / "taught")[-1], rows(tmp_path / "alone")[-1]
    assert row["loss"] == pytest.approx(row["distillation"])
    assert row["next_token"] == pytest.approx(plain["loss"], rel=1e-5)
    assert row["eval/loss"] == pytest.approx(plain["eval/loss"], rel=1e-5)
    assert abs(row["eval/loss"] - row["loss"]) > 1
    assert quest.load(tmp_path / "taught").config.vocab_size == quest.load(target).config.vocab_size


def test_a_run_does_not_go_on_under_another_teacher_of_the_same_name(text, target: Path, tmp_path: Path) -> None:
    pairs = (*SMALL, f"teacher.load={target}")
    run(text, tmp_path / "run", *pairs, callbacks=(CtrlC(4),))
    run(text, tmp_path / "other", "max_steps=41", "samples.every_steps=0", "eval_steps=0", "eval_baselines=false")
    (target / "checkpoints").rename(target / "before")
    (tmp_path / "other" / "checkpoints").rename(target / "checkpoints")
    (target / "LATEST").write_text((tmp_path / "other" / "LATEST").read_text())
    with pytest.raises(BusyError, match="its teacher"):
        run(text, tmp_path / "run", *pairs)
    with pytest.raises(BusyError, match="other settings"):
        run(text, tmp_path / "run", *pairs, "teacher.beta=1")


def test_a_plan_knows_the_tokens_of_a_folder_that_was_prepared(target: Path) -> None:
    """Not the size that a tokenizer would be trained with; so it does not take the teacher for one of another's."""
    source = json.loads((target / "data.json").read_text())["folder"]
    pairs = [f"data.source={source}", "model={preset: gpt2-tiny}", f"teacher.load={target}"]
    found = estimate_cost("pretrain", [*pairs, "sequence_length=32"], measure=False, log=lambda line: None)
    assert found.memory["teacher"] > 0
    with pytest.raises(UsageError, match=r"knows 300 tokens, this run has 4096: set tokenizer\.load="):
        estimate_cost("pretrain", [*pairs[1:], "sequence_length=32"], measure=False, log=lambda line: None)


def test_what_does_not_fit_is_refused_with_a_remedy(text: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"target has another tokenizer \(of \d+ tokens\) than this run \(of 310\)"
    ) as no:
        run(text, tmp_path / "a", *SMALL, f"teacher.load={target}", "tokenizer.vocab_size=310")
    assert str(no.value).endswith(f"set tokenizer.load={target}")
    (text / "00.txt").write_text("zebras zigzag, zithers buzz. " * 99)
    with pytest.raises(UsageError, match=r"another tokenizer .*of 300 tokens.* than this run .*of 300"):
        run(text, tmp_path / "d", *SMALL, f"teacher.load={target}")
    run(text, tmp_path / "short", *SMALL, "max_steps=1", "warmup_steps=0", "eval_steps=0")
    with pytest.raises(UsageError, match=r"sequence_length 65 is longer than the context of 64 of the teacher .*short"):
        run(text, tmp_path / "b", f"teacher.load={tmp_path / 'short'}", "sequence_length=65")
    with pytest.raises(UsageError, match=r"there is no run runs/nobody: train one first .*teacher\.load"):
        run(text, tmp_path / "c", *SMALL, "teacher.load=runs/nobody")


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("teacher={load: x, weight: 0}", "teacher.weight: 0 is not a number > 0 <= 1"),
        ("teacher={load: x, weight: 2}", "teacher.weight: 2 is not a number > 0 <= 1"),
        ("teacher={load: x, beta: 1.5}", "teacher.beta: 1.5 is not a number >= 0 <= 1"),
        ("teacher={load: x, temperature: 0}", "teacher.temperature: 0 is not a number > 0"),
        ("teacher={weight: 0.5}", "teacher.load"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_errors(pair: str, said: str) -> None:
    lines = config_problems(GOOD, pair)
    assert any("teacher" in line and said in line for line in lines), lines


def test_conversations_are_learned_from_a_teacher_too(tmp_path: Path) -> None:
    asked = [{"prompt": f"say {word} {other}", "completion": word} for word in WORDS for other in WORDS[:4]]
    source = write_rows(tmp_path / "rows.jsonl", asked)
    start, same = base(tmp_path / "start"), base(tmp_path / "teacher", "gpt2-tiny")
    pairs = [f"model.load={start}", f"data.source={source}", "max_steps=6", "eval_steps=0", "samples.every_steps=0"]
    pairs += ["teacher={load: " + json.dumps(str(same)) + ", weight: 0.5, beta: 0.5, temperature: 2}"]
    start_run("sft", RECIPE, tmp_path / "run", *pairs)
    for row in metrics(tmp_path / "run"):
        assert row["loss"] == pytest.approx((row["next_token"] + row["distillation"]) / 2, rel=1e-5)
    split = [*pairs, "micro_batch_size=1"]
    start_run("sft", RECIPE, tmp_path / "split", *split)
    last, other = metrics(tmp_path / "run")[-1], metrics(tmp_path / "split")[-1]
    assert last["distillation"] == pytest.approx(other["distillation"], rel=1e-3)


def write_padded_model(folder: Path, start: Path, by: int) -> Path:
    """Another model of the same tokenizer, whose vocabulary is padded."""
    tokenizer = load_tokenizer(start)
    config = dataclasses.replace(preset("gpt2-tiny").config, vocab_size=tokenizer.vocab_size + by)
    return save(build(config, seed=len(folder.name)), folder, tokenizer=tokenizer)


def test_padding_counts_where_both_have_it_and_else_asks_for_some_cross_entropy(tmp_path: Path) -> None:
    asked = [{"prompt": f"say {word} {other}", "completion": word} for word in WORDS for other in WORDS[:2]]
    start, model = base(tmp_path / "start"), write_padded_model(tmp_path / "model", tmp_path / "start", 6)
    pairs = [f"model.load={model}", f"data.source={write_rows(tmp_path / 'rows.jsonl', asked)}", "max_steps=2"]
    pairs += ["eval_steps=0", "samples.every_steps=0"]
    for name, by, weight in (("alike", 6, 1.0), ("wider", 9, 0.9), ("narrower", 0, 0.9)):
        teacher = write_padded_model(tmp_path / f"teacher {name}", start, by)
        given = [*pairs, f"teacher={{load: '{teacher}', weight: {weight}}}"]
        start_run("sft", RECIPE, tmp_path / name, *given)
        assert metrics(tmp_path / name)[-1]["distillation"] > 0
    with pytest.raises(UsageError, match="with 6 ids of which the teacher says nothing: give"):
        start_run("sft", RECIPE, tmp_path / "no", *pairs, f"teacher.load={teacher}")
