"""PPO as a run: it learns, resumes with the same bits, and its value head stays out of what is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quest.cli.export import export_run
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.grpo import GrpoConfig
from llm_quest.recipes.recipe import load_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.techniques.score_head import ScoreHead
from llm_quest.techniques.value_head import find_value_head, find_value_model, remove_value_head
from tests.recipes.test_grpo import RECIPE, from_, rewards, run_grpo, warm  # noqa: F401
from tests.recipes.tuned import metrics, weights
from tests.recipes.two import recipe_by_two

PPO = ["loss_type=ppo", "num_generations=1", "prompts_per_rollout=64", "num_mini_batches=2"]


def test_ppo_learns_the_task_and_its_values(warm: Path, tmp_path: Path):  # noqa: F811
    out = tmp_path / "run"
    run_grpo(out, *from_(warm, *PPO, "max_steps=36", "learning_rate=2e-3"))
    found, rows = rewards(out), metrics(out)
    assert sum(found[-5:]) / 5 - sum(found[:5]) / 5 >= 0.2
    assert rows[0]["value/mean"] == 0.0
    assert rows[-1]["value/mean"] > 0.2
    assert rows[0]["log_ratio"] < 1e-5 < rows[1]["log_ratio"]
    export_run(out, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "llama"
    assert find_value_head(load(out)) is not None
    assert find_value_head(load(tmp_path / "exported")) is None


def test_a_run_resumed_in_the_middle_of_a_rollout_has_the_same_bits(warm: Path, tmp_path: Path):  # noqa: F811
    pairs = from_(
        warm, *PPO, "kl_coef=0.05", "kl_estimator=k1", "kl_placement=reward", "save_steps=1", "max_steps=4",
        "gae={lam: 0.9, whiten_rewards: true, vf_coef: 0.5}",
    )  # fmt: skip
    run_grpo(tmp_path / "straight", *pairs)
    first, second, third, last = metrics(tmp_path / "straight")
    for row in (first, third):
        assert 1 - 1e-4 < row["ratio/min"] <= row["ratio/max"] < 1 + 1e-4, "the first step of a rollout, by itself"
    for row in (second, last):
        assert row["ratio/min"] < 1 < row["ratio/max"]
    assert first["kl"] < 1e-6 < last["kl"], "KL in the reward is watched too"
    out = tmp_path / "stopped"
    shutil.copytree(tmp_path / "straight", out)
    for step in (4,):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    run_grpo(out, *pairs)
    assert weights(out, 4) == weights(tmp_path / "straight", 4)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_value_model_of_its_own_learns_and_leaves_the_policy_alone(optim: str, warm: Path, tmp_path: Path):  # noqa: F811
    """Values are learned; resumed in the middle the run has the same bits; with LoRA on the policy its base stays,
    though the value model's weights move; the export has neither."""
    out = tmp_path / "run"
    pairs = from_(warm, *PPO, "value_model=separate", "max_steps=4", "save_steps=1", f"optim={optim}",
                  "prompts_per_rollout=16", "techniques=[{name: lora, rank: 4}]", "kl_coef=0.01")  # fmt: skip
    run_grpo(out, *pairs)
    rows = metrics(out)
    assert rows[0]["value/mean"] == 0.0 != rows[-1]["value/mean"]
    model = load(out)
    assert find_value_model(model) is not None
    assert all(torch.equal(a, b) for a, b in zip(trunk(model), trunk(load(warm)), strict=True))  # LoRA alone learns
    assert not all(torch.equal(a, b) for a, b in zip(trunk(model.value_model), trunk(load(warm)), strict=True))
    shutil.copytree(out, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000004")
    run_grpo(tmp_path / "stopped", *pairs)
    assert weights(out, 4) == weights(tmp_path / "stopped", 4)
    export_run(out, tmp_path / "exported", merged=True)
    assert find_value_head(load(tmp_path / "exported")) is None


def trunk(model: Any) -> list[torch.Tensor]:
    """The parameters of the blocks, without adapters."""
    return [p for name, p in model.blocks.named_parameters() if ".edit" not in name]


def test_a_reward_model_is_where_the_values_begin(warm: Path, tmp_path: Path):  # noqa: F811
    """The first values are its scores of what was written so far; its weights belong to the run's identity."""
    reward = ScoreHead(1, std=0.5)(load(warm))
    save(reward, tmp_path / "reward", tokenizer=load_tokenizer(warm))
    pairs = from_(warm, *PPO, f"value_model.load={tmp_path / 'reward'}", "max_steps=1", "prompts_per_rollout=8")
    run_grpo(tmp_path / "run", *pairs)
    assert abs(metrics(tmp_path / "run")[0]["value/mean"]) > 1e-3
    assert "value_model.load" in json.loads((tmp_path / "run" / "env.json").read_text())["hashes"]
    policy = load(tmp_path / "run")
    assert remove_value_head(policy).spec.techniques == ()
    assert not [name for name, _ in policy.named_parameters() if "value" in name]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(engine: str, warm: Path, tmp_path: Path):  # noqa: F811
    """Rewards and advantages are whitened over the rows of both, and the value head learns the same."""
    pairs = [
        f"model.load={warm}", "task=reverse:shortest=3,longest=3,letters=8", *PPO,
        "prompts_per_rollout=16", "max_steps=2",
        "max_new_tokens=5", "eval_problems=4", "eval_steps=0", "precision=fp32", "logging_steps=1", "warmup_steps=0",
        "gae={whiten_rewards: true, vf_coef: 1.0}", "kl_coef=0.1", "kl_estimator=k1", "kl_placement=reward",
        "threads=1",
        "compile=false", "device=cpu", *(["value_model=separate"] if engine == "fsdp" else []),
    ]  # fmt: skip
    found, config, settings = load_recipe("grpo", pairs)
    run_recipe(found, config, settings, tmp_path / "one", quiet=True, log=lambda line: None)
    recipe_by_two("grpo", [*pairs, f"parallel={engine}"], tmp_path / "two")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "loss", "grad_norm", "value/error", "value/mean"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["gae={lam: 0.9}"], "gae has no effect with advantage_estimator=std; set advantage_estimator=gae"),
        (["loss_type=gspo", "advantage_estimator=gae"], "take loss_type=gspo_token"),
        (["loss_type=ppo", "process_supervision=true"], "process_supervision has advantages of its own"),
        (["num_generations=1"], "take at least 2"),
        (["value_model=separate"], "value_model has no effect with advantage_estimator=std"),
        (["loss_type=ppo", "value_model=seperate"], "value_model"),
    ],
)
def test_settings_without_sense_are_refused(pairs: list[str], said: str):
    with pytest.raises(UsageError, match=said):
        parse_config(GrpoConfig, apply_overrides(read_yaml(RECIPE, "recipe.yaml"), pairs))
