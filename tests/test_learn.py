"""Exercises and games of the book: the right answer passes, each typical mistake is told apart by its own hint, and a
game's wrong line is found by the law that it shows."""

from __future__ import annotations

import re

import pytest
import torch

from book import learn
from book.exercises import EXERCISES
from book.exercises.exercise import judge
from book.games import GAMES
from book.source import PACKAGE
from llm_quest.cli.book import run_lesson
from llm_quest.errors import ResourceError, UsageError

CHAPTERS = {file.stem.split("-", 1)[1] for file in (PACKAGE.parent / "book/chapters").glob("*.md")}


@pytest.mark.parametrize("name", EXERCISES)
def test_every_typical_mistake_of_an_exercise_has_its_own_hint(name):
    exercise = EXERCISES[name]
    assert exercise.chapter in CHAPTERS
    assert len(exercise.mistakes) >= 5
    assert len({one.hint for one in exercise.mistakes}) == len(exercise.mistakes)
    assert judge(exercise, exercise.reference).right
    for mistake in exercise.mistakes:
        found = judge(exercise, mistake.function)
        assert not found.right, mistake.hint
        assert found.lines == (mistake.hint,)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_python_that_says_nothing_is_written_yet(name):
    space: dict = {}
    exec(compile(EXERCISES[name].stub(), name, "exec"), space)
    found = judge(EXERCISES[name], space[name])
    assert not found.right
    assert "nothing is written yet" in found.lines[0]


@pytest.mark.parametrize(("answer", "said"), [
    (lambda x: x * 0, "largest difference"), (lambda x: x[..., :2], "shape is"), (lambda x: None, "returns nothing"),
    (lambda x: {}, "a dict"), (lambda x: 1 / 0, "ZeroDivisionError"),
])  # fmt: skip
def test_other_wrong_answers_are_described(answer, said):
    found = judge(EXERCISES["softmax"], answer)
    assert not found.right
    assert said in found.lines[0]


def test_there_are_thirty_exercises_and_every_chapter_has_one():
    assert len(EXERCISES) >= 30
    assert {one.chapter for one in EXERCISES.values()} == CHAPTERS


def test_the_exercise_about_yarn_has_the_frequencies_of_the_package():
    from llm_quest.layers.rotary import YaRNScaling

    for d, theta, factor, original, fast, slow in EXERCISES["yarn_frequencies"].examples():
        package = YaRNScaling(factor, original, fast, slow).inv_freq(d, theta)
        answer = EXERCISES["yarn_frequencies"].reference(d, theta, factor, original, fast, slow)
        torch.testing.assert_close(answer.float(), package, rtol=1e-5, atol=0)


def test_an_answer_written_in_another_way_is_right():
    assert judge(EXERCISES["softmax"], lambda scores: torch.exp(scores - scores.logsumexp(-1, keepdim=True))).right


def test_an_exercise_is_begun_judged_and_never_written_over(tmp_path):
    right, lines = run_lesson("causal_mask", None, tmp_path, print)
    assert right
    assert "quest learn check causal_mask" in lines[0]
    file = tmp_path / "causal_mask.py"
    file.write_text("import torch\ndef causal_mask(T):\n    return torch.ones(T, T, dtype=torch.bool).triu()\n")
    right, lines = run_lesson("check", "causal_mask", tmp_path, print)
    assert not right
    assert lines[0].startswith("it is turned over")
    assert "is there already" in run_lesson("causal_mask", None, tmp_path, print)[1][0]
    file.write_text("import torch\ndef causal_mask(T):\n    return torch.arange(T)[:, None] >= torch.arange(T)\n")
    overview = "\n".join(run_lesson(None, None, tmp_path, print)[1])
    assert re.search(r"^  causal_mask +begun +A mask \(T, T\)", overview, re.M)
    assert run_lesson("check", "causal_mask", tmp_path, print)[0]
    assert re.search(r"^  causal_mask +solved", "\n".join(run_lesson(None, None, tmp_path, print)[1]), re.M)


def test_an_answer_without_an_end_is_ended_by_its_own_processor_time(tmp_path, monkeypatch):
    """Not by the clock, which on a busy machine runs on while nothing is computed."""
    (tmp_path / "causal_mask.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 1))\nwhile True: pass\n"
    )
    with pytest.raises(ResourceError, match="of the processor"):
        run_lesson("check", "causal_mask", tmp_path, print)
    monkeypatch.setattr(learn, "WAIT_SECONDS", 0.01)
    with pytest.raises(ResourceError, match="wait for something"):
        run_lesson("check", "causal_mask", tmp_path, print)


@pytest.mark.parametrize("text", ["def causal_mask(T:", "x = 1", "raise SystemError('no')"])
def test_a_file_that_cannot_be_read_is_a_message(tmp_path, text, capsys):
    (tmp_path / "causal_mask.py").write_text(text)
    assert learn.judge_file("causal_mask", str(tmp_path / "causal_mask.py")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 3
    assert "causal_mask" in lines[0]


@pytest.mark.parametrize(("action", "name"), [("nothing", None), ("check", "nothing"), ("check", None),
                                              ("break", "99"), ("break", "x"), ("check", "game-3")])  # fmt: skip
def test_unknown_names_are_messages(tmp_path, action, name):
    with pytest.raises(UsageError, match=r"quest learn|known|give next"):
        run_lesson(action, name, tmp_path, print)


def test_the_overview_names_every_exercise(tmp_path):
    """In the order of the chapters, each asked in a few whole words."""
    lines = run_lesson(None, None, tmp_path, print)[1]
    asked = [line for line in lines if line.startswith("  ")]
    named = [line.split()[0] for line in asked]
    assert sorted(named) == sorted(EXERCISES)
    assert named.index("bpe_encode") < named.index("softmax") < named.index("patches") < named.index("pass_at_k")
    assert all(len(line) < 120 for line in asked)
    assert all(one.summary and one.summary[-1] not in ",(" for one in EXERCISES.values())


def test_there_are_forty_games_at_most_two_of_a_file_whose_mistake_can_be_made():
    assert len(GAMES) == 40
    for game in GAMES:
        text = (PACKAGE / game.file).read_text(encoding="utf-8")
        assert text.count(game.right) == 1, game.title
        assert [one.file for one in GAMES].count(game.file) <= 2


def test_a_change_at_the_wrong_line_and_one_elsewhere_are_told_apart():
    game = next(one for one in GAMES if one.wrong and "\n" not in one.wrong)
    broken = learn.broken_text(game)
    lines = broken.splitlines()
    (place,) = learn.wrong_lines(game)
    assert game.wrong.strip() in lines[place - 1]
    assert learn.changed_lines(broken, broken) == []
    edited = [*lines[: place - 1], lines[place - 1] + "  # here", *lines[place:]]
    assert learn.changed_lines(broken, "\n".join(edited)) == [place]
    assert learn.changed_lines(broken, "\n".join([*lines, "", "x = 1"])) == [len(lines) + 1]


@pytest.mark.parametrize("title", ["GAE: the value behind the last token is its own"])
def test_a_game_shows_the_law_that_fails_and_a_repair_is_judged_by_it(tmp_path, title):
    number = next(i for i, one in enumerate(GAMES, start=1) if one.title == title)
    game, name = GAMES[number - 1], f"game-{number}"
    _, lines = run_lesson("break", str(number), tmp_path, print)
    assert lines[0].startswith("fails: tests/rollouts/test_gae.py")
    assert not (tmp_path / name / "tests" / "mutations.py").exists(), "the answers are not copied"
    assert "as the game began" in learn.advice(tmp_path / name, game)
    file = tmp_path / name / "llm_quest" / game.file
    file.write_text(file.read_text() + "\nANOTHER_LINE = 1\n")
    right, lines = learn.check(tmp_path, name)
    assert not right
    assert "the wrong line is another one" in lines[-1]
    file.write_text(file.read_text().replace(game.wrong, game.right))
    right, lines = learn.check(tmp_path, name)
    assert right
    assert title in lines[0]
    assert learn.next_game(tmp_path) == (1 if number > 1 else 2)
