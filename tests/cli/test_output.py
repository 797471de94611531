"""What reaches a terminal is text and nothing else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


ONE_AFTER_ANOTHER = """
import json, os, sys
import llm_quest.models.build, torch._dynamo  # `show` needs both: seconds once, and not for each command
from llm_quest.cli.main import main
folder = sys.argv[1]
for number, (words, output, encoding) in enumerate(json.loads(sys.argv[2])):
    if (pid := os.fork()) == 0:
        os.dup2(os.open(f"{folder}/{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        if output == "nobody reads":
            reading, writing = os.pipe()
            os.dup2(writing, 1), os.close(reading), os.close(writing)
        elif output.startswith("closed"):  # as an interpreter begins whose stream is closed
            os.close(1)
            sys.stdout = sys.__stdout__ = None
            if output == "closed, errors too":
                os.close(2)
                sys.stderr = sys.__stderr__ = None
        else:
            os.dup2(os.open(output or f"{folder}/{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        if encoding:
            sys.stdout.reconfigure(encoding=encoding, errors="strict")
            sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
        sys.argv = ["quest", *(words if encoding else os.fsdecode(words.encode())).split()]  # as this locale reads it
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STREAMS = {"ascii": "", "cp1252": "cp1252"}
"""Name -> the encoding that PYTHONIOENCODING would give, or that of the interpreter itself."""
TOO_FULL = {"show gpt2-tiny": 5, "models --json": 5, "show nonsense --json": 2}
"""Command -> its exit code where its output is full."""
CLOSED = {"closed": "models", "closed, errors too": "models", "nobody reads": "models --json"}
"""`>&-`, `>&- 2>&-`, and a pipe whose reader has ended -> the command that writes there."""


class Done(NamedTuple):
    """A command's exit code, stdout and lines of stderr."""

    code: int
    stdout: bytes
    stderr: list[str]


def run_commands(folder: Path, commands: list[tuple[str, str, str]]) -> list[Done]:
    """Each of (command, file in place of stdout or one of CLOSED, encoding) in a process of its own that ends as Python
    does, forked from one interpreter whose streams are ASCII."""
    started = [sys.executable, "-c", ONE_AFTER_ANOTHER, str(folder), json.dumps(commands)]
    done = subprocess.run(started, env=os.environ | PLAIN, capture_output=True, timeout=120)
    codes = [int(code) for code in done.stdout.split()]
    assert len(codes) == len(commands), done.stderr
    said = [(folder / f"{number}.err").read_text(errors="replace").splitlines() for number in range(len(codes))]
    shown = [b"" if one[1] else (folder / f"{number}.out").read_bytes() for number, one in enumerate(commands)]
    return list(map(Done, codes, shown, said))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Done]:
    """All commands of this file that one interpreter can run."""
    commands = [(words, "", encoding) for encoding in STREAMS.values() for words in ("show gpt2-tiny", "nö")]
    commands += [(words, "/dev/full", "") for words in TOO_FULL] if os.path.exists("/dev/full") else []
    commands += [(words, output, "") for output, words in CLOSED.items()]
    return dict(zip(commands, run_commands(tmp_path_factory.mktemp("commands"), commands), strict=True))


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_of_few_characters_ends_no_command(stream: str, results):
    show, unknown = (results[words, "", STREAMS[stream]] for words in ("show gpt2-tiny", "nö"))
    assert (show.code, unknown.code) == (0, 2), (show, unknown)
    assert b"|-> norm   LayerNorm 48 with bias" in show.stdout
    assert not [line for line in (*show.stderr, *unknown.stderr) if "UnicodeEncodeError" in line]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_an_output_that_is_full_is_one_message(results):
    """Also where the failure itself was to be printed there, and where Python flushes what is left at its end."""
    for words, code in TOO_FULL.items():
        found, _, said = results[words, "/dev/full", ""]
        assert found == code, said
        assert len([one for one in said if "the output: no space is left" in one]) == (code == 5), said
        assert 1 <= len(said) <= MAX_MESSAGE_LINES, said
        assert all(one.startswith("quest: ") for one in said), said


@pytest.mark.parametrize("closed", CLOSED)
def test_a_closed_stream_ends_no_command(closed: str, results):
    """Without a word on stderr. A pipe without a reader has the exit code that click gives it, 1."""
    found = results[CLOSED[closed], closed, ""]
    assert (found.code, found.stderr) == (int(closed == "nobody reads"), [])
