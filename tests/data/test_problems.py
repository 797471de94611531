from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest

from llm_quest.data.problems import TASKS, TaskSplit, draw_problem, make_task, teacher_demonstration
from llm_quest.data.problems.addition import add_without_carry
from llm_quest.data.problems.gsm8k import GSM8K_ANSWER_MARK, read_gsm8k, split_gsm8k_validation
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import DataError, UsageError
from llm_quest.rollouts.verifiers import is_well_formed, verify_answer

every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_the_same_seed_and_index_give_the_same_problem_and_others_give_others(name: str) -> None:
    made = make_task(name)
    assert draw_problem(made, "train", 5, 1) == draw_problem(made, "train", 5, 1) == TaskSplit(made)(1, 5)
    keys = [draw_problem(made, "train", index, seed).key for seed in (0, 1) for index in range(30)]
    assert len(set(keys)) > 40, "seeds and indices must not share items"
    assert [draw_problem(made, "train", i, 1).key for i in range(29)] != [
        draw_problem(made, "train", i, 0).key for i in range(1, 30)
    ]


@every_task
def test_no_problem_stands_in_two_splits(name: str) -> None:
    made = make_task(name)
    keys = {part: {draw_problem(made, part, i).key for i in range(150)} for part in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


@every_task
def test_a_demonstration_is_right_and_written_in_the_alphabet(name: str) -> None:
    made = make_task(name)
    tokenizer = character_tokenizer(made.alphabet)
    for index in range(100):
        problem = draw_problem(made, "train", index)
        text = teacher_demonstration(made, problem, index)
        assert verify_answer(problem, text) == 1.0, (problem, text)
        ids = tokenizer.encode(problem.prompt + text)
        assert len(ids) == len(problem.prompt + text)
        assert tokenizer.decode(ids) == problem.prompt + text


@pytest.mark.parametrize("name", ["addition", "chained"])
def test_a_noisy_teacher_is_wrong_about_as_often_as_said_and_in_good_form(name: str) -> None:
    made = make_task(name, {"noise": 0.5})
    pairs = [(draw_problem(made, "train", i), i) for i in range(400)]
    texts = [(problem, teacher_demonstration(made, problem, i)) for problem, i in pairs]
    wrong = sum(verify_answer(problem, text) == 0.0 for problem, text in texts)
    assert 100 < wrong < 350
    assert all(is_well_formed(problem, text) for problem, text in texts)


def test_without_carry_is_the_teachers_shortcut() -> None:
    assert [add_without_carry(47, 85), add_without_carry(5, 5), add_without_carry(12, 7)] == ["22", "0", "19"]


def test_harder_problems_are_another_set() -> None:
    four = [draw_problem(make_task("countdown", {"count": 4}), "test", i) for i in range(20)]
    assert all(len(problem.numbers) == 4 for problem in four)


def test_a_task_or_option_that_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'countdown'"):
        make_task("countdwn")
    with pytest.raises(UsageError, match="no option size; it has count, largest"):
        make_task("countdown", {"size": 3})
    with pytest.raises(UsageError, match="so few different problems"):
        draw_problem(make_task("reverse", {"shortest": 1, "longest": 1, "letters": 1}), "test", 0)


def test_letters_are_drawn_evenly() -> None:
    made = make_task("reverse")
    counts = collections.Counter("".join(draw_problem(made, "train", i).key for i in range(600)))
    assert set(counts) == set("abcdefghij")
    assert max(counts.values()) < 1.4 * min(counts.values())


def test_gsm8k_rows_are_read_and_their_worked_answers_are_right(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\nSo.\n#### 1,072"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (problem,) = read_gsm8k(tmp_path / "a.jsonl")
    assert (problem.prompt, problem.answer, problem.steps) == ("How many?", "1072", ("48/2 = 24 clips.", "So."))
    assert verify_answer(problem, "\n".join([*problem.steps, f"{GSM8K_ANSWER_MARK} {problem.answer}"])) == 1.0
    assert verify_answer(problem, "#### 1,072") == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no problems"), ("{", "a.jsonl:1"), ('{"question": "a"}', "a.jsonl:1"), ("[1]", "a.jsonl:1"),
        ('{"question": "a", "answer": "5"}', "no #### before"),
        ('{"question": "a", "answer": null}', "a.jsonl:1: answer is None; expected an object"),
        ('{"question": ["a"], "answer": "#### 5"}', "a.jsonl:1: question is"),
        ('{"question": "a\\ud83d", "answer": "#### 5"}', "a.jsonl:1: .* is half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_gsm8k_is_told_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_gsm8k(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="there is no file"):
        read_gsm8k(tmp_path / "b.jsonl")
    good = json.dumps({"question": "a", "answer": "#### 5"})
    (tmp_path / "c.jsonl").write_text(f"{good}\n{text or '1'}")
    with pytest.raises(DataError, match="; repair or remove them"):  # data.strict is no key of a task
        read_gsm8k(tmp_path / "c.jsonl")


def test_held_out_questions_are_chosen_by_their_text(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_gsm8k(tmp_path / "a.jsonl")
    train, kept = split_gsm8k_validation(problems, 0.1)
    assert 20 < len(kept) < 60
    assert len(train) + len(kept) == 400
    assert {p.key for p in split_gsm8k_validation(problems[::-1], 0.1)[1]} == {p.key for p in kept}


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_a_line_of_gsm8k_ends_at_its_line_end_alone(mark: str, tmp_path: Path) -> None:
    row = {"question": f"One{mark}and two?", "answer": "One and two is <<1+2=3>>3.\n#### 3"}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(row, ensure_ascii=False)] * 2), encoding="utf-8")
    assert [problem.prompt for problem in read_gsm8k(tmp_path / "a.jsonl")] == [row["question"]] * 2


def test_a_file_of_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "caf\xe9", "answer": "#### 5"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl"):
        read_gsm8k(tmp_path / "a.jsonl")
