"""`quest learn`: exercises and games in the reader's own folder.

An exercise is a stub that the reader completes. A game is a copy of the package in which one line is wrong: the reader
sees the law that fails, finds the line and repairs it. Both are judged by what the code does."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from book.exercises import EXERCISES
from book.exercises.exercise import judge
from book.games import GAMES
from book.source import ROOT
from llm_quest.errors import ResourceError, UsageError
from tests.mutations import Mutation

CHAPTERS = ROOT / "book/chapters"
SECONDS, WAIT_SECONDS = 10, 300
"""What an answer may take of a processor, and how long it is waited for: on a busy machine 10 s of a processor are
minutes."""
run_process = subprocess.run
Log = Callable[[str], None]


def overview(folder: Path) -> list[str]:
    """The exercises of each chapter and how many games there are, with what is done."""
    lines = []
    for file in sorted(CHAPTERS.glob("*.md")):
        number, _, chapter = file.stem.partition("-")
        lines.append(f"{int(number)} {chapter}")
        own = [one for one in EXERCISES.values() if one.chapter == chapter]
        lines += [f"  {one.name:<18}{progress_mark(folder, one.name):<9}{one.summary}" for one in own]
    done = sum((folder / f"game-{number}" / "REPAIRED").is_file() for number in range(1, len(GAMES) + 1))
    return [
        *lines,
        "",
        f"games: {len(GAMES)} packages with one wrong line, {done} repaired",
        "",
        f"quest learn NAME          write the exercise into {folder}",
        "quest learn check NAME    judge what you wrote",
        "quest learn break next    begin the next game",
    ]


def progress_mark(folder: Path, name: str) -> str:
    if (folder / f"{name}.solved").is_file():
        return "solved"
    return "begun" if (folder / f"{name}.py").is_file() else ""


def begin(folder: Path, name: str) -> list[str]:
    """Write the stub of an exercise, unless the reader has begun it."""
    exercise = EXERCISES.get(name)
    if exercise is None:
        raise UsageError(f"there is no exercise {name!r}; known: {', '.join(EXERCISES)}")
    file = folder / f"{name}.py"
    if file.is_file():
        return [f"{file} is there already", f"quest learn check {name}"]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(exercise.stub(), encoding="utf-8")
    return [f"complete {file}, then: quest learn check {name}", f"its chapter: {exercise.chapter} (quest book)"]


def check(folder: Path, name: str) -> tuple[bool, list[str]]:
    """Judge an exercise or a game, in a process that may take 10 s."""
    if name.startswith("game-"):
        return check_game(folder, name)
    if name not in EXERCISES:
        raise UsageError(f"there is no exercise {name!r}; known: {', '.join(EXERCISES)}")
    file = folder / f"{name}.py"
    if not file.is_file():
        raise UsageError(f"{file} is not there; begin with: quest learn {name}")
    command = [sys.executable, "-m", "book.learn", name, str(file.resolve())]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{file} did not end within {WAIT_SECONDS} s: does it wait for something?") from None
    if ended.returncode < 0:  # ended by a signal, that of the limit among others
        raise ResourceError(f"{file} was ended after {SECONDS} s of the processor or for its memory: an endless loop?")
    if ended.returncode == 0:
        (folder / f"{name}.solved").touch()
    return ended.returncode == 0, (ended.stdout or ended.stderr).strip().splitlines()


def judge_file(name: str, file: str) -> int:
    """In the child: load the reader's file, and print the judgment."""
    spec = importlib.util.spec_from_file_location("answer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        print(f"{file} cannot be read: {type(error).__name__}: {error}")
        return 1
    if not callable(getattr(module, name, None)):
        print(f"{file} has no function {name}")
        return 1
    judgment = judge(EXERCISES[name], getattr(module, name))
    print("\n".join(judgment.lines))
    return 0 if judgment.right else 1


def limit_processor_time() -> None:
    """End this process after 10 s of a processor, where the system has such a limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 5))


def begin_game(folder: Path, number: str, log: Log) -> list[str]:
    """Copy the package with one wrong line, and show the law that fails."""
    place = next_game(folder) if number == "next" else int(number) if number.isdigit() else 0
    if not 1 <= place <= len(GAMES):
        raise UsageError(f"there is no game {number!r}; give next, or a number from 1 to {len(GAMES)}")
    target, game = folder / f"game-{place}", GAMES[place - 1]
    if not target.exists():
        copy_with_mistake(target, game)
    log("a law is run on the changed package")
    lines = failing_law(run_tests(target, game).stdout, game)
    where = f"one line of {target / 'llm_quest' / game.file} is wrong; repair it, then: quest learn check game-{place}"
    return [*lines, "", where]


def next_game(folder: Path) -> int:
    done = (number for number in range(1, len(GAMES) + 1) if not (folder / f"game-{number}" / "REPAIRED").is_file())
    return next(done, len(GAMES))


def copy_with_mistake(target: Path, game: Mutation) -> None:
    """The package and its tests, with the mistake in one file; the folder appears whole or not at all."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", ".git", "runs")
    for name in ("llm_quest", "tests"):
        shutil.copytree(ROOT / name, part / name, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", part)
    (part / "tests" / "mutations.py").unlink()  # it holds the answers
    (part / "llm_quest" / game.file).write_text(broken_text(game), encoding="utf-8")
    part.rename(target)


def broken_text(game: Mutation) -> str:
    """The file of a game with its mistake."""
    text = (ROOT / "llm_quest" / game.file).read_text(encoding="utf-8")
    if text.count(game.right) != 1:
        raise UsageError(f"this game is stale: {game.file} has changed; choose another")
    return text.replace(game.right, game.wrong)


def wrong_lines(game: Mutation) -> range:
    """The numbers of the lines of the broken file in which the mistake is."""
    before = (ROOT / "llm_quest" / game.file).read_text(encoding="utf-8").partition(game.right)[0]
    first = before.count("\n") + 1
    return range(first, first + game.wrong.rstrip("\n").count("\n") + 1)


def changed_lines(broken: str, now: str) -> list[int]:
    """The numbers of the lines of the broken file that the reader changed, or before which lines were put."""
    pieces = difflib.SequenceMatcher(None, broken.splitlines(), now.splitlines(), autojunk=False).get_opcodes()
    return [line + 1 for kind, a, b, *_ in pieces if kind != "equal" for line in range(a, max(b, a + 1))]


def advice(target: Path, game: Mutation) -> str:
    """What is said about a repair that does not hold: whether it is at the right line."""
    now = (target / "llm_quest" / game.file).read_text(encoding="utf-8")
    changed = changed_lines(broken_text(game), now)
    if not changed:
        return f"not yet: llm_quest/{game.file} is as the game began; the wrong line is in it"
    if set(changed) & set(wrong_lines(game)):
        return f"not yet: line {changed[0]} is where the mistake is, and what stands there now is not right"
    return f"not yet: you changed line {changed[0]}; the wrong line is another one of llm_quest/{game.file}"


def run_tests(target: Path, game: Mutation, *, every: bool = False) -> subprocess.CompletedProcess[str]:
    """The tests of a game, on the reader's copy alone. every: also those behind the first that fails."""
    files, _, words = game.tests.partition(" -k ")
    options = ["-q", *([] if every else ["-x"]), "-p", "no:cacheprovider", "-n", "0", "--tb=short", "-rf"]
    command = [sys.executable, "-B", "-m", "pytest", *files.split(), *(["-k", words] if words else []), *options]
    environment = dict(os.environ, PYTHONPATH=str(target.resolve()), HF_HUB_OFFLINE="1")
    return run_process(command, cwd=target, capture_output=True, text=True, env=environment, check=False)


def failing_law(text: str, game: Mutation) -> list[str]:
    """The first test that fails by what pytest printed, and what it says."""
    named = re.search(r"^FAILED (\S+)", text, re.M)
    said = re.findall(r"^E +(.*)$", text, re.M)
    return [f"fails: {named[1] if named else game.tests}", *(f"    {line}" for line in said[:6])]


def check_game(folder: Path, name: str) -> tuple[bool, list[str]]:
    """Whether the law holds again, and where the wrong line was."""
    number = name.removeprefix("game-")
    target = folder / name
    if not number.isdigit() or not target.is_dir():
        raise UsageError(f"{target} is not there; begin with: quest learn break {number}")
    game = GAMES[int(number) - 1]
    if (ended := run_tests(target, game)).returncode != 0:
        return False, [*failing_law(ended.stdout, game), "", advice(target, game)]
    (target / "REPAIRED").touch()
    return True, [f"repaired: the law holds again. The mistake: {game.title}"]


if __name__ == "__main__":
    limit_processor_time()
    sys.exit(judge_file(sys.argv[1], sys.argv[2]))
