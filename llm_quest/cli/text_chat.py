"""`quest chat` with a model that reads text: the prompt is the conversation, rendered with the folder's chat template
or as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_quest.cli.chat import load_for_generation
from llm_quest.cli.chat_session import ChatSession
from llm_quest.cli.generation_options import CHAT_DEFAULTS, GenerationOptions
from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError


def run_chat(
    name_or_path: str,
    options: GenerationOptions,
    *,
    system: str | None,
    template: bool,
    device: str,
    dtype: str,
    log: LogFn,
) -> None:
    """Read messages from the user and answer each, in one conversation."""
    model, tokenizer, options = load_for_generation(
        name_or_path, options, defaults=CHAT_DEFAULTS, device=device, dtype=dtype, log=log
    )
    history = make_conversation(tokenizer, system, template, options.chat_template_kwargs, log)
    ChatSession(history, lambda: model, options, options.stopping_criteria(model, tokenizer), log).run()


def make_conversation(
    tokenizer: Tokenizer,
    system: str | None,
    template: bool,
    chat_template_kwargs: Mapping[str, Any],
    log: LogFn,
) -> TemplatedConversation | PlainConversation:
    """A conversation in the folder's chat template if there is one and `template` is set, else in plain text."""
    if template and tokenizer.chat_template:
        log("using the chat template of this folder")
        return TemplatedConversation(tokenizer, system, chat_template_kwargs)
    if chat_template_kwargs:
        raise UsageError("--chat-template-kwargs has no effect without a chat template; leave it out")
    log(
        "plain continuation: the model continues the text of the conversation (no chat template"
        + (" is used)" if not template else " in this folder)")
    )
    return PlainConversation(tokenizer, system)


class PlainConversation:
    """A conversation as one plain text."""

    def __init__(self, tokenizer: Tokenizer, system: str | None):
        self.tokenizer, self.system = tokenizer, system
        self.reset()

    def reset(self) -> None:
        self.text = f"{self.system}\n" if self.system else ""

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.reset()

    def snapshot(self) -> str:
        return self.text

    def restore(self, state: str) -> None:
        self.text = state

    def add_user_message(self, line: str) -> None:
        self.text += line

    def add_reply(self, reply: str) -> None:
        self.text += reply + "\n"

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The end of the text, at most `room` tokens."""
        return (self.tokenizer.encode(self.text) or [self.tokenizer.start_token_id])[-room:]


class TemplatedConversation:
    """A conversation as messages with roles, rendered with the folder's chat template."""

    def __init__(self, tokenizer: Tokenizer, system: str | None, chat_template_kwargs: Mapping[str, Any] | None = None):
        self.chat, self.system = ChatTemplate(tokenizer, chat_template_kwargs=chat_template_kwargs), system
        self.reset()

    def reset(self) -> None:
        self.messages: Messages = [{"role": "system", "content": self.system}] if self.system else []

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.reset()

    def snapshot(self) -> Messages:
        return list(self.messages)

    def restore(self, state: Messages) -> None:
        self.messages = list(state)

    def add_user_message(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})

    def add_reply(self, reply: str) -> None:
        content = self.chat.message_of_reply(self.messages, reply)
        self.messages.append({"role": "assistant", "content": content})

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The prompt. If it is longer than `room`, the oldest question and answer are dropped. UsageError where the
        last message alone is too long, and nothing is dropped then."""
        first = 1 if self.system else 0
        tokens = self.chat.encode_prompt(self.messages)
        if len(tokens) > room and (alone := len(self.chat.encode_prompt(self.opening_with_last(first)))) > room:
            raise UsageError(f"this message makes a prompt of {alone} tokens and there is room for {room}; shorten it")
        while len(tokens) > room:
            del self.messages[first : first + 2]
            log("(the oldest question and answer no longer fit in the context and are dropped)")
            tokens = self.chat.encode_prompt(self.messages)
        return tokens

    def opening_with_last(self, first: int) -> Messages:
        """The system message and the last message."""
        return [*self.messages[:first], self.messages[-1]]
