"""Plays the book's games, each as three readers would: one changes nothing, one edits a line that is not wrong, one
repairs the line.

`python -m tests.games [NUMBER ...]` prints a row for each game: the law that is shown, how many tests of its selection
fail, and the three judgments. A game that shows no law, accepts what is wrong, or refuses what is right ends the
command with 1. Processes are forked from one that has torch and transformers, so that a game costs its own tests.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch  # noqa: F401  (so that the children have it)
import transformers  # noqa: F401

from book import learn
from book.games import GAMES
from tests.mutations import Mutation

Ended = subprocess.CompletedProcess


@dataclass(frozen=True)
class Played:
    """law: what was shown, without the test's parameters. failing: the functions that fail of the game's tests, where
    they all run. faults: what is wrong with the game."""

    law: str
    failing: tuple[str, ...]
    faults: tuple[str, ...]


def play(number: int, folder: Path) -> Played:
    """One game in a folder of its own."""
    game, name = GAMES[number - 1], f"game-{number}"
    ended, run = [], learn.run_tests

    def run_every(target: Path, one: Mutation) -> Ended[str]:
        ended.append(run(target, one, every=True))
        return ended[0]

    with patch.object(learn, "run_tests", run_every):
        shown = learn.begin_game(folder, str(number), lambda text: None)[0]
    failing = failing_functions(ended[0].stdout)
    law = re.sub(r"\[.*", "", shown.removeprefix("fails: "))
    file = folder / name / "llm_quest" / game.file
    broken = file.read_text(encoding="utf-8")
    faults = [] if "::" in shown else [f"no law is shown: {shown}"]
    faults += list(wrong_answers(folder, name, game, broken))
    file.write_text(broken.replace(game.wrong, game.right) if game.wrong else original(game), encoding="utf-8")
    if file.read_text(encoding="utf-8") != original(game):
        file.write_text(original(game), encoding="utf-8")  # the wrong text stands there more than once
    right, lines = learn.check(folder, name)
    faults += [] if right and game.title in lines[0] else [f"the repair is refused: {lines}"]
    return Played(law, failing, tuple(faults))


def wrong_answers(folder: Path, name: str, game: Mutation, broken: str) -> Iterator[str]:
    """Faults in what is said of the game as it began, and in the judgment of a change elsewhere."""
    if "as the game began" not in (said := learn.advice(folder / name, game)):
        yield f"nothing was changed, and it says {said}"
    file = folder / name / "llm_quest" / game.file
    file.write_text(broken + "\nANOTHER_LINE = 1\n", encoding="utf-8")
    right, lines = learn.check(folder, name)
    if right or "another one" not in lines[-1]:
        yield f"another line was changed, and it says {lines[-1]}"
    file.write_text(broken, encoding="utf-8")


def original(game: Mutation) -> str:
    return (learn.ROOT / "llm_quest" / game.file).read_text(encoding="utf-8")


def failing_functions(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"^FAILED ([^\s\[]+)", text, re.M)))


def run_forked(command: Sequence[str], *, cwd: Path, env: dict[str, str], **_: object) -> Ended[str]:
    """What `subprocess.run` does with a command of pytest, in a fork of this process."""
    arguments = list(command[command.index("pytest") + 1 :])
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        code, text = run_pytest(cwd, arguments)
        with os.fdopen(writing, "w", encoding="utf-8") as out:
            out.write(text)
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    return Ended(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text, "")


def run_pytest(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """In the child: pytest on a copy, whose modules take the place of ours."""
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "llm_quest", "book", "benchmarks")]:
        del sys.modules[name]
    sys.path[:] = [str(folder.resolve()), *(one for one in sys.path if one not in ("", str(learn.ROOT)))]
    sys.dont_write_bytecode = True
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*arguments, f"--rootdir={folder.resolve()}"])
    return int(code), out.getvalue()


def main(words: Sequence[str]) -> int:
    numbers = [int(word) for word in words] or list(range(1, len(GAMES) + 1))
    bad = 0
    print("| game | mistake | law that is shown | failing of its tests | judged |\n| --- | --- | --- | --- | --- |")
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder, patch.object(learn, "run_process", run_forked):
            played = play(number, Path(folder))
        bad += bool(played.faults)
        said = "; ".join(played.faults) or "right"
        title = GAMES[number - 1].title
        print(f"| {number} | {title} | `{played.law}` | {len(played.failing)} | {said} |", flush=True)
    print(f"\n{len(numbers) - bad} of {len(numbers)} games are right")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
