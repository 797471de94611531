"""What reaches a terminal is text and nothing else."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys

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
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("stream", "words", "code"),
    [(PLAIN, ["show", "gpt2-tiny"], 0), ({"PYTHONIOENCODING": "cp1252"}, ["show", "gpt2-tiny"], 0), (PLAIN, ["nö"], 2)],
)
def test_a_stream_of_few_characters_ends_no_command(stream: dict[str, str], words: list[str], code: int):
    done = subprocess.run([*QUEST, *words], env={**os.environ, **stream}, capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    if words == ["show", "gpt2-tiny"]:
        assert b"|-> norm   LayerNorm 48 with bias" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
@pytest.mark.parametrize(("words", "code"), [("show gpt2-tiny", 5), ("models --json", 5), ("show nonsense --json", 2)])
def test_an_output_that_is_full_is_one_message(words: str, code: int):
    """Also where the failure itself was to be printed there, and where Python flushes what is left at its end."""
    done = subprocess.run(["sh", "-c", f"{shlex.join(QUEST)} {words} >/dev/full"], capture_output=True, timeout=120)
    said = done.stderr.decode().splitlines()
    assert done.returncode == code, said
    assert len([one for one in said if "the output: no space is left" in one]) == (code == 5), said
    assert 1 <= len(said) <= MAX_MESSAGE_LINES, said
    assert all(one.startswith("quest: ") for one in said), said


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_stream_ends_no_command(closed: str):
    command = f"{shlex.join(QUEST)} models {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=120)
    assert done.returncode == 0
    assert b"Error" not in done.stderr
