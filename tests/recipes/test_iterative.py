"""Iterative GRPO, tiny: every stage is a run, the judge learns from the newest policy and from a tenth of the past, and
the whole goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm_quest.cli.export import export_run
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.iterative import IterativeConfig
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.techniques.score_head import find_score_head
from tests.recipes.test_grpo import RECIPE, from_, run_grpo, warm  # noqa: F401
from tests.recipes.test_grpo_environments import ENVIRONMENT
from tests.recipes.tuned import metrics, weights

ITERATIVE = (
    RECIPE.replace("recipe: grpo", "recipe: iterative")
    + """
num_outer_iterations: 2
kl_coef: 0.05
kl_estimator: k2
reward_model: {max_steps: 12, batch_size: 10, num_prompts: 24}
"""
)


def run_iterative(out: Path, *pairs: str) -> list[str]:
    settings, said = apply_overrides(read_yaml(ITERATIVE, "recipe.yaml"), list(pairs)), []
    run_recipe(
        get_recipe("iterative"), parse_config(IterativeConfig, settings), settings, out, quiet=True, log=said.append
    )
    return said


@pytest.fixture(scope="module")
def iterative_run(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:  # noqa: F811
    out = tmp_path_factory.mktemp("runs") / "iterative"
    return out, run_iterative(out, *from_(warm, "max_steps=2"))


def test_policies_and_judges_take_turns(iterative_run: tuple[Path, list[str]]):
    out, said = iterative_run
    told = [line for line in said if line.startswith("reward model")]
    assert [line.split(":")[0] for line in told] == ["reward model 0", "reward model 1", "reward model 2"]
    counts = [len(json.loads((out / f"iteration-{i}" / "comparisons.json").read_text())) for i in range(3)]
    assert f"{counts[2]} new comparisons, {counts[0] + counts[1]} earlier;" in told[2]
    judges = [load(out / f"iteration-{i}" / "judge") for i in range(3)]
    assert all(find_score_head(judge) is not None for judge in judges)
    rows = [metrics(out / f"iteration-{i}" / "policy") for i in (1, 2)]
    assert all(first["kl"] < 1e-6 < last["kl"] for first, last in rows), "the reference is the iteration's own start"
    assert all("rewards/model" in row and "reward" in row for both in rows for row in both)
    newest = out / "iteration-2" / "policy"
    assert resolve_checkpoint(out) == newest
    assert resolve_checkpoint(f"{out}@last") == newest / "checkpoints" / "step-00000002"
    with pytest.raises(DataError, match="has no best checkpoint"):
        resolve_checkpoint(f"{out}@best")
    export_run(out, out.parent / "exported")  # `quest generate`, `export` and `model.load` take the folder of the whole
    assert all(torch.equal(a, b) for a, b in zip(load(out).parameters(), load(newest).parameters(), strict=True))


def test_the_whole_goes_on_where_it_was_interrupted(iterative_run: tuple[Path, list[str]], warm: Path):  # noqa: F811
    out = iterative_run[0]
    before = weights(out / "iteration-2" / "policy", 2), weights(out / "iteration-2" / "judge", 12)
    shutil.rmtree(out / "iteration-2")
    shutil.rmtree(out / "iteration-1" / "judge" / "checkpoints")
    run_iterative(out, *from_(warm, "max_steps=2"))
    assert (weights(out / "iteration-2" / "policy", 2), weights(out / "iteration-2" / "judge", 12)) == before


def test_a_reward_model_rewards_a_plain_grpo_run(iterative_run: tuple[Path, list[str]], warm: Path, tmp_path: Path):  # noqa: F811
    judge = iterative_run[0] / "iteration-0" / "judge"
    run_grpo(tmp_path / "run", *from_(warm, "max_steps=2", f"rewards=[{{name: model, load: {judge}}}]"))
    assert metrics(tmp_path / "run")[-1]["rows_trained"] == 1
    with pytest.raises(UsageError, match="no reward model"):
        run_grpo(tmp_path / "no", *from_(warm, f"rewards=[{{name: model, load: {warm}}}]"))


def test_episodes_are_judged_and_labeled_by_their_environment(warm: Path, tmp_path: Path):  # noqa: F811
    """Comparisons of whole episodes, in which the environment's text stands; its reward is reported beside."""
    file, out = tmp_path / "my_env.py", tmp_path / "run"
    file.write_text(ENVIRONMENT)
    pairs = from_(warm, "task=null", f"environment={file}:TwoWords", "max_turns=2", "max_steps=1", "eval_problems=4",
                  "apply_chat_template=false",
                  "num_outer_iterations=1", "reward_model={max_steps: 2, batch_size: 4, num_prompts: 16}")  # fmt: skip
    run_iterative(out, *pairs)
    row = metrics(out / "iteration-1" / "policy")[-1]
    assert {"rewards/environment", "rewards/model", "completions/mean_turns"} <= set(row)
    _, better, worse = json.loads((out / "iteration-0" / "comparisons.json").read_text())[0]
    assert max(len(better), len(worse)) > 5  # max_new_tokens: there are two turns
    assert better != worse


@pytest.mark.parametrize("pairs", [["rewards=[{name: random}]"], ["process_supervision=true"]])
def test_settings_without_effect_are_refused(pairs: list[str]):
    with pytest.raises(UsageError, match="no effect"):
        parse_config(IterativeConfig, apply_overrides(read_yaml(ITERATIVE, "recipe.yaml"), pairs))
