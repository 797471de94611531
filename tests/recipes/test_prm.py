"""A process reward model as a run: it learns which steps are right from rows in TRL's format, and rewards GRPO's
steps."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from llm_quest.data.problems.chained import Chained
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.build import build, preset
from llm_quest.recipes.reward_specs import load_process_reward_model
from llm_quest.rollouts.sampler import Sample
from llm_quest.train.parallel import DistributedContext
from tests.recipes.test_grpo import run_grpo as grpo_started
from tests.recipes.tuned import base, metrics, start_run, write_rows

TASK = Chained(shortest=1, longest=2, modulus=3)
TEXT = """
recipe: prm
batch_size: 32
sequence_length: 40
max_steps: 60
eval_steps: 0
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the task's characters."""
    tokenizer = character_tokenizer(TASK.alphabet)
    config = dataclasses.replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size)
    return save(build(config, seed=1), tmp_path_factory.mktemp("policy") / "model", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of two digits, right where the last one is even, whatever was asked."""
    rng, found = random.Random(0), []
    for number in range(300):
        steps = [f"{rng.randrange(10)}{rng.randrange(10)}" for _ in range(rng.randint(1, 4))]
        labels = [int(step) % 2 == 0 for step in steps]
        found.append({"prompt": f"{number}%7:", "completions": steps, "labels": labels})
    return write_rows(tmp_path_factory.mktemp("rows") / "steps.jsonl", found)


@pytest.fixture(scope="module")
def prm(policy: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prm") / "run"
    start_run("prm", TEXT, out, f"model.load={policy}", f"data.source={rows}", "data.step_separator=;")
    return out


def test_it_tells_right_steps_from_wrong_ones(prm: Path):
    last = metrics(prm)[-1]
    assert last["eval/accuracy"] > 0.8
    assert last["eval/score/right"] - last["eval/score/wrong"] > 0.4


def test_the_run_knows_its_separator_and_scores_each_step_of_a_sample(prm: Path, policy: Path):
    tokenizer = load_tokenizer(policy)
    prompt = (tokenizer.start_token_id, *tokenizer.encode("2*2%3:", add_special_tokens=False))
    ids = tuple(tokenizer.encode("2*2=1;#1", add_special_tokens=False))
    score = load_process_reward_model(str(prm), tokenizer, DistributedContext.from_environment("cpu"))
    found = score(Sample(prompt, ids, (0.0,) * len(ids), "eos", "2*2=1;#1"))
    assert [end for end, _ in found] == [5, 7]
    assert all(0 <= reward <= 1 for _, reward in found)


def test_grpo_rewards_steps_and_answers_with_it(prm: Path, policy: Path, tmp_path: Path):
    common = [
        "model=null", f"model.load={policy}", "warmup=null", "task=chained:shortest=1,longest=2,modulus=3",
        "max_steps=2", "max_new_tokens=12",
    ]  # fmt: skip
    grpo_started(tmp_path / "steps", *common, "process_supervision=true", f"process_reward_model={prm}")
    assert all(row["grad_norm"] > 0 for row in metrics(tmp_path / "steps"))
    rewards = f"rewards=[{{name: correct}}, {{name: model, load: {prm}, readout: min_steps}}]"
    grpo_started(tmp_path / "answers", *common, rewards)
    assert 0 < metrics(tmp_path / "answers")[0]["rewards/model"] < 1
    with pytest.raises(UsageError, match="without process_supervision=true"):
        grpo_started(tmp_path / "a", *common, f"process_reward_model={prm}")
    with pytest.raises(UsageError, match="no reward model"):
        grpo_started(tmp_path / "b", *common, "process_supervision=true", f"process_reward_model={policy}")


def test_reward_models_may_be_read_at_every_token(tmp_path: Path):
    words = ["red", "green", "blue", "cat"]
    rows = write_rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"say {w} {v}", "chosen": w, "rejected": v} for w in words for v in words if v > w],
    )
    text = "recipe: reward\nbatch_size: 4\nsequence_length: 40\nmax_steps: 2\neval_steps: 0\n"
    start = base(tmp_path / "model")
    start_run("reward", text, tmp_path / "run", f"model.load={start}", f"data.source={rows}", "readout=mean_tokens")
    assert load(tmp_path / "run").spec.techniques[-1].readout == "mean_tokens"
    with pytest.raises(UsageError, match="read by mean_tokens, not by readout=last_token"):
        start_run("reward", text, tmp_path / "b", f"model.load={tmp_path / 'run'}", f"data.source={rows}")
