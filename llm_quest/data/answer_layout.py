"""Where a chat template writes the answers of a conversation: the spans that are learned, exactly.

By definition the k-th answer is what follows the prompt that asks for it, in the text up to and with it:

      context = template(messages[:k], add_generation_prompt=True)     ... <|im_start|>assistant\\n
      after   = template(messages[:k + 1])                             ... <|im_start|>assistant\\n 4 <|im_end|>\\n
                                                                                                  x x        learned

1. A template with generation tags says it itself: one rendering.
2. Most templates write the same words before and after every answer. They are learned from three turns that nobody
   said; a conversation in which they stand as often as it has answers is rendered once.
3. Else by the definition. Where every `after` begins the whole conversation, that is one row. Where the template
   rewrites what was said before (Qwen3, DeepSeek-R1: the reasoning of earlier answers goes), each answer is a row of
   its own, with the context as the model will see it.

Commonly got wrong: the template drops the reasoning of the very answer that is learned (DeepSeek-R1), and a reasoning
model is trained to answer at once. Here such an answer follows its prompt as it was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm_quest.data.template_program import RenderJob, Spans, TemplateProgram, extract_spans

THINK, END_THINK = "<think>", "</think>"
PROBE_TURNS = 3
PROBE_MARK = "\ufdd2"  # a noncharacter: no template writes it
NO_PLACE = (
    "before an answer this template writes another text than the prompt that asks for it, so what the model would "
    "write cannot be told; put {% generation %} and {% endgeneration %} around the answer"
)


class LaidOut(NamedTuple):
    """A text with the spans that are learned."""

    text: str
    spans: Spans


@dataclass(frozen=True)
class AnswerWords:
    """What a template writes around answers. opening, closing: before and after every one, empty where they differ.
    tail: what follows an answer that ends the text."""

    opening: str = ""
    closing: str = ""
    tail: str = ""


class AnswerLayout:
    """Lays out conversations for one template."""

    def __init__(self, program: TemplateProgram):
        self.program = program
        self.words = AnswerWords() if program.has_generation_tags else self.probe_words()

    def lay_out(self, job: RenderJob) -> list[LaidOut]:
        """The rows of a conversation, each with the answers that are learned there."""
        if self.program.has_generation_tags:
            return self.by_tags(job)
        if self.words.opening and self.words.closing and is_plain(job):
            text = self.render(job, len(job.messages))
            if (spans := self.find_words(text, job)) is not None:
                return [LaidOut(text, spans)]
        return self.by_definition(job)

    def render(self, job: RenderJob, count: int, add_generation_prompt: bool = False) -> str:
        """The first messages as text."""
        return extract_spans(self.program.render(job.messages[:count], job.tools, add_generation_prompt))[0]

    def by_tags(self, job: RenderJob) -> list[LaidOut]:
        """The template's own spans: one for each answer, or, where it has more of them, those within the messages that
        are learned."""
        text, spans = extract_spans(self.program.render(job.messages, job.tools, False))
        answers, learned = answer_places(job), job.learned or ()
        if len(spans) == len(answers):
            spans = [span for span, place in zip(spans, answers, strict=True) if place in learned]
        elif len(learned) < len(answers):
            blocks = [(len(self.render(job, place)), len(self.render(job, place + 1))) for place in learned]
            spans = [(a, b) for a, b in spans if any(begin <= a and b <= end for begin, end in blocks)]
        return [LaidOut(text, spans)]

    def find_words(self, text: str, job: RenderJob) -> Spans | None:
        """The spans between the template's words; None where these do not stand there once for every answer."""
        opening, closing = self.words.opening, self.words.closing
        before, *parts = text.split(opening)
        answers, spans, at = answer_places(job), Spans(), len(before)
        if len(parts) != len(answers):
            return None
        for place, part in zip(answers, parts, strict=True):
            begin, size = at + len(opening), part.find(closing)
            if size < 0:
                return None
            at = begin + len(part)
            end = len(text) if place == len(job.messages) - 1 else begin + size + len(closing)
            require_written(job.messages[place], text[begin:end])
            if place in (job.learned or ()):
                spans.append((begin, end))
        return spans

    def by_definition(self, job: RenderJob) -> list[LaidOut]:
        """Two renderings for each answer that is learned."""
        whole = self.render(job, len(job.messages))
        shared, own = Spans(), list[LaidOut]()
        for place in job.learned or ():
            after = whole if place == len(job.messages) - 1 else self.render(job, place + 1)
            text, (begin, end) = self.locate_answer(job, place, after)
            require_written(job.messages[place], text[begin:end])
            if text == after and (kept := self.end_in_whole(after, whole, self.words.tail)) > begin:
                shared.append((begin, kept))
            else:
                own.append(LaidOut(text, [(begin, end)]))
        return [*own, LaidOut(whole, shared)] if shared else own

    def locate_answer(self, job: RenderJob, place: int, after: str) -> tuple[str, tuple[int, int]]:
        """One answer's text with what precedes it, and its span. ValueError where there is no such place."""
        context, message = self.render(job, place, add_generation_prompt=True), job.messages[place]
        begin = len(context) if after.startswith(context) else self.begin_without_prompt(job, place, context, after)
        if self.reads_reasoning and not is_reasoning_written(message, after[begin:]):
            answer_text = rejoin_reasoning(message, after[begin:], in_prompt=context.rstrip().endswith(THINK))
            return context + answer_text, (len(context), len(context) + len(answer_text))
        return after, (begin, len(after))

    def begin_without_prompt(self, job: RenderJob, place: int, context: str, after: str) -> int:
        """Where an answer begins that does not follow the whole prompt: behind what they share of the prompt, up to a
        word's end (DeepSeek-V3 writes `<Assistant>`, and its prompt goes on with `<think>`)."""
        base, shared = self.render(job, place), common_length(context, after)
        prompt = context[len(base) : shared]
        begin = len(base) + max(prompt.rfind(end) + 1 for end in ">\n ")
        if not context.startswith(base) or begin <= len(base):
            raise ValueError(NO_PLACE)
        return begin

    def end_in_whole(self, after: str, whole: str, tail: str) -> int:
        """How much of a text up to an answer begins the whole conversation too: all of it, or all but what the template
        writes at the end alone (Phi-3: `<|end|>\\n<|endoftext|>`, of which `<|end|>` is kept); else 0. tail: what
        follows an answer that ends the text."""
        if whole.startswith(after):
            return len(after)
        size = len(after) - len(tail)
        if not after.endswith(tail) or not whole.startswith(after[:size]):
            return 0
        kept = self.through_control_token(tail[: common_length(tail, whole[size : size + len(tail)])])
        return size + len(kept) if kept else 0

    def through_control_token(self, text: str) -> str:
        """The text up to and with its last control token; empty if it has none."""
        controls = self.program.settings.control_tokens
        return text[: max((text.rfind(control) + len(control) for control in controls if control in text), default=0)]

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template knows of reasoning between tags."""
        return END_THINK in self.program.settings.source

    def probe_words(self) -> AnswerWords:
        """The words that this template writes around three answers; those that differ are empty."""
        job = probe_conversation()
        try:
            prompts = [self.render(job, place, add_generation_prompt=True) for place in answer_places(job)]
            texts = [self.render(job, place + 1) for place in answer_places(job)]
        except Exception:  # the template refuses this conversation; another one may be right for it
            return AnswerWords()
        tail, *others = (text.rpartition(PROBE_MARK)[2] for text in texts)
        if any(other != tail for other in others):
            return AnswerWords()
        openings = {probe_opening(prompt, text) for prompt, text in zip(prompts, texts, strict=True)}
        closings = {self.probe_closing(text, texts[-1], tail) for text in texts[:-1]}
        if len(openings) > 1 or len(closings) > 1:
            return AnswerWords(tail=tail)
        return AnswerWords(openings.pop(), closings.pop(), tail)

    def probe_closing(self, text: str, whole: str, tail: str) -> str:
        """What is written after the answer that ends this text, here and in the whole conversation."""
        kept = text[: self.end_in_whole(text, whole, tail)].rpartition(PROBE_MARK)[2]
        return self.through_control_token(kept)


def probe_opening(prompt: str, text: str) -> str:
    """What is written between a question and its answer."""
    return prompt[: common_length(prompt, text)].rpartition(PROBE_MARK)[2]


def probe_conversation() -> RenderJob:
    """Three turns, each message between marks."""
    messages = [
        {"role": role, "content": f"{PROBE_MARK}{role} {turn}{PROBE_MARK}"}
        for turn in range(PROBE_TURNS)
        for role in ("user", "assistant")
    ]
    return RenderJob(messages, add_generation_prompt=False)


def answer_places(job: RenderJob) -> list[int]:
    """Which messages are the assistant's."""
    return [place for place, message in enumerate(job.messages) if message["role"] == "assistant"]


def is_plain(job: RenderJob) -> bool:
    """Whether a conversation is questions and answers in turn, without reasoning and tools."""
    turns = job.messages[1:] if job.messages[0]["role"] == "system" else job.messages
    return (
        not job.tools
        and [message["role"] for message in turns] == [("user", "assistant")[i % 2] for i in range(len(turns))]
        and all(set(message) == {"role", "content"} for message in turns)
        and not any(END_THINK in message["content"] for message in turns)
    )


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of an answer: its own field, or what stands before `</think>`."""
    if given := message.get("reasoning_content"):
        return str(given).strip()
    before, tag, _ = str(message["content"] or "").partition(END_THINK)
    return before.rpartition(THINK)[2].strip() if tag else ""


def is_reasoning_written(message: Mapping[str, Any], written: str) -> bool:
    """Whether the reasoning of an answer, if it has any, stands before the rest of it."""
    rest = str(message["content"] or "").rpartition(END_THINK)[2].strip()
    return reasoning_of(message) in (written.rpartition(rest)[0] if rest else written)


def rejoin_reasoning(message: Mapping[str, Any], written: str, *, in_prompt: bool) -> str:
    """An answer whose reasoning the template dropped, with it. in_prompt: the prompt ends with `<think>`."""
    if given := message.get("reasoning_content"):
        thought, space = f"{THINK}\n{str(given).strip()}\n{END_THINK}", "\n\n"
    else:
        before, _, rest = str(message["content"]).partition(END_THINK)
        thought, space = before.lstrip() + END_THINK, rest[: len(rest) - len(rest.lstrip())]
    if in_prompt:
        thought = thought.removeprefix(THINK).lstrip("\n")
    return thought + ("" if written[:1].isspace() else space) + written


def require_written(message: Mapping[str, Any], written: str) -> None:
    """ValueError for an answer of which the template left something out."""
    if str(message["content"] or "").rpartition(END_THINK)[2].strip() not in written:
        raise ValueError("this template does not write an answer as it was given")
    for call in message.get("tool_calls") or ():
        if str(call.get("function", call).get("name")) not in written:
            raise ValueError("this template does not write function calls")


def roles_left_out(messages: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """The roles of messages that stand nowhere in the text, neither as they are nor as JSON."""
    contents = [(message["role"], str(message["content"] or "").strip()) for message in messages]
    return [
        role
        for role, content in contents
        if role != "assistant" and content not in text and json.dumps(content, ensure_ascii=False) not in text
    ]


def common_length(first: str, second: str) -> int:
    """How many characters two texts begin with together."""
    low, high = 0, min(len(first), len(second)) + 1
    while high - low > 1:  # of the first `low` all are equal, of the first `high` not all
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low
