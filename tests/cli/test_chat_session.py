"""A conversation in the terminal, real and tiny: commands, refused messages, and line editing on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_quest.cli.chat_session import CHAT_COMMANDS
from llm_quest.cli.main import app
from llm_quest.data.chat import CHATML_TEMPLATE
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import save
from llm_quest.models.build import build, preset
from tests.recipes.tuned import WORDS

THINKING = CHATML_TEMPLATE + "{% if add_generation_prompt and enable_thinking is defined %}moon{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([" ".join(WORDS) + " user assistant system\n"] * 9, 330)
    tokenizer.chat_template = THINKING
    config = preset("llama3.2-tiny").config.__class__(
        **{**vars(preset("llama3.2-tiny").config), "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64}
    )
    return save(build(config, seed=1), tmp_path_factory.mktemp("chat") / "model", tokenizer=tokenizer)


def run_chat(folder: Path, *lines: str, more: tuple[str, ...] = ()):
    result = CliRunner().invoke(app, ["chat", str(folder), "-n", "4", *more], input="\n".join([*lines, "/quit"]) + "\n")
    assert result.exit_code == 0, result.stderr
    return result


def read_conversations(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_conversation_is_saved_as_rows_that_are_trained_on(folder: Path, tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    run_chat(
        folder, "red cat", "/retry", "/system be brief", "blue dog", f"/save {file}", "/reset", "sun", f"/save {file}"
    )
    first, second = read_conversations(file)
    assert [(one["role"], one["content"]) for one in first[:2]] == [("system", "be brief"), ("user", "blue dog")]
    assert [one["role"] for one in first] == ["system", "user", "assistant"]
    assert [one["role"] for one in second] == ["system", "user", "assistant"]
    assert second[1]["content"] == "sun"


def test_a_retry_takes_the_place_of_the_answer(folder: Path, tmp_path: Path):
    once, again = tmp_path / "once.jsonl", tmp_path / "again.jsonl"
    run_chat(folder, "red", "cat", f"/save {once}", "/retry", f"/save {again}", more=("--temperature", "1.5"))
    before, after = read_conversations(once)[0], read_conversations(again)[0]
    assert before[:3] == after[:3]
    assert len(before) == len(after) == 4
    assert before[3] != after[3]


def test_a_message_that_is_too_long_is_refused_and_the_conversation_goes_on(folder: Path, tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    result = run_chat(folder, "red", "cat dog " * 90, "blue", f"/save {file}")
    assert re.search(r"this message makes a prompt of \d+ tokens and there is room for 60; shorten it", result.stderr)
    assert [one["content"] for one in read_conversations(file)[0] if one["role"] == "user"] == ["red", "blue"]


def test_mistakes_are_said_and_the_conversation_goes_on(folder: Path, tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    absent = tmp_path / "absent" / "talks.jsonl"
    result = run_chat(
        folder, "/retry", "/save", f"/save {file}", "/sav", "red", f"/save {absent}", "/help", f"/save {file}"
    )
    for said in ("no answer to try again", "name a file", "nothing to save yet", "/sav is no command", "No such file"):
        assert said in result.stderr
    assert all(f"{word} " in result.stdout for word in CHAT_COMMANDS)
    assert len(read_conversations(file)) == 1


def test_arguments_of_the_chat_template_are_given_and_unknown_ones_refused(folder: Path):
    asked = ["generate", str(folder), "-p", "red", "-n", "3", "--temperature", "0", "--json", "-q"]

    def text(*more: str):
        result = CliRunner().invoke(app, [*asked, *more])
        return result.exception if result.exit_code else json.loads(result.stdout)["text"]

    argument = ("--chat-template-kwargs", "{enable_thinking: false}")
    assert text("--chat", *argument) != text("--chat")
    assert "give --chat too" in str(text(*argument))
    for given, said in {
        "{no_such: 1}": "reads no no_such", "enable_thinking": "give names and values", "{messages: []}": "leave it out"
    }.items():  # fmt: skip
        error = text("--chat", "--chat-template-kwargs", given)
        assert isinstance(error, UsageError)
        assert said in str(error)
    run_chat(folder, "red", more=argument)
    refused = CliRunner().invoke(app, ["chat", str(folder), "--no-template", *argument], input="")
    assert "no effect without a chat template" in str(refused.exception)


def test_lines_are_edited_and_pasted_text_keeps_its_line_ends(folder: Path, tmp_path: Path):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX's")
    file, (ours, theirs) = tmp_path / "talks.jsonl", pty.openpty()
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "LLM_QUEST_CACHE": str(tmp_path / "cache")}
    started = "from llm_quest.cli.main import main; main()"
    command = [sys.executable, "-c", started, "chat", str(folder), "-n", "3", "--threads", "1"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True)
    os.close(theirs)
    try:
        read_until(ours, "> ")
        for typed in (
            "cat\x1b[D\x1b[D\x1b[Dred \r",  # the left arrow, three times
            "\x1b[200~blue\ndog\x1b[201~\r",  # a bracketed paste
            "\x1b[A\x1b[A\x1b[A\r",  # the up arrow: both lines of the last message, then the one before it
            f"/save {file}\r",
        ):
            os.write(ours, typed.encode())
            read_until(ours, "> ")
        os.write(ours, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        os.close(ours)
    assert [one["content"] for one in read_conversations(file)[0] if one["role"] == "user"] == [
        "red cat",
        "blue\ndog",
        "red cat",
    ]


def read_until(terminal: int, end: str, seconds: float = 120) -> str:
    """What the terminal shows, until it waits at a new prompt."""
    import select

    shown, until, quiet = "", time.monotonic() + seconds, 0
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.5)[0]:
            shown, quiet = shown + os.read(terminal, 4096).decode(errors="replace"), 0
            continue
        quiet += 1
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).rstrip("\r\n").split("\n")
        if quiet >= 2 and lines[-1].strip("\r ").startswith(end.strip()):
            return shown
    raise TimeoutError(shown)
