"""Runs a conversation in the terminal: a line is a message, which is answered, or a command.

In a terminal prompt_toolkit reads the lines: they can be edited, the arrow keys show earlier ones, and a pasted text
keeps its line ends. A file or a pipe is read line by line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llm_quest.cache_dirs import cache_dir, tolerate_cache_errors
from llm_quest.cli.chat import print_text, stream_text
from llm_quest.cli.generation_options import GenerationOptions
from llm_quest.cli.output import clean_text
from llm_quest.contracts import LogFn
from llm_quest.errors import QuestError, UsageError
from llm_quest.files import append_lines
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models.decoder import Decoder
from llm_quest.train.signals import continue_after_interrupt

HINT = "/help lists the commands, /quit or Ctrl-D leaves; Ctrl-C stops an answer; Alt-Enter begins a line"
LEAVE = ("/quit", "/exit")

ReadLine = Callable[[], "str | None"]


class ChatHistory(Protocol):
    """A conversation: messages and replies are added, and all of it is the next prompt."""

    system: str | None

    def add_user_message(self, line: str) -> None: ...

    def add_reply(self, reply: str) -> None: ...

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The ids of the prompt, at most `room` tokens. UsageError for a message that does not fit."""

    def reset(self) -> None: ...

    def set_system(self, text: str) -> None:
        """Begin again with this system message. UsageError for a conversation that takes none."""

    def snapshot(self) -> Any:
        """The state that `restore` returns to."""

    def restore(self, state: Any) -> None: ...


@dataclass(frozen=True)
class ChatCommand:
    """A command of the conversation. run: called with the session and the rest of the line."""

    help: str
    run: Callable[[ChatSession, str], None]


class ChatSession:
    """Reads messages and answers each. decoder: gives the model that answers the next message. commands: more than
    `CHAT_COMMANDS`."""

    def __init__(
        self,
        history: ChatHistory,
        decoder: Callable[[], Decoder],
        options: GenerationOptions,
        stopping_criteria: StoppingCriteria,
        log: LogFn,
        commands: Mapping[str, ChatCommand] | None = None,
    ):
        self.history, self.decoder, self.options, self.log = history, decoder, options, log
        self.stopping_criteria, self.commands = stopping_criteria, {**CHAT_COMMANDS, **(commands or {})}
        self.turn = 0
        self.begin()

    def begin(self) -> None:
        """Clear the transcript."""
        system = self.history.system
        self.transcript = [{"role": "system", "content": system}] if system else []
        self.asked: tuple[Any, str] | None = None

    def run(self) -> None:
        """Read lines and answer them until the user leaves."""
        self.log(HINT)
        read = open_user_input(tuple(self.commands))
        while (line := read()) is not None and line not in LEAVE:
            word, _, rest = line.partition(" ")
            try:
                if word in self.commands:
                    self.commands[word].run(self, rest.strip())
                elif re.fullmatch(r"/[a-z]+", word):
                    print_notice(f"{word} is no command; /help lists them")
                elif line:
                    self.ask(line)
            except (QuestError, OSError) as error:
                print_notice(str(error))

    def ask(self, line: str) -> None:
        """Answer a message. One that does not fit is taken back, and the conversation goes on."""
        before = self.history.snapshot()
        self.history.add_user_message(line)
        try:
            reply = self.answer()
        except QuestError:
            self.history.restore(before)
            raise
        self.asked = (before, line)
        self.transcript += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]

    def answer(self) -> str:
        """Generate the reply to the last message and add it to the conversation."""
        model = self.decoder()
        context = model.config.max_position_embeddings
        tokens = self.history.prompt_tokens(context - min(self.options.tokens, context // 2), self.log)
        self.turn += 1
        seeded = replace(self.options, seed=self.options.seed + self.turn)
        reply = stream_answer(model, tokens, seeded, self.stopping_criteria)
        self.history.add_reply(reply)
        return reply

    def retry(self) -> None:
        """Answer the last message once more."""
        if self.asked is None:
            raise UsageError("there is no answer to try again: write a message first")
        before, line = self.asked
        self.history.restore(before)
        del self.transcript[-2:]
        self.ask(line)

    def save(self, name: str) -> None:
        """Append the conversation to a file as a row that quest train sft reads."""
        if not name:
            raise UsageError("name a file, such as /save talks.jsonl")
        if self.asked is None:
            raise UsageError("there is nothing to save yet: write a message first")
        append_lines(Path(name), [json.dumps({"messages": self.transcript}, ensure_ascii=False)])
        print_notice(f"saved: {len(self.transcript)} messages, in {name}")

    def reset(self, rest: str = "") -> None:
        """Begin a new conversation."""
        self.history.reset()
        self.begin()

    def set_system(self, text: str) -> None:
        """Begin a new conversation with this system message."""
        self.history.set_system(text)
        self.begin()
        print_notice(
            "a new conversation, with this system message" if text else "a new conversation, without a system message"
        )

    def show_help(self) -> None:
        print_text("".join(f"{word:<9} {command.help}\n" for word, command in self.commands.items()))


CHAT_COMMANDS: Mapping[str, ChatCommand] = {
    "/help": ChatCommand("lists the commands", lambda session, rest: session.show_help()),
    "/system": ChatCommand("TEXT begins a new conversation with this system message", ChatSession.set_system),
    "/save": ChatCommand("FILE appends the conversation, as a row for quest train sft", ChatSession.save),
    "/retry": ChatCommand("answers the last message once more", lambda session, rest: session.retry()),
    "/reset": ChatCommand("begins a new conversation", ChatSession.reset),
    "/quit": ChatCommand("leaves", lambda session, rest: None),
}
"""Commands of every conversation: the table is also their help."""


def print_notice(text: str) -> None:
    """Print a line that is no part of the conversation, on stderr."""
    sys.stderr.write(clean_text(text) + "\n")
    sys.stderr.flush()


def stream_answer(
    model: Decoder, tokens: list[int], options: GenerationOptions, stopping_criteria: StoppingCriteria
) -> str:
    """Print the answer and return it. Ctrl-C stops it early."""
    answer = ""
    try:
        for piece in stream_text(model, tokens, options, stopping_criteria):
            print_text(piece)
            answer += piece
    except KeyboardInterrupt as stop:
        continue_after_interrupt(stop)
        print_text(" ...")
    print_text("\n")
    return answer


def open_user_input(words: tuple[str, ...]) -> ReadLine:
    """A function that reads the user's next line; it returns None at the end. words: completed by Tab."""
    return make_line_editor(words) if sys.stdin.isatty() and sys.stdout.isatty() else read_plain_line


def read_plain_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def make_line_editor(words: tuple[str, ...]) -> ReadLine:
    """A line editor with a history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        history=open_history(cache_dir("chat") / "history"),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )

    def read() -> str | None:
        try:
            return session.prompt("> ").strip()
        except KeyboardInterrupt as stop:  # the line is dropped
            continue_after_interrupt(stop)
            return ""
        except EOFError:
            return None

    return read


def open_history(file: Path) -> Any:
    """Earlier messages: in a file, or in memory where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class FallbackHistory(FileHistory):
        """A line that cannot be written is kept in memory."""

        def store_string(self, string: str) -> None:
            with tolerate_cache_errors(file.parent):
                super().store_string(string)

    with tolerate_cache_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))  # for its owner alone
        return FallbackHistory(str(file))
    return InMemoryHistory()
