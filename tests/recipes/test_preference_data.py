"""Reward model and DPO as runs, tiny: they learn the rule, keep the reference, and resume with the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llm_quest.cli.chat import load_text_model as opened_to_talk
from llm_quest.data.preferences import Preference
from llm_quest.errors import DataError, UsageError
from llm_quest.eval.evaluators import preference_metrics
from llm_quest.hub.load_save import load
from llm_quest.objectives.preference_losses import PREFERENCE_LOSSES, PairwiseLoss, SimPO
from llm_quest.objectives.reward_model import score_rows
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.dpo import DpoConfig, build_dpo
from llm_quest.recipes.finetuning import flip_labels
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from tests.recipes.tuned import COMMON, WORDS, base, metrics, planning_context, start_run, weights, write_rows

REWARD = """
recipe: reward
batch_size: 4
sequence_length: 40
max_steps: 24
eval_steps: 12
"""
DPO = """
recipe: dpo
batch_size: 4
sequence_length: 40
max_steps: 24
beta: 0.5
eval_steps: 12
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the first half are better than those of the second, whatever was asked."""
    good, bad = WORDS[:5], WORDS[5:]
    pairs = [(f"say {w}", good[i % 5], bad[(i + j) % 5]) for i, w in enumerate(WORDS) for j in range(6)]
    asked = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    return write_rows(
        tmp_path_factory.mktemp("rows") / "rows.jsonl", [*asked, {"prompt": "say", "chosen": "x", "rejected": "x"}]
    )


@pytest.fixture
def pairs(start: Path, rows: Path) -> list[str]:
    return [f"model.load={start}", f"data.source={rows}"]


def test_a_reward_model_learns_which_answer_is_better(pairs: list[str], tmp_path: Path):
    out = tmp_path / "rm"
    outcome = start_run("reward", REWARD, out, *pairs)
    assert outcome.scores["accuracy"] == 1.0
    assert outcome.scores["margin"] > 0.5
    assert json.loads((out / "data.json").read_text())["dropped"] == {"chosen and rejected are the same": 1}
    model = load(out)
    assert len(score_rows(model, [[1, 2], [3]])) == 2
    with pytest.raises(UsageError, match="gives 1 numbers and no text"):
        opened_to_talk(str(out), "cpu", "float32", lambda line: None)


def test_dpo_prefers_and_keeps_the_reference_it_computed_once(pairs: list[str], tmp_path: Path):
    out, said = tmp_path / "dpo", list[str]()
    outcome = start_run("dpo", DPO, out, *pairs, log=said.append)
    first = metrics(out)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-4)
    assert outcome.scores["accuracy"] == 1.0
    assert any("reference: log-probabilities of" in line for line in said)
    kept = (out / "reference.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "step-00000024")
    said.clear()
    start_run("dpo", DPO, out, *pairs, log=said.append)
    assert not any("reference:" in line for line in said)
    assert (out / "reference.safetensors").read_bytes() == kept


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_the_reference_scores_the_pairs_that_the_run_reads_and_more_when_it_goes_on(recipe, pairs, tmp_path: Path):
    text, out, said = DPO.replace("dpo", recipe), tmp_path / recipe, list[str]()
    options = [*pairs, "save_steps=5", "save_total_limit=9", "eval_steps=0", "lr_scheduler_type=constant"]

    def log_probs(steps: int, out: Path = out) -> np.ndarray:
        start_run(recipe, text, out, *options, f"max_steps={steps}", log=said.append)
        return load_file(out / "reference.safetensors")["log_probs"]

    def count_scored() -> int:
        (line,) = [line for line in said if line.startswith("reference: log-probabilities of")]
        said.clear()
        return int(line.split()[3].replace(",", ""))

    data = json.loads((log_probs(5), out / "data.json")[1].read_text())
    few, held_out = load_file(out / "reference.safetensors")["log_probs"], data["held_out_rows"]
    assert np.isfinite(few).sum() == 2 * (5 * 4 + held_out) == count_scored()
    more = log_probs(9)
    assert count_scored() == 2 * 4 * 4
    assert np.array_equal(more[np.isfinite(few)], few[np.isfinite(few)]), "what is known is kept"
    straight = log_probs(9, tmp_path / "straight")
    np.testing.assert_allclose(straight, more, atol=1e-4)
    both = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (out, tmp_path / "straight")]
    np.testing.assert_allclose(*both, atol=1e-4, equal_nan=False)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("reward", []),
        ("dpo", ["loss_type=cdpo", "label_smoothing=0.1"]),
        ("dpo", ["sync_ref_model=true", "ref_model_sync_steps=5", "ref_model_mixup_alpha=0.6"]),
        ("dpo", ["techniques=[lora]", "precompute_ref_log_probs=false", "optim=adamw"]),
    ],
    ids=["reward", "cached", "sync", "adapters_off"],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(recipe, options, pairs, tmp_path: Path):
    name, text = ("reward", REWARD) if recipe == "reward" else ("dpo", DPO)
    options = [*pairs, *options, "max_steps=16", "save_steps=8", "save_total_limit=9", "eval_steps=0"]
    out = tmp_path / "run"
    start_run(name, text, out, *options)
    straight, told = weights(out, 16), metrics(out)
    shutil.rmtree(out / "checkpoints" / "step-00000016")
    start_run(name, text, out, *options)
    assert weights(out, 16) == straight
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in told]


def test_a_question_is_read_once_for_both_answers_but_under_checkpointing_and_the_losses_are_the_same(
    pairs: list[str], tmp_path: Path
):
    losses = []
    for techniques, shared in (([], True), (["techniques=[checkpointing]"], False)):
        options = [*pairs, *techniques, "max_steps=4", "eval_steps=0", "optim=adamw", "learning_rate=1e-3"]
        config = parse_config(DpoConfig, apply_overrides(read_yaml(DPO + COMMON, "recipe.yaml"), options))
        batch = build_dpo(config, planning_context(tmp_path)).loader.batches(0)[0]
        assert (batch.prefix is not None) == shared
        start_run("dpo", DPO, tmp_path / str(shared), *options)
        losses.append([row["loss"] for row in metrics(tmp_path / str(shared))])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_adapters_off_and_cached_are_one_reference(pairs: list[str], tmp_path: Path):
    losses = []
    for precomputed in ("true", "false"):
        out = tmp_path / precomputed
        options = ["techniques=[lora]", f"precompute_ref_log_probs={precomputed}", "max_steps=6", "optim=adamw"]
        start_run("dpo", DPO, out, *pairs, *options)
        losses.append([row["loss"] for row in metrics(out)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_after_sft_with_lora_the_reference_is_the_model_after_it(pairs: list[str], rows: Path, tmp_path: Path):
    """Adapters that stood before a run are part of the model it begins with: the loss of step 1 is ln 2, whatever holds
    the reference."""
    start_run(
        "dpo", DPO, tmp_path / "adapted", *pairs, "techniques=[lora]", "max_steps=4", "eval_steps=0", "optim=adamw"
    )
    losses = []
    for precomputed in ("true", "false"):
        again = [f"model.load={tmp_path / 'adapted'}", f"data.source={rows}", f"precompute_ref_log_probs={precomputed}"]
        start_run("dpo", DPO, tmp_path / precomputed, *again, "max_steps=3", "eval_steps=0", "optim=adamw")
        losses.append([row["loss"] for row in metrics(tmp_path / precomputed)])
    assert losses[1][0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[1][-1] != pytest.approx(np.log(2), abs=1e-4)


def test_a_moving_reference_takes_the_part_it_was_told(pairs: list[str], tmp_path: Path):
    """Reward margins shrink when the reference comes closer; at mix 1 they are zero after each sync."""
    out = tmp_path / "run"
    start_run(
        "dpo",
        DPO,
        out,
        *pairs,
        "sync_ref_model=true",
        "ref_model_sync_steps=6",
        "ref_model_mixup_alpha=1.0",
    )
    margins = {row["step"]: row["rewards/margin"] for row in metrics(out)}
    assert margins[7] == pytest.approx(0, abs=1e-4)
    assert margins[6] > 0.01
    assert margins[13] == pytest.approx(0, abs=1e-4)


def test_every_checkpoint_that_is_kept_has_its_reference(pairs: list[str], tmp_path: Path):
    """keep_every keeps checkpoints that are older than the last save_total_limit: their references stay too."""
    out = tmp_path / "run"
    synced = ["sync_ref_model=true", "ref_model_sync_steps=2", "save_steps=2", "save_total_limit=1", "keep_every=4"]
    start_run("dpo", DPO, out, *pairs, "max_steps=20", *synced)
    kept = [int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*")]
    assert sorted(kept) == [4, 8, 12, 16, 20]
    files = {int(file.stem[5:]) for file in (out / "reference").glob("step-*.safetensors")}
    assert files >= set(kept)
    assert 2 not in files


def test_a_damaged_reference_is_named_and_not_used(pairs: list[str], tmp_path: Path):
    out = tmp_path / "run"
    synced = ["sync_ref_model=true", "ref_model_sync_steps=2", "save_steps=2"]
    start_run("dpo", DPO, out, *pairs, "max_steps=4", "max_time=1000s", *synced)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    file = out / "reference" / "step-00000002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match=r"step-00000002\.safetensors is damaged"):
        start_run("dpo", DPO, out, *pairs, "max_steps=4", "max_time=1000s", *synced)


def test_labels_are_turned_round_on_purpose_in_the_part_asked_for_and_it_is_said(pairs: list[str], tmp_path: Path):
    many = [Preference((("user", str(n)),), ("better", "worse")) for n in range(50)]
    turned = flip_labels(many, 0.2, seed=1)
    assert sum(one.answers == ("worse", "better") for one in turned) == 10
    assert [one.question for one in turned] == [one.question for one in many]
    out = tmp_path / "run"
    start_run("dpo", DPO, out, *pairs, "data.label_flip_fraction=0.2", "max_steps=2")
    notes = json.loads((out / "data.json").read_text())["notes"]
    assert "11 of the training pairs are swapped on purpose" in notes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["label_smoothing=0.1"], "label_smoothing 0.1 has no effect on loss_type=dpo"),
        (["loss_type=cdpo"], "cdpo needs label_smoothing"),
        (["precompute_ref_log_probs=false"], "this model has no adapter"),
        (["sync_ref_model=true", "precompute_ref_log_probs=false"], "has no effect"),
        (["loss_type=simpo", "sync_ref_model=true"], "sync_ref_model has no effect on loss_type=simpo"),
        (["loss_type=dpo", "loss_kwargs={simpo_gamma: 1}"], "simpo_gamma 1.0 has no effect on loss_type=dpo"),
        (["loss_type=aot", "micro_batch_size=2"], "a micro-batch has 2 of 4: set micro_batch_size=4"),
    ],
)
def test_options_without_effect_are_refused(options, said, pairs: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        start_run("dpo", DPO, tmp_path / "run", *pairs, *options)


LEARNS = sorted(set(PREFERENCE_LOSSES) - {"apo_down"})
"""apo_down lowers both answers, from a model whose chosen answers are to be improved on."""


@pytest.mark.parametrize("loss_type", LEARNS)
def test_every_loss_learns_which_answer_is_better(loss_type: str, pairs: list[str], tmp_path: Path):
    options = ["label_smoothing=0.05"] if loss_type in ("cdpo", "robust") else []
    out = tmp_path / loss_type
    outcome = start_run(
        "dpo",
        DPO,
        out,
        *pairs,
        f"loss_type={loss_type}",
        "micro_batch_size=4",
        "max_steps=16",
        "eval_steps=0",
        *options,
    )
    assert outcome.scores["accuracy"] >= 0.8  # five of six held-out pairs
    assert (out / "reference.safetensors").exists() == PREFERENCE_LOSSES[loss_type].traits.needs_reference


def test_beta_is_the_losss_own_unless_it_is_given(pairs: list[str]):
    def loss(*options: str) -> PairwiseLoss:
        settings = apply_overrides(read_yaml("recipe: dpo\nmodel: {load: x}", "dpo.yaml"), list(options))
        return parse_config(DpoConfig, settings).build_loss()

    assert loss().beta == 0.1
    assert loss("loss_type=simpo") == SimPO(beta=2.0, simpo_gamma=1.0)
    assert loss("loss_type=simpo", "beta=1", "loss_kwargs={simpo_gamma: 0.3}") == SimPO(1.0, 0.3)


def test_the_sft_term_goes_with_any_loss(pairs: list[str], tmp_path: Path):
    rows = {}
    for alpha in ("0", "1"):
        start_run("dpo", DPO, tmp_path / alpha, *pairs, f"rpo_alpha={alpha}", "max_steps=2", "eval_steps=0")
        rows[alpha] = metrics(tmp_path / alpha)[0]
    assert "nll_loss" not in rows["0"]
    assert rows["1"]["loss"] == pytest.approx(rows["0"]["loss"] + rows["1"]["nll_loss"], abs=1e-5)


def test_held_out_measures_by_hand():
    """Better, worse, length of each: right, wrong, right, a tie."""
    found = preference_metrics(np.array([[2.0, 1.0, 10, 10], [0.0, 1.0, 20, 10], [3.0, 0.0, 30, 29], [1.0, 1.0, 5, 9]]))
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx(0.75)
    assert found["accuracy_same_length"] == 1.0
    rewards, lengths = [2, 0, 3, 1, 1, 1, 0, 1], [10, 20, 30, 5, 10, 10, 29, 9]
    assert found["reward_length_correlation"] == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])
    assert found["loss"] == pytest.approx(torch.nn.functional.softplus(-torch.tensor([1.0, -1, 3, 0])).mean().item())


def test_a_moving_reference_without_held_out_pairs_scores_nothing_beforehand(pairs: list[str], tmp_path: Path):
    said: list[str] = []
    options = [*pairs, "data.held_out=0", "sync_ref_model=true", "max_steps=2", "eval_steps=0"]
    start_run("dpo", DPO, tmp_path / "dpo", *options, log=said.append)
    assert not any(line.startswith("reference:") for line in said)
    assert not (tmp_path / "dpo" / "reference.safetensors").exists()
