"""Chat: conversations become token ids by a chat template, and it is known of each id whether it is to be learned.

      <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|>\\n
                                                                   x x x               learned: the answer and its end

Commonly got wrong: (1) what somebody typed is read as a control token: `<|im_end|>` in a message ends it; here it stays
text. (2) Prompt and answer are made tokens as one text, and a merge across the seam gives the answer another beginning
than generation ever sees; here each is encoded alone. (3) The end of the answer is masked away (for pad = end), and
the model never stops; here an answer's end is always learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from llm_quest.data.conversations import Conversation
from llm_quest.data.template import Job, Layout, Messages, render, render_all
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError

GUARD = "\ufdd0"  # a noncharacter: it stands in no text

CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For tokenizers that have its tokens, as ours do."""

HEADED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] | trim + '\\n\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}{% else %}{{ '### Response:\\n' }}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""For the others: Alpaca's headings (Taori et al. 2023), an end of text after each answer."""


def default_template(tokenizer: Tokenizer) -> str:
    """What a model without a chat template is given."""
    return CHATML if {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.special_tokens) else HEADED


@dataclass(frozen=True, eq=False)
class Example:
    """ids of a whole conversation; learned: which of them the model is to write. The last of its learned ids ends its
    last answer. where: file:line."""

    ids: np.ndarray
    learned: np.ndarray
    where: str = ""

    @cached_property
    def last(self) -> tuple[int, int]:
        """Where the last answer begins, and one past its end."""
        end = int(np.flatnonzero(self.learned)[-1]) + 1
        before = np.flatnonzero(~self.learned[:end])
        return (int(before[-1]) + 1 if len(before) else 0), end


class Chat:
    """`Chat(tokenizer)`: its own template, else the default one, which the tokenizer then keeps and saves."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        tokenizer.chat_template = template or tokenizer.chat_template or default_template(tokenizer)
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template
        self.controls = tokenizer.special_tokens
        self.names = {key: name[0] if isinstance(name, list) else name for key, name in tokenizer.names.items() if name}
        words = "|".join(map(re.escape, sorted(self.controls, key=len, reverse=True)))
        self.spelled = re.compile(f"(?:{words})(?!{GUARD})" if words else r"(?!)")

    def prompt(self, messages: Messages) -> list[int]:
        """The ids that ask for the assistant's next message."""
        return self.encode(render(self.template, self.guarded(messages), special=self.names))

    def prompts(self, many: Sequence[Messages]) -> list[list[int]]:
        """The same of many conversations, by one process."""
        jobs = [Job(self.guarded(messages), ask=True) for messages in many]
        return [self.encode(one.text) for one in render_all(self.template, jobs, special=self.names)]

    def examples(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Each conversation, all its answers learned."""
        if not conversations:
            return []
        laid_out = self.tagged if "generation" in self.tags() else self.found
        return [
            self.example(layout, one.where) for layout, one in zip(laid_out(conversations), conversations, strict=True)
        ]

    def tags(self) -> set[str]:
        """The template's statements by their first word."""
        return set(re.findall(r"\{%[-+]?\s*(\w+)", self.template))

    def tagged(self, conversations: Sequence[Conversation]) -> list[Layout]:
        """The template itself says what the model writes."""
        jobs = [Job(self.guarded(one.plain), ask=False, where=one.where) for one in conversations]
        return render_all(self.template, jobs, special=self.names)

    def found(self, conversations: Sequence[Conversation]) -> list[Layout]:
        """The template does not say: an answer is what comes after the prompt that asks for it, up to where the text
        stands when it has been given."""
        jobs = [job for one in conversations for job in self.steps(one)]
        texts = iter(render_all(self.template, jobs, special=self.names))
        return [self.between(one, texts) for one in conversations]

    def steps(self, one: Conversation) -> Iterator[Job]:
        """The whole, then before and after each answer."""
        said = self.guarded(one.plain)
        yield Job(said, ask=False, where=one.where)
        for number, message in enumerate(said):
            if message["role"] == "assistant":
                yield Job(said[:number], ask=True, where=one.where)
                yield Job(said[: number + 1], ask=False, where=one.where)

    def between(self, one: Conversation, texts: Iterator[Layout]) -> Layout:
        whole = next(texts).text
        spans = []
        for role, _ in one.messages:
            if role == "assistant":
                before, after = next(texts).text, next(texts).text
                if not after.startswith(before) or not whole.startswith(after):
                    raise DataError(
                        f"{one.where}: this chat template changes what was said before as a conversation goes on, so "
                        "it cannot be told what of it the model wrote; put {% generation %} and {% endgeneration %} "
                        "around the answer in it, or give rows of one answer each"
                    )
                spans.append((len(before), len(after)))
        return Layout(whole, tuple(spans))

    def example(self, layout: Layout, where: str) -> Example:
        """Prompt and answers encoded apart, each answer with its end."""
        ids: list[int] = []
        learned: list[bool] = []
        at = 0
        for begin, stop in layout.spans:
            end = begin + self.ended(layout.text[begin:stop], layout.text[stop:])
            for start, upto, mine in ((at, begin, False), (begin, end, True)):
                piece = self.encode(layout.text[start:upto])
                ids, learned = ids + piece, learned + [mine] * len(piece)
            at = end
            if not self.closed(layout.text[begin:end]):
                if layout.text[end:].strip():
                    raise DataError(
                        f"{where}: this chat template does not end an answer with a control token, so the model could "
                        "not learn to stop; use one that does"
                    )
                ids, learned = [*ids, self.tokenizer.end_id], [*learned, True]
        if not layout.spans or not any(learned):
            raise DataError(f"{where}: this chat template writes no answer of the assistant")
        return Example(np.array(ids, dtype=np.int64), np.array(learned), where)

    def ended(self, answer: str, rest: str) -> int:
        """How much of an answer's text is learned: up to its end token, which the tags may have left outside, and not
        the line end after it."""
        if not self.closed(answer.rstrip()) and (after := self.spelled.match(rest)):
            return len(answer) + after.end()
        return len(answer.rstrip()) if self.closed(answer.rstrip()) else len(answer)

    def closed(self, answer: str) -> bool:
        """Does it end with a control token?"""
        return any(answer.endswith(control) for control in self.controls)

    def guarded(self, messages: Messages) -> Messages:
        """Messages in which nothing spells a control token: its first character is followed by a mark, which
        `encode` takes out again."""
        return [
            {**message, "content": self.spelled.sub(guard, message["content"].replace(GUARD, ""))}
            for message in messages
        ]

    def encode(self, text: str) -> list[int]:
        """The template's control tokens are control tokens; what was guarded is text."""
        if GUARD not in text:
            return self.tokenizer.encode(text, special=True, template=False)
        ids: list[int] = []
        for piece, control in segments(text, self.spelled):
            ids += self.tokenizer.encode(piece.replace(GUARD, ""), template=False) if piece else []
            ids += [self.tokenizer.id(control)] if control else []
        return ids


class Segment(NamedTuple):
    text: str
    control: str


def segments(text: str, spelled: re.Pattern[str]) -> Iterator[Segment]:
    """The text between control tokens, each with the token that follows it."""
    at = 0
    for match in spelled.finditer(text):
        yield Segment(text[at : match.start()], match.group())
        at = match.end()
    yield Segment(text[at:], "")


def guard(match: re.Match[str]) -> str:
    return match.group()[0] + GUARD + match.group()[1:]
