"""A pretraining run, real and tiny: from a text file to a folder that generates, and the promises of resuming."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quest.errors import BusyError, UsageError
from llm_quest.files import file_sha256
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.recipe import RunOutcome, get_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml

BASE = """
recipe: pretrain
data: {held_out: 0.2}
tokenizer: {vocab_size: 300}
model: {preset: llama3.2-tiny}
batch_size: 4
sequence_length: 32
max_steps: 8
optim: muon
learning_rate: 0.01
warmup_steps: 2
eval_steps: 4
eval_tokens: 200
samples: {every_steps: 4, prompts: [the], max_new_tokens: 4}
save_steps: 3
precision: fp32
logging_steps: 1
"""


def run(
    text: Path, out: Path, *pairs: str, callbacks: tuple = (), resume: str = "auto", log: Any = lambda line: None
) -> RunOutcome:
    settings = apply_overrides(read_yaml(BASE, "base.yaml"), [f"data.source={text}", *pairs])
    return run_recipe(
        get_recipe("pretrain"),
        parse_config(PretrainConfig, settings),
        settings,
        out,
        callbacks=callbacks,
        resume=resume,
        quiet=True,
        log=log,
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, step: int = 8) -> str:
    return file_sha256(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


class CtrlC:
    """Sends this process SIGINT after a step."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, model: torch.nn.Module, step: int) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_step_skipped(self, model: torch.nn.Module) -> None:
        pass


def test_a_run_learns_and_leaves_a_folder_with_everything(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = run(text, out, "max_steps=30")
    assert (outcome.status, outcome.step, outcome.exit_code) == ("finished", 30, 0)
    losses = [row["loss"] for row in rows(out)]
    assert losses[-1] < losses[0] - 1
    assert outcome.metrics["eval/bits_per_byte"] == pytest.approx(rows(out)[-1]["eval/bits_per_byte"])
    assert any("Kneser-Ney" in name for name in outcome.baselines)
    kept = {path.name for path in out.iterdir()}
    assert kept >= {
        "config.yaml",
        "env.json",
        "data.json",
        "model.json",
        "tokenizer",
        "metrics.jsonl",
        "events.jsonl",
        "samples",
        "checkpoints",
        "LATEST",
        "summary.json",
    }
    sample = json.loads((out / "samples" / "step-00000004.json").read_text())
    assert (sample["step"], sample["samples"][0]["prompt"]) == (4, "the")
    model, tokenizer = load(out), load_tokenizer(out)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert model.generation_config is not None
    assert model.generation_config.eos_token_ids == tokenizer.eos_token_ids


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "straight")
    first = run(text, tmp_path / "twice", callbacks=(CtrlC(4),))
    assert (first.status, first.exit_code) == ("interrupted", 130)
    assert 4 <= first.step < 8
    second = run(text, tmp_path / "twice")
    assert (second.status, second.step) == ("finished", 8)
    assert weights(tmp_path / "twice") == weights(tmp_path / "straight")
    timeless = [
        [
            {key: value for key, value in row.items() if key not in ("train_seconds", "tokens_per_second")}
            for row in rows(tmp_path / name)
        ]
        for name in ("straight", "twice")
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_is_left_as_it_is(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run")
    before = weights(tmp_path / "run"), rows(tmp_path / "run")
    assert run(text, tmp_path / "run").step == 8
    assert (weights(tmp_path / "run"), rows(tmp_path / "run")) == before


def test_the_split_into_micro_batches_changes_rounding_only(text: Path, tmp_path: Path) -> None:
    whole, parts = run(text, tmp_path / "whole"), run(text, tmp_path / "parts", "micro_batch_size=1")
    assert whole.metrics["loss"] == pytest.approx(parts.metrics["loss"], abs=1e-4)


def test_activation_checkpointing_changes_nothing(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "plain")
    run(text, tmp_path / "again", "gradient_checkpointing=true")
    assert weights(tmp_path / "plain") == weights(tmp_path / "again")


def test_another_seed_is_another_run(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "a", "max_steps=2")
    run(text, tmp_path / "b", "max_steps=2", "seed=1")
    assert weights(tmp_path / "a", 2) != weights(tmp_path / "b", 2)


def test_a_folder_with_another_run_is_refused_and_the_keys_are_named(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run", "max_steps=2")
    with pytest.raises(BusyError, match=r"learning_rate: 0\.01 -> 0\.5") as error:
        run(text, tmp_path / "run", "max_steps=2", "learning_rate=0.5")
    assert error.value.exit_code == 7
    assert len(str(error.value).splitlines()) <= 4
    assert run(text, tmp_path / "run", "max_steps=2", "save_steps=1", "logging_steps=5").status == "finished"


def test_a_folder_with_something_else_is_refused_and_left_alone(text: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and no run"):
        run(text, tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_resume_never_refuses_a_folder_that_holds_a_checkpoint(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run", "max_steps=2")
    with pytest.raises(BusyError, match="holds a run already"):
        run(text, tmp_path / "run", "max_steps=2", resume="never")


def test_training_goes_on_from_the_weights_of_another_run(text: Path, tmp_path: Path) -> None:
    first = run(text, tmp_path / "first", "max_steps=30")
    second = run(
        text,
        tmp_path / "second",
        "model={load: " + str(tmp_path / "first") + "}",
        f"tokenizer.load={tmp_path / 'first'}",
        "max_steps=2",
        "learning_rate=1e-5",
    )
    assert second.metrics["eval/loss"] == pytest.approx(first.metrics["eval/loss"], abs=0.1)


def test_prepared_tokens_are_a_source_too(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "first", "max_steps=2")
    prepared = json.loads((tmp_path / "first" / "data.json").read_text())["folder"]
    run(Path(prepared), tmp_path / "second", "max_steps=2")
    assert weights(tmp_path / "first", 2) == weights(tmp_path / "second", 2)


def test_rows_longer_than_the_context_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="longer than the model's context of 256"):
        run(text, tmp_path / "run", "sequence_length=300")


def test_what_was_chosen_is_said_with_the_reason(text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    run(text, tmp_path / "run", "max_steps=2", "precision=auto", log=told.append)
    reasons = {line.split(":")[0]: line for line in told}
    assert "measured" in reasons["precision"]
    assert reasons["compiled"].startswith("compiled: no (a run of about 0 s")
    assert "(a matrix of 384 x 1024: float32" in reasons["Muon's iterations"]
    assert "usable core" in reasons["threads"]
