"""What reaches a terminal is text and nothing else."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.cli.output import clean_text, print_json, replace_nonfinite
from llm_quest.errors import MAX_MESSAGE_LINES


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2J\x1b]0;owned\x07hello", "[2J]0;ownedhello"),
        ("safe\u202eexe.txt", "safeexe.txt"),
        ("a\u2066b\u2069c\u200fd", "abcd"),
        ("one\rtwo\r\nthree", "one\ntwo\nthree"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\x9b31mred\x00\x7f", "31mred"),
        ("Zoë 漢字 🦊", "Zoë 漢字 🦊"),
    ],
)
def test_what_commands_a_terminal_is_taken_out(hostile: str, shown: str) -> None:
    assert clean_text(hostile) == shown


@given(st.text())
def test_cleaning_twice_is_cleaning_once_and_leaves_no_control_character(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    assert all(character in "\n\t" or (ord(character) >= 32 and not 127 <= ord(character) < 160) for character in once)


def test_json_never_holds_what_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": math.nan, "rows": [math.inf, 1.5], "name": "a\ud800b"})
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert told == {"loss": None, "rows": [None, 1.5], "name": "a?b"}
    assert replace_nonfinite((1, "x", None)) == [1, "x", None]


QUEST = (sys.executable, "-c", "from llm_quest.cli.main import main; main()")
ONE_AFTER_ANOTHER = """
import os, sys
import llm_quest.models.build
from llm_quest.cli.main import main
folder, output, *commands = sys.argv[1:]
for number, words in enumerate(commands):
    if (pid := os.fork()) == 0:
        os.dup2(os.open(output or f"{folder}/{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(f"{folder}/{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["quest", *words.split()]
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run_commands(
    folder: Path, *commands: str, output: str = "", variables: dict[str, str] | None = None
) -> list[tuple[int, bytes, list[str]]]:
    """Each command's exit code, stdout and lines of stderr: each in a process of its own that ends as Python does,
    forked from one interpreter that was started with these variables. output: a file in place of stdout."""
    started = [sys.executable, "-c", ONE_AFTER_ANOTHER, str(folder), output, *commands]
    done = subprocess.run(started, env=os.environ | (variables or {}), capture_output=True, timeout=120)
    codes = [int(code) for code in done.stdout.split()]
    assert len(codes) == len(commands), done.stderr
    said = [(folder / f"{number}.err").read_text(errors="replace").splitlines() for number in range(len(codes))]
    shown = [b"" if output else (folder / f"{number}.out").read_bytes() for number in range(len(codes))]
    return list(zip(codes, shown, said, strict=True))


@pytest.mark.parametrize("stream", [PLAIN, {"PYTHONIOENCODING": "cp1252"}])
def test_a_stream_of_few_characters_ends_no_command(stream: dict[str, str], tmp_path: Path):
    show, unknown = run_commands(tmp_path, "show gpt2-tiny", "nö", variables=stream)
    assert (show[0], unknown[0]) == (0, 2), (show, unknown)
    assert b"|-> norm   LayerNorm 48 with bias" in show[1]
    assert not [line for line in (*show[2], *unknown[2]) if "UnicodeEncodeError" in line]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_an_output_that_is_full_is_one_message(tmp_path: Path):
    """Also where the failure itself was to be printed there, and where Python flushes what is left at its end."""
    commands = ("show gpt2-tiny", "models --json", "show nonsense --json")
    for (found, _, said), code in zip(run_commands(tmp_path, *commands, output="/dev/full"), (5, 5, 2), strict=True):
        assert found == code, said
        assert len([one for one in said if "the output: no space is left" in one]) == (code == 5), said
        assert 1 <= len(said) <= MAX_MESSAGE_LINES, said
        assert all(one.startswith("quest: ") for one in said), said


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_stream_ends_no_command(closed: str):
    command = f"{shlex.join(QUEST)} models {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=120)
    assert done.returncode == 0
    assert b"Error" not in done.stderr
