"""Answers in OpenAI's form, whole or as the chunks of a stream. Log-probabilities are the model's own, before bias,
penalties, temperature and filters."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_quest.serve.protocol import ChatBody, CompletionBody
from llm_quest.serve.requests import GenerationRequest, PromptRead, TokenLogprob, TokenMade
from llm_quest.serve.service import ServedModel

MINUS_INFINITY = -9999.0
"""What stands for it in JSON."""
Part = dict[str, Any]
"""A part of an answer, as JSON."""
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class ChoiceText:
    """A choice as far as it is made."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionKind(Protocol):
    """What tells a chat completion from a text completion. kind, chunk_kind: `object` of an answer and of a part of a
    stream; prefix: of ids."""

    kind: str
    chunk_kind: str
    prefix: str

    def open_choice(self, choice: ChoiceText, request: GenerationRequest, event: PromptRead) -> Iterator[Part]: ...

    def extend_choice(self, choice: ChoiceText, text: str, logprobs: Sequence[TokenLogprob]) -> Part: ...

    def close_choice(self, choice: ChoiceText) -> Part: ...

    def whole_choice(self, choice: ChoiceText) -> Part: ...


class AnswerWriter:
    """Writes the answer to the requests of one body. A choice's number counts through all prompts."""

    def __init__(self, served: ServedModel, requests: Sequence[GenerationRequest], form: CompletionKind):
        self.served, self.requests, self.form = served, requests, form
        self.id = f"{form.prefix}-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.choices = [ChoiceText(number) for number in range(sum(request.n for request in requests))]
        self.cached = 0

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def first_choice(self, request: GenerationRequest) -> int:
        """The number of the first choice of a request."""
        return sum(one.n for one in self.requests[: self.requests.index(request)])

    def read(self, request: GenerationRequest, event: PromptRead | TokenMade) -> Iterator[Part]:
        """Take in what happened; the parts of choices for a stream."""
        first = self.first_choice(request)
        if isinstance(event, PromptRead):
            self.cached += event.cached
            for choice in self.choices[first : first + request.n]:
                yield from self.form.open_choice(choice, request, event)
                if request.read_prompt_only:
                    choice.finish_reason = "length"
                    yield self.form.close_choice(choice)
            return
        choice = self.choices[first + event.choice]
        choice.token_ids.append(event.token)
        logprobs = [] if event.logprob is None else [event.logprob]
        if event.text or logprobs:
            yield self.form.extend_choice(choice, event.text, logprobs)
        choice.text += event.text
        choice.logprobs += logprobs
        if event.finish_reason:
            choice.finish_reason = FINISH_REASONS[event.finish_reason]
            yield self.form.close_choice(choice)

    def envelope(self, kind: str, choices: Sequence[Part]) -> Part:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": None,
            "choices": list(choices),
        }

    def chunk(self, choices: Sequence[Part], *, with_usage: bool) -> Part:
        """An event of a stream. with_usage: the client wants the usage at the end; it is null before."""
        return self.envelope(self.form.chunk_kind, choices) | ({"usage": None} if with_usage else {})

    def usage_chunk(self) -> Part:
        """The last event of a stream whose client wants the usage."""
        return self.envelope(self.form.chunk_kind, []) | {"usage": self.usage}

    def whole(self) -> Part:
        """The answer to a request without a stream."""
        return self.envelope(self.form.kind, [self.form.whole_choice(choice) for choice in self.choices]) | {
            "usage": self.usage
        }

    @property
    def usage(self) -> Part:
        read, num_generated = (
            sum(len(request.prompt) for request in self.requests),
            sum(len(choice.token_ids) for choice in self.choices),
        )
        return {
            "prompt_tokens": read,
            "completion_tokens": num_generated,
            "total_tokens": read + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def spell(served: ServedModel, token: int) -> str:
    """A token's text; the bytes of one that is no text."""
    raw = served.bytes_of(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatForm:
    """The form of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, served: ServedModel):
        self.served = served

    def open_choice(self, choice: ChoiceText, request: GenerationRequest, event: PromptRead) -> Iterator[Part]:
        yield self.delta(choice, {"role": "assistant", "content": ""})

    def extend_choice(self, choice: ChoiceText, text: str, logprobs: Sequence[TokenLogprob]) -> Part:
        return self.delta(choice, {"content": text}) | {"logprobs": self.spell_logprobs(logprobs)}

    def close_choice(self, choice: ChoiceText) -> Part:
        return self.delta(choice, {}) | {"finish_reason": choice.finish_reason}

    def delta(self, choice: ChoiceText, delta: Part) -> Part:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole_choice(self, choice: ChoiceText) -> Part:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self.spell_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def spell_logprobs(self, logprobs: Sequence[TokenLogprob]) -> Part | None:
        if not logprobs:
            return None
        content = [
            self.spell_token(one.token, one.logprob)
            | {"top_logprobs": [self.spell_token(token, logprob) for token, logprob in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def spell_token(self, token: int, logprob: float | None) -> Part:
        return {
            "token": spell(self.served, token),
            "logprob": finite(logprob),
            "bytes": list(self.served.bytes_of(token)),
        }


class TextForm:
    """The form of /v1/completions. echo: each text begins with its prompt."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, served: ServedModel, *, echo: bool):
        self.served, self.echo = served, echo

    def open_choice(self, choice: ChoiceText, request: GenerationRequest, event: PromptRead) -> Iterator[Part]:
        if self.echo:
            text = self.served.tokenizer.decode(request.prompt, keep_special_tokens=True)
            yield self.extend_choice(choice, text, event.logprobs)
            choice.text += text
            choice.logprobs += event.logprobs

    def extend_choice(self, choice: ChoiceText, text: str, logprobs: Sequence[TokenLogprob]) -> Part:
        return self.part(choice, text, self.spell_logprobs(logprobs, len(choice.text)), None)

    def close_choice(self, choice: ChoiceText) -> Part:
        return self.part(choice, "", None, choice.finish_reason)

    def whole_choice(self, choice: ChoiceText) -> Part:
        return self.part(choice, choice.text, self.spell_logprobs(choice.logprobs, 0), choice.finish_reason)

    def part(self, choice: ChoiceText, text: str, logprobs: Any, finish_reason: str | None) -> Part:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def spell_logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> Part | None:
        """The old form: parallel lists. text_offset: where each token begins, in characters."""
        if not logprobs:
            return None
        tokens, offsets = [spell(self.served, logprob.token) for logprob in logprobs], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        tops = [{spell(self.served, token): finite(logprob) for token, logprob in one.top} for one in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(logprob.logprob) for logprob in logprobs],
            "top_logprobs": [
                top if logprob.logprob is not None else None for top, logprob in zip(tops, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MINUS_INFINITY)


def make_answer(
    served: ServedModel, requests: Sequence[GenerationRequest], body: ChatBody | CompletionBody
) -> AnswerWriter:
    """The writer of the answer to a body."""
    form = TextForm(served, echo=body.echo) if isinstance(body, CompletionBody) else ChatForm(served)
    return AnswerWriter(served, requests, form)
