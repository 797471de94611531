"""The course of a run: epochs, a finished run that is made longer, parameters that are frozen by name, the best
checkpoint of a run that overfits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llm_quest.cli.export import export_run
from llm_quest.cli.train import start_training
from llm_quest.errors import BusyError, UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.models.build import build
from llm_quest.recipes.freezing import freeze_parameters
from llm_quest.recipes.recipe import load_recipe
from llm_quest.techniques.lora import LoRA
from tests.recipes.tuned import WORDS, base, metrics, start_run, write_rows

SFT = "recipe: sft\nbatch_size: 4\nsequence_length: 40\nsamples: {every_steps: 0}\neval_steps: 2\n"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    base(tmp_path / "base")
    pairs = [{"prompt": f"say {a} {b}", "completion": a} for a in WORDS for b in WORDS]
    return f"model: {{load: {tmp_path}/base}}\ndata: {{source: {write_rows(tmp_path / 'pairs.jsonl', pairs)}}}\n"


def test_an_epoch_is_every_row_once(tmp_path, rows):
    said: list[str] = []
    outcome = start_run("sft", SFT + rows, tmp_path / "run", "num_train_epochs=2", log=said.append)
    epoch = int(next(line for line in said if line.startswith("learned:")).split(" in ")[1].split()[0])
    assert outcome.steps == -(-2 * epoch // 4)
    assert f"epochs: 2 of {epoch} rows, 4 at a time, are {outcome.steps} steps" in said
    assert start_run("sft", SFT + rows, tmp_path / "run", "num_train_epochs=2").status == "finished"  # the same run


def test_epochs_and_steps_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="num_train_epochs: max_steps is given too: leave one of them out"):
        load_recipe("sft", ["num_train_epochs=2", "max_steps=5"])
    assert load_recipe("sft", ["num_train_epochs=2"])[1].num_train_epochs == 2
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: sft\nmodel: {load: x}\nmax_steps: 5\nnum_train_epochs: 1\n")
    with pytest.raises(UsageError, match=r"mine.yaml:4: num_train_epochs: max_steps is given too"):
        load_recipe(str(file), ())
    with pytest.raises(UsageError, match="drawn without end; give max_steps"):
        start_training("vlm", ["num_train_epochs=1"], out=tmp_path / "run", log=lambda text: None)


def test_a_finished_run_is_made_longer_in_place(tmp_path, rows):
    """Steps of before stay, the rows of after are those of a run of that length, and its rate is too."""
    lrs = "lr_scheduler_type: cosine\n"
    start_run("sft", SFT + rows + lrs, tmp_path / "run", "max_steps=4", "samples.every_steps=0")
    said: list[str] = []
    outcome = start_run("sft", SFT + rows + lrs, tmp_path / "run", "max_steps=8", log=said.append)
    assert (outcome.step, outcome.status) == (8, "finished")
    assert any("the run has 8 steps now instead of 4: from step 4 on its learning rate" in line for line in said)
    straight = start_run("sft", SFT + rows + lrs, tmp_path / "straight", "max_steps=8")
    assert straight.step == 8
    longer, whole = ({row["step"]: row for row in metrics(tmp_path / name)} for name in ("run", "straight"))
    assert sorted(longer) == sorted(whole)
    assert longer[8]["learning_rate"] == whole[8]["learning_rate"]
    assert longer[4]["learning_rate"] != whole[4]["learning_rate"]
    assert longer[7]["num_targets"] == whole[7]["num_targets"]  # the same rows
    with pytest.raises(UsageError, match="has done 8 steps, and max_steps=6 asks for fewer"):
        start_run("sft", SFT + rows + lrs, tmp_path / "run", "max_steps=6")
    with pytest.raises(BusyError, match="other settings"):
        start_run("sft", SFT + rows + lrs, tmp_path / "run", "max_steps=9", "seed=3")


def test_the_best_of_a_run_that_overfits_is_exported_by_name(tmp_path):
    """The case of a run whose checkpoints after the best one are worse: RUN@best is the one with the lowest held-out
    loss, though only the newest is kept."""
    draw = random.Random(1)
    base(tmp_path / "base")
    noise = [{"prompt": f"say {i}", "completion": " ".join(draw.choices(WORDS, k=8))} for i in range(30)]
    text = SFT + f"model: {{load: {tmp_path}/base}}\ndata: {{source: {write_rows(tmp_path / 'r.jsonl', noise)}}}\n"
    start_run(
        "sft", text, tmp_path / "run", "max_steps=40", "data.held_out=0.3", "save_steps=0", "save_total_limit=1",
        "sequence_length=96", "lr_scheduler_type=constant", "metric_for_best_model=eval/loss",
    )  # fmt: skip
    losses = {row["step"]: row["eval/loss"] for row in metrics(tmp_path / "run") if "eval/loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 40, losses
    assert resolve_checkpoint(f"{tmp_path / 'run'}@best").name == f"step-{best:08d}"
    export_run(Path(f"{tmp_path / 'run'}@best"), tmp_path / "best")
    export_run(tmp_path / "run", tmp_path / "last")
    saved = {name: load(tmp_path / name).state_dict() for name in ("best", "last")}
    own = load(f"{tmp_path / 'run'}@best").state_dict()
    assert all((own[key] == value).all() for key, value in saved["best"].items())
    assert any((saved["last"][key] != value).any() for key, value in saved["best"].items())


def test_the_summary_of_a_run_that_loads_its_best_is_of_the_best(tmp_path, rows):
    outcome = start_run(
        "sft", SFT + rows, tmp_path / "run", "max_steps=6", "metric_for_best_model=eval/loss", "greater_is_better=true",
        "load_best_model_at_end=true",
    )  # fmt: skip
    losses = {row["step"]: row["eval/loss"] for row in metrics(tmp_path / "run") if "eval/loss" in row}
    best = max(losses, key=losses.__getitem__)
    assert best != 6
    assert outcome.metrics["eval/loss"] == pytest.approx(losses[best])
    own, kept = (load(tmp_path / name).state_dict() for name in ("run", f"run/checkpoints/step-{best:08d}"))
    assert all((own[key] == value).all() for key, value in kept.items())


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("model.embed_tokens.*", ["embed.token.weight"]),
        ("embed.*", ["embed.token.weight"]),
        ("model.layers.0.mlp.down_proj.weight", ["blocks.0.feed_forward.0.out.weight"]),
        ("model.norm.*", ["norm.weight"]),
    ],
)
def test_parameters_are_frozen_by_either_name(pattern, frozen):
    model = build("llama3.2-tiny")
    freeze_parameters(model, [pattern], lambda text: None)
    found = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(found) == len(frozen) == 1
    assert found[0].split(".")[0] == frozen[0].split(".")[0]


def test_a_pattern_that_matches_nothing_or_a_part_of_a_matrix_is_refused():
    model = build("llama3.2-tiny")
    with pytest.raises(
        UsageError, match=r"'model.embed_token.\*' matches no parameter.*near it are model.embed_tokens"
    ):
        freeze_parameters(model, ["model.embed_token.*"], lambda text: None)
    with pytest.raises(
        UsageError, match=r"q_proj.weight, which is one matrix with .*k_proj.weight.*freeze them together"
    ):
        freeze_parameters(model, ["*.q_proj.*"], lambda text: None)
    freeze_parameters(model, ["*.self_attn.?_proj.*"], lambda text: None)


def test_a_pattern_that_names_nothing_that_is_trained_is_told():
    model, said = LoRA(rank=2)(build("llama3.2-tiny")), list[str]()
    freeze_parameters(model, ["model.layers.0.*"], said.append)
    assert "'model.layers.0.*' changes nothing" in said[0]
    other = said[0].rpartition("trained is ")[2].removesuffix(" ...")
    assert dict(model.named_parameters())[other].requires_grad
    freeze_parameters(model, ["blocks.0.*"], said.append)
    assert not any("changes nothing" in line for line in said[1:])


def test_what_is_frozen_does_not_move(tmp_path, rows):
    start_run("sft", SFT + rows, tmp_path / "run", "max_steps=2", "freeze=['model.layers.*']", "save_steps=1")
    before, after = (
        load_file(tmp_path / "run/checkpoints" / name / "model.safetensors")
        for name in ("step-00000001", "step-00000002")
    )
    moved = {key for key in after if (before[key] != after[key]).any()}
    assert moved
    assert not any(key.startswith("blocks.") for key in moved)
    note = json.loads((tmp_path / "run/summary.json").read_text())
    assert note["step"] == 2
