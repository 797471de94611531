"""GRPO over several turns: an environment of one's own, or an included one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm_quest.errors import BusyError, UsageError
from llm_quest.recipes.config import load_raw_config
from tests.recipes.test_grpo import from_, run_grpo, warm  # noqa: F401 (a fixture)
from tests.recipes.tuned import metrics, weights

ENVIRONMENT = '''
WORDS = ("abc", "fed", "bad", "cab", "hag", "gab", "fad", "ace")

class TwoWords:
    """Two words are to be reversed, one after the other; each letter in its place is paid."""

    def __init__(self, price=0.5):
        self.price = price

    def reset(self, row):
        self.left = [WORDS[row["index"] % 8], WORDS[(3 * row["index"] + 1) % 8]]
        return f"reverse({self.left[0]})="

    def step(self, completion):
        word = self.left.pop(0)[::-1]
        reward = self.price * sum(a == b for a, b in zip(completion, word)) / 3
        if self.left:
            return f"reverse({self.left[0]})=", reward, False
        return [], reward, True
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_env.py").write_text(ENVIRONMENT)
    return tmp_path / "my_env.py"


FEW = ("prompts_per_rollout=4", "num_generations=4", "eval_problems=4")


def environment_pairs(warm: Path, file: Path, *pairs: str) -> list[str]:  # noqa: F811
    return from_(warm, "task=null", f"environment={file}:TwoWords", "max_turns=2", *pairs)


def test_the_reward_of_an_environment_of_ones_own_rises(warm: Path, file: Path, tmp_path: Path):  # noqa: F811
    said: list[str] = []
    pairs = environment_pairs(warm, file, "max_steps=12", "learning_rate=4e-3", "kl_coef=0.01", "eval_problems=20")
    pairs.append("apply_chat_template=false")  # as it was taught: in another form no answer is right, and none is paid
    run_grpo(tmp_path / "run", *pairs, say=said.append)
    before, after = (float(line.split("reward ")[1].split()[0]) for line in said if line.startswith("held out"))
    assert after - before >= 0.1, said
    rows = metrics(tmp_path / "run")
    assert rows[0]["log_ratio"] < 1e-5
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"]
    assert 1 < rows[-1]["completions/mean_turns"] <= 2
    assert any(line.startswith("held out, after") and "KL" in line for line in said)


@pytest.mark.parametrize("variant", ["dr_grpo", "gspo"])
def test_a_run_with_episodes_resumed_in_the_middle_of_a_rollout_has_the_same_bits(
    variant: str, warm: Path, file: Path, tmp_path: Path  # noqa: F811
):  # fmt: skip
    pairs = environment_pairs(
        warm, file, f"loss_type={variant}", "num_iterations=2", "kl_coef=0.01", "save_steps=1", "max_steps=4", *FEW
    )
    run_grpo(tmp_path / "straight", *pairs)
    out = tmp_path / "stopped"
    shutil.copytree(tmp_path / "straight", out)
    for step in (2, 3, 4):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    run_grpo(out, *pairs)
    assert weights(out, 4) == weights(tmp_path / "straight", 4)


def test_an_included_environment_plays_with_a_reward_function_beside_it(warm: Path, tmp_path: Path):  # noqa: F811
    (tmp_path / "r.py").write_text("def turns(completions): return [float(len(one)) for one in completions]\n")
    both = f"rewards=[{{name: environment}}, {{function: {tmp_path}/r.py:turns, weight: 0.1}}]"
    pairs = from_(warm, "task=null", "environment=guessing_game", "environment_kwargs={high: 3}", both, "max_steps=2")
    run_grpo(tmp_path / "run", *pairs, *FEW)
    assert {"rewards/environment", "rewards/turns"} <= set(metrics(tmp_path / "run")[-1])


def test_a_calculator_asks_the_tasks_questions(warm: Path, tmp_path: Path):  # noqa: F811
    pairs = from_(warm, "task=addition", "environment=calculator", "max_steps=1", "max_turns=2", *FEW)
    run_grpo(tmp_path / "run", *pairs)
    assert metrics(tmp_path / "run")[0]["reward"] >= 0


TOOL = '''
def double(x: int) -> int:
    """Doubles.

    Args:
        x: a number
    """
    return 2 * x
'''


def test_functions_of_ones_own_are_tools(warm: Path, tmp_path: Path):  # noqa: F811
    """They are told, and belong to the run's identity."""
    file, said = tmp_path / "my_tools.py", []
    file.write_text(TOOL)
    functions = f"environment_kwargs={{functions: ['{file}:double']}}"
    pairs = from_(warm, "task=addition", "environment=functions", functions, "max_steps=1", *FEW)
    run_grpo(tmp_path / "run", *pairs, "max_turns=2", say=said.append)
    assert "tools: double; which this chat template does not show" in said
    file.write_text(TOOL.replace("2 * x", "3 * x"))
    with pytest.raises(BusyError, match="environment"):
        run_grpo(tmp_path / "run", *pairs, "max_turns=2")
    with pytest.raises(UsageError, match=r"environment_kwargs\.functions: name the tools"):
        run_grpo(tmp_path / "other", *from_(warm, "task=addition", "environment=functions"))


def test_a_changed_environment_does_not_resume(warm: Path, file: Path, tmp_path: Path):  # noqa: F811
    pairs = environment_pairs(warm, file, "max_steps=1", *FEW)
    run_grpo(tmp_path / "run", *pairs)
    file.write_text(ENVIRONMENT.replace("/ 3", "/ 4"))
    with pytest.raises(BusyError, match="environment"):
        run_grpo(tmp_path / "run", *pairs)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["environment=guess_game"], "did you mean 'guessing_game'"),
        (["environment=no_file.py:Env"], "cannot be read"),
        (["environment=guessing_game", "environment_kwargs={hihg: 3}"], "did you mean 'high'"),
        (["environment=calculator"], "calculator needs questions with answers"),
        (
            ["environment=guessing_game", "attention_coef=0.5", "num_iterations=2"],
            "attention_coef is for single answers",
        ),
        (["max_turns=7"], "max_turns has no effect without environment"),
        (["rewards=[{name: environment}]"], "the reward environment comes from an environment"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(pairs: list[str], said: str, tmp_path: Path):
    with pytest.raises(UsageError, match=said):
        run_grpo(tmp_path / "run", *from_(Path("nowhere"), "task=null", *pairs))


def test_an_environment_on_the_command_line_takes_the_place_of_the_recipes_task():
    assert "task" not in load_raw_config("grpo", ["model.load=X", "environment=guessing_game"]).tree
    assert load_raw_config("grpo", ["environment=calculator", "task=addition"]).tree["task"] == "addition"
