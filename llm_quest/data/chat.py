"""Chat templates: conversations become token ids, with a mask of the ids that are learned.

      <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|>\\n
                                                                   x x x               learned: the answer and its end

Commonly got wrong: (1) what a user typed is read as a control token: `<|im_end|>` in a message ends it; here it stays
text. (2) Prompt and answer are encoded as one text, and a merge across the seam gives the answer another beginning
than generation ever sees; or each is encoded alone, and the answer begins with a space that its tokenizer adds to every
text: here the ids are those of the whole conversation, but for tokens across a seam (`data/encode_pieces.py`). (3) The
end of the answer is masked away (for pad = end), and the model never stops; here an answer's end is always learned.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from llm_quest.data.control_tokens import ControlTokenEncoder
from llm_quest.data.conversations import Conversation
from llm_quest.data.document import DropReport
from llm_quest.data.messages import Message
from llm_quest.data.template_messages import MessageWriter
from llm_quest.data.template_program import RenderJob, TemplateSettings, find_unread_arguments
from llm_quest.data.template_sandbox import ADVICE, Messages, RenderedChat, Rendering, render_batch, render_jobs
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError

Tools = Sequence[Mapping[str, Any]]
"""Functions that the assistant may call, as JSON schemas."""
CHATML_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For tokenizers that have its tokens, as ours do."""

ALPACA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] | trim + '\\n\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}{% else %}{{ '### Response:\\n' }}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""For the others: Alpaca's headings (Taori et al. 2023), an end of text after each answer."""


def find_template_fault(tokenizer: Tokenizer) -> str:
    """Why the tokenizer's chat template does not render a message; empty where it does, or where there is none."""
    if not tokenizer.chat_template:
        return ""
    try:
        ChatTemplate(tokenizer).render_prompts([[{"role": "user", "content": "hello"}]])
    except (DataError, UsageError) as error:
        return str(error).removesuffix(f"; {ADVICE}")
    return ""


def default_chat_template(tokenizer: Tokenizer) -> str:
    """The chat template of a model that has none."""
    return CHATML_TEMPLATE if {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.special_tokens) else ALPACA_TEMPLATE


@dataclass(frozen=True, eq=False)
class ChatExample:
    """A conversation as ids; assistant_mask: the ids that are learned. The last of them ends the last answer. where:
    file:line."""

    input_ids: np.ndarray
    assistant_mask: np.ndarray
    where: str = ""

    @cached_property
    def last_answer_span(self) -> tuple[int, int]:
        """Where the last answer begins, and one past its end."""
        end = int(np.flatnonzero(self.assistant_mask)[-1]) + 1
        before = np.flatnonzero(~self.assistant_mask[:end])
        return (int(before[-1]) + 1 if len(before) else 0), end


class EncodedConversation(NamedTuple):
    """A conversation's examples, or none and why. unwritten: roles of messages that the template left out."""

    examples: tuple[ChatExample, ...]
    error: str = ""
    unwritten: tuple[str, ...] = ()


ENCODED_CHARACTERS = 2_000_000
"""How much text the tokenizer reads at once, with what its conversations have in common."""
REPLY_MARK = "reply-7f3a9c"
"""Stands for a reply whose ids are known, where only what follows it is rendered."""


class ChatTemplate:
    """A tokenizer's chat template, or else the default one, which the tokenizer then keeps and saves.

    chat_template_kwargs: what the template reads besides messages, such as {"enable_thinking": False}. now: the date
    that it is told, in ISO form; empty: today's."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        now: str = "",
    ):
        tokenizer.chat_template = template or tokenizer.chat_template or default_chat_template(tokenizer)
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template
        if unread := find_unread_arguments(self.template, chat_template_kwargs or {}):
            raise UsageError(f"this chat template reads no {', '.join(unread)}: leave it out of chat_template_kwargs")
        self.control_encoder = ControlTokenEncoder(tokenizer)
        names = {
            key: name[0] if isinstance(name, list) else name for key, name in tokenizer.special_token_names.items()
        }
        self.settings = TemplateSettings(
            self.template,
            special_tokens={key: name for key, name in names.items() if name},
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            control_tokens=tuple(tokenizer.special_tokens),
            now=now,
        )
        self.writer = MessageWriter(self.template, self.control_encoder.escape)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """The ids that ask for the assistant's next message."""
        return self.encode_prompts([messages])[0]

    def encode_prompts(self, conversations: Sequence[Messages], tools: Sequence[Tools] = ()) -> list[list[int]]:
        """The prompts of many conversations. tools: of each, the functions that the assistant may call, as JSON
        schemas (the template's argument `tools`); empty: none has any."""
        return [self.encode(text) for text in self.render_prompts(conversations, tools)]

    def render_prompts(self, conversations: Sequence[Messages], tools: Sequence[Tools] = ()) -> list[str]:
        """The prompts as texts for `encode`, in which control tokens that somebody typed are escaped."""
        jobs = [
            RenderJob(self.writer.write(messages), True, tools=[self.writer.escape_value(tool) for tool in some])
            for messages, some in zip(conversations, tools or [()] * len(conversations), strict=True)
        ]
        return [one.text for one in render_batch(self.settings, jobs)]

    def encode_continuations(self, turns: Sequence[Messages]) -> list[list[int]]:
        """The ids of messages that answer a reply (a tool's, an environment's): from the end of the reply to where the
        next one begins. What stands before the reply is kept as it was sampled, and is not rendered again. DataError
        where the template does not write the reply."""
        before: Messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY_MARK}]
        rendered = render_batch(
            self.settings,
            [RenderJob(self.writer.write([*before, *turn]), add_generation_prompt=True) for turn in turns],
        )
        texts = [one.text.rpartition(REPLY_MARK) for one in rendered]
        if any(not mark for _, mark, _ in texts):
            raise DataError("this chat template does not write a reply that messages follow")
        return [self.encode(after) for _, _, after in texts]

    def message_of_reply(self, messages: Messages, reply: str) -> str:
        """The content of the message whose rendering, after these messages, is the reply as it was written: perhaps
        without the spaces around it, where the template writes its own (`' ' + content`)."""
        contents = list(dict.fromkeys((reply, reply.lstrip(), reply.strip())))
        conversations = [[*messages, {"role": "assistant", "content": content}] for content in contents]
        prompt_job = RenderJob(self.writer.write(messages), add_generation_prompt=True)
        jobs = [
            prompt_job,
            *(
                RenderJob(self.writer.write(conversation), add_generation_prompt=False)
                for conversation in conversations
            ),
        ]
        prompt, *rendered = render_batch(self.settings, jobs)
        written = prompt.text + self.control_encoder.escape(reply)
        texts = zip(contents, rendered, strict=True)
        return next((content for content, one in texts if one.text.startswith(written)), contents[-1])

    def encode_whole(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The ids of whole conversations as the template writes them, as transformers' `apply_chat_template`."""
        jobs = [self.render_job(conversation) for conversation in conversations]
        return [self.encode(one.text) for one in render_batch(self.settings, jobs)]

    def encode_conversations(
        self, conversations: Sequence[Conversation], drop_report: DropReport | None = None
    ) -> list[ChatExample]:
        """Conversations with all answers learned that are not empty and whose `train` is set. Where the template
        rewrites earlier answers as a conversation goes on, each answer is an example of its own.

        drop_report: counts what the template refuses, and is told what else was changed; DataError where there is none,
        and where nothing is left."""
        examples, refused, notes = list[ChatExample](), list[str](), Counter[str]()
        for conversation, encoded in zip(conversations, self.examples_of(conversations, places_to_learn), strict=True):
            examples += encoded.examples
            notes += self.count_losses(conversation, encoded)
            if encoded.error:
                refused.append(f"{conversation.where}: {encoded.error}")
                if drop_report is not None:
                    drop_report.drop(f"refused by the chat template: {encoded.error}", 0)
        if refused and (drop_report is None or not examples):
            raise DataError(refused[0])
        for sentence, count in notes.items():
            if drop_report is not None:
                drop_report.note(f"{count:,} {sentence}")
        return examples

    def count_losses(self, one: Conversation, encoded: EncodedConversation) -> Counter[str]:
        """What of a conversation is not learned as it was given."""
        notes = Counter(
            f"messages of the role {role} are not written by this chat template" for role in encoded.unwritten
        )
        notes["empty answers inside conversations are not learned"] = count_empty_answers(one)
        notes["conversations have reasoning that this chat template does not write"] = self.writer.drops_reasoning(
            one.message_dicts
        )
        for name in self.writer.unknown_keys(one.message_dicts, has_tools=bool(one.tools)):
            notes[f"conversations have {name}, which this chat template does not write"] += 1
        if len(encoded.examples) > 1:
            notes["conversations are a row for each answer: this chat template rewrites earlier answers"] = 1
        return +notes

    def encode_last_answers(self, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
        """Each conversation with its last answer learned."""
        return list(self.examples_of(conversations, lambda one: (len(one.messages) - 1,)))

    def examples_of(
        self, conversations: Sequence[Conversation], places: Callable[[Conversation], tuple[int, ...]]
    ) -> Iterator[EncodedConversation]:
        """The examples of each conversation. places: the messages that are learned."""
        rendered = render_jobs(
            self.settings, (self.render_job(conversation, places(conversation)) for conversation in conversations)
        )
        for batch in batch_by_size(zip(conversations, rendered, strict=True)):
            yield from self.encode_renderings(batch)

    def encode_renderings(self, batch: Sequence[tuple[Conversation, Rendering]]) -> Iterator[EncodedConversation]:
        """The examples of conversations, of which the tokenizer reads all texts at once."""
        split = [self.split_rows(rendering, one.where) for one, rendering in batch]
        pieces = [[text for text, _ in row] for rows in split if not isinstance(rows, str) for row in rows]
        encoded = self.control_encoder.encode_texts_in_pieces(pieces)
        for (one, rendering), rows in zip(batch, split, strict=True):
            if isinstance(rows, str):
                yield EncodedConversation((), rows)
                continue
            examples = tuple(self.build_example(row, next(encoded), one.where) for row in rows)
            yield EncodedConversation(examples, rendering.error, rendering.unwritten)

    def split_rows(self, rendering: Rendering, where: str) -> list[list[tuple[str, bool]]] | str:
        """The pieces of each row of a conversation, or why nothing can be learned from it."""
        try:
            rows = [list(self.split_answers(layout, where)) for layout in rendering.rows]
        except DataError as error:
            return str(error).removeprefix(f"{where}: ")
        if any(not any(is_answer and text for text, is_answer in row) for row in rows):
            return "this chat template writes no answer of the assistant that is learned"
        return rows

    def render_job(self, one: Conversation, learned: tuple[int, ...] | None = None) -> RenderJob:
        return RenderJob(
            self.writer.write(one.message_dicts), add_generation_prompt=False, where=one.where,
            tools=[self.writer.escape_value(tool) for tool in one.tools], learned=learned,
        )  # fmt: skip

    def build_example(self, pieces: Sequence[tuple[str, bool]], encoded: list[np.ndarray], where: str) -> ChatExample:
        """The conversation up to the end of its last answer, each answer with its end."""
        if not self.ends_with_control_token(pieces[-1][0]):
            encoded[-1] = np.append(encoded[-1], np.int32(self.tokenizer.eos_token_id))
        is_answer = np.repeat([one for _, one in pieces], [len(ids) for ids in encoded])
        return ChatExample(np.concatenate(encoded), is_answer, where)

    def split_answers(self, layout: RenderedChat, where: str) -> Iterator[tuple[str, bool]]:
        """The text before each answer, and the answer with the token that ends it; whether it is the answer."""
        at = 0
        for begin, stop in layout.answer_spans:
            end = begin + self.answer_end(layout.text[begin:stop], layout.text[stop:])
            yield layout.text[at:begin], False
            at, answer = end, layout.text[begin:end]
            if not self.ends_with_control_token(answer) and layout.text[end:].strip():
                raise DataError(
                    f"{where}: this chat template does not end an answer with a control token, so the model could "
                    "not learn to stop; use one that does"
                )
            yield answer, True

    def answer_end(self, answer: str, rest: str) -> int:
        """How much of an answer's text is learned: up to its end token, which the tags may have left outside, and
        not the line end after it."""
        if not self.ends_with_control_token(answer.rstrip()) and (after := self.control_encoder.pattern.match(rest)):
            return len(answer) + after.end()
        return len(answer.rstrip()) if self.ends_with_control_token(answer.rstrip()) else len(answer)

    def ends_with_control_token(self, answer: str) -> bool:
        """Whether a text ends with a control token."""
        return bool(self.control_encoder.last_control_token(answer))

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text: the template's control tokens are control tokens; what was escaped is text."""
        return self.control_encoder.encode(text)


def batch_by_size(
    renderings: Iterable[tuple[Conversation, Rendering]],
) -> Iterator[list[tuple[Conversation, Rendering]]]:
    """Batches of bounded text."""
    batch, size = list[tuple[Conversation, Rendering]](), 0
    for one, rendering in renderings:
        batch.append((one, rendering))
        size += sum(len(row.text) for row in rendering.rows)
        if size > ENCODED_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def places_to_learn(one: Conversation) -> tuple[int, ...]:
    """The places of the answers that are learned."""
    return tuple(n for n, message in enumerate(one.messages) if message.is_learned and not is_empty(message))


def count_empty_answers(one: Conversation) -> int:
    return sum(message.is_learned and is_empty(message) for message in one.messages)


def is_empty(message: Message) -> bool:
    """Whether an answer says nothing: it would train the model to say nothing."""
    return not (message.content.strip() or message.extra.get("tool_calls") or message.extra.get("reasoning_content"))


ENDINGS = ("conversation", "conversation.rstrip()", "conversation.rstrip() + eos_token")
"""What of a rendered conversation is kept, tried in this order."""
PROBE = Conversation(
    (Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")), "a conversation to try the template with"
)


def end_template_at_answer(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template, changed so that a whole conversation ends with its last answer's end token:
    where a reward model is trained and its number is read.

    Commonly got wrong: most templates write a line end after the answer's end; transformers then reads the number at
    the line end, where it was never trained. DataError where no such form of the template is found."""
    before = tokenizer.chat_template
    try:
        chat = ChatTemplate(tokenizer)
        trained = chat.encode_conversations([PROBE])[0].input_ids.tolist()
        bare = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", replace_generation_tag, chat.template)
        wrapped = (
            f"{{% set conversation %}}{bare}{{% endset %}}{{{{ conversation if add_generation_prompt else {ending} }}}}"
            for ending in ENDINGS[1:]
        )
        for template in (chat.template, *wrapped):
            if ChatTemplate(tokenizer, template).encode_whole([PROBE])[0] == trained:
                return template
    finally:
        tokenizer.chat_template = before
    raise DataError(
        "this chat template writes more than white space after an answer's end, so transformers would read a score "
        "elsewhere than it was trained; train with another one (data.chat_template_path)"
    )


def replace_generation_tag(tag: re.Match[str]) -> str:
    """A tag without effect in place of transformers' `generation`, which may not stand inside a variable."""
    return f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"
