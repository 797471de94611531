"""GRPO on prompts and rewards of one's own: rows of a file, functions of a Python file, held-out reward."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import BusyError, DataError, GuardStop, UsageError
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.recipes.config import load_raw_config
from llm_quest.recipes.dependent_defaults import OPEN_ANSWERS
from llm_quest.recipes.policy_prompts import ProblemSet, PromptEncoder, make_prompt
from llm_quest.recipes.reward_specs import RewardSpec, check_labels, reward_file_hashes, reward_labels
from tests.recipes.test_grpo import from_, run_grpo, warm  # noqa: F401 (a fixture)
from tests.recipes.tuned import metrics
from tests.rollouts.test_judge_reward import TEMPLATE, Server, server  # noqa: F401 (a fixture)

REWARDS = '''
def score(completions, word, **kwargs):
    """The share of letters that stand where the reversed word has them."""
    return [sum(a == b for a, b in zip(text, w[::-1])) / len(w) for text, w in zip(completions, word)]

def short(completions, level):
    return [None if one == "none" else float(len(text) == 3) for text, one in zip(completions, level)]

def broken(completions):
    raise ValueError("always")

def sometimes(completions, calls=[]):
    calls.append(1)
    return [1.0] * len(completions) if len(calls) % 2 else 1 / 0
'''


def write_rows(folder: Path, number: int = 120, **more: Any) -> Path:
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefgh", k=3)) for _ in range(number)]
    rows = [{"prompt": f"reverse({word})=", "word": word, "level": "all", **more} for word in words]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def row_settings(warm: Path, folder: Path, *pairs: str, reward: str = "score") -> list[str]:  # noqa: F811
    rewards = f"rewards=[{{function: {folder}/my_rewards.py:{reward}}}]"
    return from_(warm, "task=null", f"data={{source: {folder}/prompts.jsonl}}", rewards, *pairs)


def test_a_function_of_ones_own_teaches_on_prompts_of_ones_own(warm: Path, tmp_path: Path):  # noqa: F811
    """Held-out reward rises, before and after are printed, and the metrics have it."""
    said: list[str] = []
    folder, out = write_rows(tmp_path), tmp_path / "run"
    run_grpo(out, *row_settings(warm, folder, "max_steps=30", "eval_steps=15"), say=said.append)
    assert any("to train on" in line and "0 with an answer" in line for line in said)
    before, after = (float(line.split("reward ")[1].split()[0]) for line in said if line.startswith("held out"))
    assert after - before >= 0.1
    assert "accuracy" not in "".join(line for line in said if line.startswith("held out"))
    looked = [row for row in metrics(out) if "eval/reward" in row]
    assert looked[-1]["eval/reward"] == pytest.approx(after, abs=1e-3)


def test_several_rewards_have_a_curve_each(warm: Path, tmp_path: Path):  # noqa: F811
    folder = write_rows(tmp_path, answer="abc")
    both = f"[{{name: correct}}, {{function: {folder}/my_rewards.py:short, weight: 0.5}}]"
    run_grpo(tmp_path / "run", *row_settings(warm, folder, f"rewards={both}", "kl_coef=0.01"))
    row = metrics(tmp_path / "run")[0]
    assert row["reward"] == pytest.approx(row["rewards/correct"] + 0.5 * row["rewards/short"], abs=1e-6)
    last = metrics(tmp_path / "run")[-1]
    assert {"eval/reward", "eval/rewards/correct", "eval/rewards/short", "eval/accuracy", "kl"} <= set(last)


def test_a_reward_that_applies_to_no_row_teaches_nothing(warm: Path, tmp_path: Path):  # noqa: F811
    folder = write_rows(tmp_path, level="none")
    with pytest.raises(GuardStop, match="no sample could be scored"):
        run_grpo(
            tmp_path / "run", *row_settings(warm, folder, "max_steps=120", "diagnostics_patience=2", reward="short")
        )


def test_failures_are_told_and_a_run_goes_on_unless_all_fail(warm: Path, tmp_path: Path):  # noqa: F811
    said: list[str] = []
    folder = write_rows(tmp_path)
    run_grpo(tmp_path / "run", *row_settings(warm, folder, reward="sometimes"), say=said.append)
    assert len([line for line in said if "ZeroDivisionError" in line]) == 1
    assert any(line.startswith("the reward sometimes failed, exception:") for line in said)
    assert len(metrics(tmp_path / "run")) == 4
    with pytest.raises(GuardStop, match="failed on 5 batches in a row"):
        run_grpo(tmp_path / "other", *row_settings(warm, folder, "max_steps=20", reward="broken"))


def test_a_judge_behind_a_url_is_asked_for_every_completion(warm: Path, tmp_path: Path, server: Server):  # noqa: F811
    folder = write_rows(tmp_path)
    (folder / "judge.txt").write_text(TEMPLATE)
    judge = f"rewards=[{{judge: '{server.url}', model: m, prompt: {folder}/judge.txt}}]"
    run_grpo(tmp_path / "run", *row_settings(warm, folder, judge, "max_steps=1", "eval_problems=5"))
    assert 0 < metrics(tmp_path / "run")[0]["reward"] < 5
    (folder / "judge.txt").write_text(TEMPLATE + " Be strict.")
    with pytest.raises(BusyError, match="reward judge"):
        run_grpo(tmp_path / "run", *row_settings(warm, folder, judge, "max_steps=1", "eval_problems=5"))


def test_a_changed_reward_function_does_not_resume(warm: Path, tmp_path: Path):  # noqa: F811
    folder = write_rows(tmp_path)
    run_grpo(tmp_path / "run", *row_settings(warm, folder, "max_steps=2"))
    run_grpo(tmp_path / "run", *row_settings(warm, folder, "max_steps=2"))
    (folder / "my_rewards.py").write_text(REWARDS.replace("3)", "4)"))
    with pytest.raises(BusyError, match="reward score"):
        run_grpo(tmp_path / "run", *row_settings(warm, folder, "max_steps=2"))


def test_a_reward_that_needs_answers_is_refused_on_rows_without(warm: Path, tmp_path: Path):  # noqa: F811
    folder = write_rows(tmp_path)
    with pytest.raises(DataError, match=r"has no answer, ground_truth or solution, which the reward correct"):
        run_grpo(tmp_path / "run", *row_settings(warm, folder, "rewards=[{name: correct}]"))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["task=reverse"], "task and data both say what is asked"),
        (["model={family: llama}"], "give model.load=FOLDER"),
        (["rewards=[{function: nowhere.py:f}]"], "cannot be read"),
        (["rewards=[{function: my_rewards:f}]"], "write FILE.py:NAME"),
        (["rewards=[{weight: 2.0}]"], "exactly one of name, function, judge"),
        (["rewards=[{name: correct, timeout_seconds: 2}]"], "timeout_seconds has no effect for a reward of a name"),
        (["rewards=[{judge: http://localhost/v1}]"], "a judge needs the name of its model and its prompt"),
        (["rewards=[{judge: localhost}]"], "judge"),
        (["rewards=[{judge: http://a/v1, model: m, prompt: nowhere.txt}]"], "nowhere.txt cannot be read"),
        (["rewards=[{name: correct}, {name: correct, weight: 2}]"], "two rewards are called correct"),
        (["answer_form=box"], "did you mean 'boxed'"),
    ],
)
def test_a_mistake_is_named_before_anything_is_read(pairs: list[str], said: str, tmp_path: Path):
    folder = write_rows(tmp_path)
    settings = from_(Path("nowhere"), "task=null", f"data={{source: {folder}/prompts.jsonl}}")
    with pytest.raises(UsageError, match=said) as raised:
        run_grpo(tmp_path / "run", *settings, *pairs)
    assert len(str(raised.value).splitlines()) == 1, "one mistake, one line"


def test_prompts_that_leave_no_room_for_an_answer_are_told(warm: Path, tmp_path: Path):  # noqa: F811
    folder, word = write_rows(tmp_path), "a" * 300
    long = json.dumps({"prompt": f"reverse({word})=", "word": word, "level": "all"})
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "held.jsonl").write_text("\n".join([*lines[:4], long]))
    (folder / "prompts.jsonl").write_text("\n".join([*lines[4:16], long]))
    said: list[str] = []
    pairs = row_settings(warm, folder, f"data.validation={folder}/held.jsonl", "max_steps=1")
    run_grpo(tmp_path / "run", *pairs, say=said.append)
    told = [line for line in said if "no room for an answer" in line]
    assert [re.sub(r"[0-9,]+ tokens", "N tokens", line) for line in told] == [
        "held-out prompts of more than N tokens, which leave no room for an answer: 1 left out",
        "prompts of more than N tokens leave no room for an answer and are skipped; the first has 311",
    ]
    (folder / "held.jsonl").write_text(long)
    with pytest.raises(DataError, match=r"every held-out prompt has more than [0-9]+ tokens"):
        run_grpo(tmp_path / "other", *pairs)


def test_two_rewards_of_one_name_have_curves_and_hashes_of_their_own(tmp_path: Path):
    folder = write_rows(tmp_path)
    (folder / "other.py").write_text(REWARDS + "# another")
    files = [f"{folder}/{name}.py:score" for name in ("my_rewards", "other")]
    specs = [*(RewardSpec(function=file) for file in files), *(RewardSpec(name="model", load=one) for one in "ab")]
    check_labels(specs)
    assert reward_labels(specs) == ["score", "score_2", "model", "model_2"]
    hashes = reward_file_hashes(specs)
    assert list(hashes) == ["reward score", "reward score_2"]
    assert len(set(hashes.values())) == 2


def test_rows_on_the_command_line_take_the_place_of_the_recipes_task():
    tree = load_raw_config("grpo", ["model.load=X", "data.source=a.jsonl"]).tree
    assert "task" not in tree
    assert "warmup" not in tree
    assert load_raw_config("grpo", ["task=countdown"]).tree["task"] == "countdown"


def test_answers_that_a_model_judges_do_not_have_the_settings_of_the_recipes_toy_task(tmp_path: Path):
    """Eight tokens are no answer, and 1e-3 is no rate for a model that somebody brings; what is given stays, and so
    does a file of one's own."""
    mine = ["model.load=X", "data.source=a.jsonl", "rewards=[{name: model, load: RM}]"]
    tree = load_raw_config("grpo", mine).tree
    assert {key: tree[key] for key in OPEN_ANSWERS} == OPEN_ANSWERS
    given = load_raw_config("grpo", [*mine, "max_new_tokens=9", "kl_coef=0"]).tree
    assert (given["max_new_tokens"], given["kl_coef"], "kl_estimator" in given) == (9, 0, False)
    toy = load_raw_config("grpo").tree
    for pairs in (["model.load=X", "data.source=a.jsonl", "rewards=[{function: a.py:score}]"], mine[:1] + mine[2:]):
        assert load_raw_config("grpo", pairs).tree["max_new_tokens"] == toy["max_new_tokens"]
    (tmp_path / "own.yaml").write_text("recipe: grpo\nmax_new_tokens: 7\n")
    assert load_raw_config(str(tmp_path / "own.yaml"), mine).tree["max_new_tokens"] == 7


def test_prompts_are_rendered_many_at_a_time_with_a_system_prompt(monkeypatch: pytest.MonkeyPatch):
    from llm_quest.data.chat import ChatTemplate
    from llm_quest.data.problems import TaskSplit, parse_task

    task = parse_task("reverse")
    tokenizer, calls = character_tokenizer(task.alphabet), list[int]()
    chat = ChatTemplate(tokenizer)
    monkeypatch.setattr(
        chat, "encode_prompts", lambda asked, *tools: calls.append(len(asked)) or [[len(str(one))] for one in asked]
    )
    encode = PromptEncoder(tokenizer, chat)
    problems = ProblemSet(lambda index: TaskSplit(task)(0, index), [], "")
    for index in range(80):
        make_prompt(problems, encode, index)
    assert len(calls) == 2
    assert encode.messages(problems.train_problem(0))[0] == {
        "role": "system",
        "content": "Answer with the result alone.",
    }
    assert PromptEncoder(tokenizer, chat, "").messages(problems.train_problem(0))[0]["role"] == "user"


def test_an_epoch_is_every_prompt_once(warm: Path, tmp_path: Path):  # noqa: F811
    """Of 36 prompts, 8 at a time with two steps each; the same command goes on with the same run, and ends it."""
    said: list[str] = []
    pairs = row_settings(warm, write_rows(tmp_path, 40), "num_train_epochs=1", "prompts_per_rollout=8",
                "num_iterations=2",
                "eval_problems=4", "save_steps=2")  # fmt: skip
    outcome = run_grpo(tmp_path / "run", *pairs, say=said.append)
    assert "epochs: 1 of 36 rows, 8 at a time and 2 steps each, are 10 steps" in said
    assert (outcome.status, outcome.step) == ("finished", 10)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000010" / "state.json").read_text())
    assert 36 <= state["loaders"][0]["num_prompts_taken"] <= 40
    assert run_grpo(tmp_path / "run", *pairs).steps == 10
    longer = run_grpo(tmp_path / "run", *[one.replace("epochs=1", "epochs=1.2") for one in pairs], say=said.append)
    assert (longer.steps, longer.step) == (12, 12)
    with pytest.raises(UsageError, match="num_train_epochs has no effect on rows that are drawn without end"):
        run_grpo(tmp_path / "other", *from_(warm, "num_train_epochs=1"))


def test_a_policy_stops_early_and_keeps_its_best(warm: Path, tmp_path: Path):  # noqa: F811
    """A reward that only falls while the policy moves: the first measured one is the best."""
    pairs = row_settings(warm, write_rows(tmp_path), "max_steps=30", "eval_steps=2", "learning_rate=0.5",
                "max_grad_norm=null",
                "metric_for_best_model=eval/reward", "early_stopping_patience=2", "load_best_model_at_end=true",
                "eval_problems=8", "save_steps=0")  # fmt: skip
    outcome = run_grpo(tmp_path / "run", *pairs)
    looked = {row["step"]: row["eval/reward"] for row in metrics(tmp_path / "run") if "eval/reward" in row}
    best = max(looked, key=lambda step: (looked[step], -step))
    assert outcome.step < 30
    assert len(looked) < 15
    assert outcome.metrics["eval/reward"] == pytest.approx(looked[best])
    assert resolve_checkpoint(f"{tmp_path / 'run'}@best").name == f"step-{best:08d}"
