"""A reward from a user's file: TRL's signature, and every way in which it may fail."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_quest.data.problems import Problem
from llm_quest.errors import GuardStop, UsageError
from llm_quest.rollouts.function_reward import FunctionReward, reward_arguments
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.user_code import check_reference, hash_user_code
from llm_quest.rollouts.worker_process import MAX_FAILED_BATCHES

FILE = """
import asyncio
import sys
import time
from helper import BONUS

def score(completions, prompts, answer, **kwargs):
    assert set(kwargs) == {"completion_ids", "level"}, sorted(kwargs)
    return [BONUS * (text == right) for text, right in zip(completions, answer)]

def lengths(completion_ids):
    return tuple(len(ids) for ids in completion_ids)

async def waits(completion_ids):
    await asyncio.sleep(0)
    return [len(ids) for ids in completion_ids]

def none(completions):
    return [None if text == "x" else 1 for text in completions]

def chat(prompts, completions):
    return [float(p[-1]["role"] == "user" and c[0]["content"] == "b") for p, c in zip(prompts, completions)]

def raises(completions):
    print("this goes to stderr")
    raise KeyError("no such gold")

def hangs(completions):
    time.sleep(1000)

def exits(completions):
    import os
    os._exit(3)

def quits(completions):
    sys.exit("enough")

def short(completions):
    return [1.0]

def nothing(completions):
    return None

def text(completions):
    return ["good"] * len(completions)

def infinite(completions):
    return [float("nan"), float("inf"), 1.0]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "helper.py").write_text("BONUS = 2.0\n")
    (folder / "my_rewards.py").write_text(FILE)
    return folder / "my_rewards.py"


def sample(text: str, *, conversational: bool = False, **columns: object) -> Sample:
    messages = ({"role": "user", "content": "a?"},)
    problem = Problem("a?", "", "equal", "", messages=messages, is_conversational=conversational, columns=columns)
    return Sample((1,), tuple(map(ord, text)), (0.0,) * len(text), "eos", text, problem)


BATCH = [sample("one", answer="one", level=1), sample("x", answer="y", level=2), sample("four", answer="four", level=1)]


def test_a_function_gets_completions_prompts_and_every_column_and_may_import_its_neighbors(file: Path):
    reward = FunctionReward(f"{file}:score")
    assert reward(BATCH) == [2.0, 0.0, 2.0]
    assert reward([]) == []
    assert reward.summary() == ""
    reward.worker.close()


def test_a_function_without_kwargs_gets_what_it_names(file: Path):
    assert FunctionReward(f"{file}:lengths")(BATCH) == [3.0, 1.0, 4.0]
    assert FunctionReward(f"{file}:waits")(BATCH) == [3.0, 1.0, 4.0]


def test_none_does_not_apply_and_is_no_failure(file: Path):
    reward = FunctionReward(f"{file}:none")
    assert [math.isnan(value) for value in reward(BATCH)] == [False, True, False]
    assert reward.summary() == ""


def test_rows_of_messages_are_given_as_messages(file: Path):
    batch = [sample("b", conversational=True), sample("c", conversational=True)]
    assert FunctionReward(f"{file}:chat")(batch) == [1.0, 0.0]
    assert reward_arguments(batch)["prompts"] == [[{"role": "user", "content": "a?"}]] * 2


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("raises", "exception", r"my_rewards.py:\d+: KeyError: 'no such gold'"),
        ("quits", "exception", "SystemExit: enough"),
        ("hangs", "hang", "took longer than 1 s"),
        ("exits", "crash", "its process ended"),
        ("short", "wrong length", "1 values for 3 completions"),
        ("nothing", "wrong length", "a NoneType for 3 completions"),
        ("text", "no number", "'good'"),
    ],
)
def test_a_failure_costs_its_batch_and_is_counted_and_told_once(file: Path, name: str, kind: str, said: str):
    lines: list[str] = []
    reward = FunctionReward(f"{file}:{name}", timeout_seconds=1.0, log=lines.append)
    for _ in range(2):
        assert all(math.isnan(value) for value in reward(BATCH))
    assert len(lines) == 1
    assert re.search(said, lines[0])
    assert reward.summary() == f"{kind}: 2"
    reward.worker.close()


def test_values_that_are_not_finite_are_counted_and_the_others_hold(file: Path):
    reward = FunctionReward(f"{file}:infinite", log=lambda line: None)
    values = reward(BATCH)
    assert values[2] == 1.0
    assert all(map(math.isnan, values[:2]))
    assert reward.summary() == "NaN: 1"


def test_a_reward_of_which_every_batch_fails_ends_the_run(file: Path):
    reward = FunctionReward(f"{file}:raises", log=lambda line: None)
    for _ in range(MAX_FAILED_BATCHES - 1):
        reward(BATCH)
    with pytest.raises(GuardStop, match=f"failed on {MAX_FAILED_BATCHES} batches in a row.*no such gold"):
        reward(BATCH)


@pytest.mark.parametrize(
    ("content", "reference", "said"),
    [
        (None, "{}:score", "cannot be read"),
        ("def f(:\n", "{}:f", "is not Python"),
        ("def scor(): pass\n", "{}:score", r"has no 'score'; it has scor"),
        ("", "rewards", r"write FILE.py:NAME"),
        ("", "{}:a b", r"write FILE.py:NAME"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_it_runs(
    content: str | None, reference: str, said: str, tmp_path: Path
):
    file = tmp_path / "r.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=said):
        check_reference(reference.format(file))


def test_a_file_whose_import_fails_is_named_with_the_line(tmp_path: Path):
    file = tmp_path / "r.py"
    file.write_text("def score(completions): return []\nimport no_such_package\n")
    with pytest.raises(UsageError, match=r"r.py:2: ModuleNotFoundError: No module named 'no_such_package'"):
        FunctionReward(f"{file}:score").worker.start()


def test_another_text_of_the_file_has_another_hash(tmp_path: Path):
    file = tmp_path / "r.py"
    file.write_text("def score(): pass")
    before = hash_user_code(f"{file}:score")
    file.write_text("def score(): pass  # other")
    assert hash_user_code(f"{file}:score") != before


@pytest.mark.parametrize(
    ("said", "module"),
    [
        ("import helper", "helper.py"),
        ("def score():\n    from helper import count", "helper.py"),
        ("from parts import words", "parts/words.py"),
        ("import parts.words", "parts/__init__.py"),
        ("import first", "helper.py"),
        ("from parts.deep.first import f", "parts/words.py"),
    ],
)
def test_a_module_beside_the_file_that_it_imports_is_part_of_its_hash(said: str, module: str, tmp_path: Path):
    texts = {"r.py": said, "first.py": "import helper", "helper.py": "", "parts/__init__.py": "", "parts/words.py": ""}
    texts |= {"parts/deep/__init__.py": "", "parts/deep/first.py": "from .. import words", "not_imported.py": ""}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = hash_user_code(f"{tmp_path}/r.py:score")
    (tmp_path / "not_imported.py").write_text("other")
    assert hash_user_code(f"{tmp_path}/r.py:score") == before
    (tmp_path / module).write_text("other = 1")
    assert hash_user_code(f"{tmp_path}/r.py:score") != before


def test_the_processes_of_a_users_code_and_of_a_verifier_import_no_torch():
    modules = "llm_quest.rollouts.function_reward, llm_quest.rollouts.verifier_process"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
