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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from llm_quest.data.control_tokens import ControlTokenEncoder
from llm_quest.data.conversations import Conversation
from llm_quest.data.template_sandbox import Messages, RenderedChat, RenderJob, render_batch, render_prompt
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError

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


class ChatTemplate:
    """A tokenizer's chat template, or else the default one, which the tokenizer then keeps and saves."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        tokenizer.chat_template = template or tokenizer.chat_template or default_chat_template(tokenizer)
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template
        self.control_encoder = ControlTokenEncoder(tokenizer)
        self.special_token_names = {
            key: name[0] if isinstance(name, list) else name
            for key, name in tokenizer.special_token_names.items()
            if name
        }

    def encode_prompt(self, messages: Messages) -> list[int]:
        """The ids that ask for the assistant's next message."""
        return self.encode(
            render_prompt(self.template, self.escape_control_tokens(messages), special_tokens=self.special_token_names)
        )

    def message_of_reply(self, messages: Messages, reply: str) -> str:
        """The content of the message whose rendering, after these messages, is the reply as it was written: perhaps
        without the spaces around it, where the template writes its own (`' ' + content`)."""
        contents = list(dict.fromkeys((reply, reply.lstrip(), reply.strip())))
        asked = RenderJob(self.escape_control_tokens(messages), add_generation_prompt=True)
        said = [
            RenderJob(
                self.escape_control_tokens([*messages, {"role": "assistant", "content": content}]),
                add_generation_prompt=False,
            )
            for content in contents
        ]
        prompt, *rendered = render_batch(self.template, [asked, *said], special_tokens=self.special_token_names)
        written = prompt.text + self.control_encoder.escape(reply)
        texts = zip(contents, rendered, strict=True)
        return next((content for content, one in texts if one.text.startswith(written)), contents[-1])

    def encode_prompts(self, conversations: Sequence[Messages]) -> list[list[int]]:
        """The prompts of many conversations, by one process."""
        jobs = [
            RenderJob(self.escape_control_tokens(messages), add_generation_prompt=True) for messages in conversations
        ]
        return [
            self.encode(one.text) for one in render_batch(self.template, jobs, special_tokens=self.special_token_names)
        ]

    def encode_whole(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The ids of whole conversations as the template writes them, as transformers' `apply_chat_template`."""
        jobs = [RenderJob(self.escape_control_tokens(one.message_dicts), False, one.where) for one in conversations]
        rendered = render_batch(self.template, jobs, special_tokens=self.special_token_names) if jobs else []
        return [self.encode(one.text) for one in rendered]

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[ChatExample]:
        """Each conversation with all its answers learned."""
        if not conversations:
            return []
        render = self.render_with_generation_tags if "generation" in self.template_tags() else self.render_by_prefix
        return [
            self.encode_example(layout, one) for layout, one in zip(render(conversations), conversations, strict=True)
        ]

    def template_tags(self) -> set[str]:
        """The template's statements by their first word."""
        return set(re.findall(r"\{%[-+]?\s*(\w+)", self.template))

    def render_with_generation_tags(self, conversations: Sequence[Conversation]) -> list[RenderedChat]:
        """Render where the template itself marks what the model writes."""
        jobs = [
            RenderJob(self.escape_control_tokens(one.message_dicts), add_generation_prompt=False, where=one.where)
            for one in conversations
        ]
        return render_batch(self.template, jobs, special_tokens=self.special_token_names)

    def render_by_prefix(self, conversations: Sequence[Conversation]) -> list[RenderedChat]:
        """Render where the template has no marks: an answer is the text between the prompt that asks for it and the
        prompt after it."""
        jobs = [job for one in conversations for job in self.prefix_jobs(one)]
        texts = iter(render_batch(self.template, jobs, special_tokens=self.special_token_names))
        return [self.locate_answers(one, texts) for one in conversations]

    def prefix_jobs(self, one: Conversation) -> Iterator[RenderJob]:
        """The whole conversation, then up to before and after each answer."""
        escaped = self.escape_control_tokens(one.message_dicts)
        yield RenderJob(escaped, add_generation_prompt=False, where=one.where)
        for number, message in enumerate(escaped):
            if message["role"] == "assistant":
                yield RenderJob(escaped[:number], add_generation_prompt=True, where=one.where)
                yield RenderJob(escaped[: number + 1], add_generation_prompt=False, where=one.where)

    def locate_answers(self, one: Conversation, texts: Iterator[RenderedChat]) -> RenderedChat:
        whole = next(texts).text
        spans = []
        for message in one.messages:
            if message.role == "assistant":
                before, after = next(texts).text, next(texts).text
                if not after.startswith(before) or not whole.startswith(after):
                    raise DataError(
                        f"{one.where}: this chat template changes what was said before as a conversation goes on, so "
                        "it cannot be told what of it the model wrote; put {% generation %} and {% endgeneration %} "
                        "around the answer in it, or give rows of one answer each"
                    )
                spans.append((len(before), len(after)))
        return RenderedChat(whole, tuple(spans))

    def encode_example(self, layout: RenderedChat, one: Conversation) -> ChatExample:
        """Encode the conversation up to the end of its last answer, each answer with its end."""
        where, learned = one.where, iter(learned_answers(one, len(layout.answer_spans)))
        pieces = [(text, is_answer and next(learned)) for text, is_answer in self.split_answers(layout, where)]
        encoded = self.control_encoder.encode_pieces([text for text, _ in pieces])
        if pieces and not self.ends_with_control_token(pieces[-1][0]):
            encoded[-1] = [*encoded[-1], self.tokenizer.eos_token_id]
        assistant_mask = [is_answer for ids, (_, is_answer) in zip(encoded, pieces, strict=True) for _ in ids]
        if not any(assistant_mask):
            raise DataError(f"{where}: this chat template writes no answer of the assistant that is learned")
        return ChatExample(np.array([*chain(*encoded)], dtype=np.int64), np.array(assistant_mask), where)

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

    def escape_control_tokens(self, messages: Messages) -> Messages:
        """Messages in which nothing spells a control token."""
        return [{**message, "content": self.control_encoder.escape(message["content"])} for message in messages]

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text: the template's control tokens are control tokens; what was escaped is text."""
        return self.control_encoder.encode(text)


def learned_answers(one: Conversation, marked: int) -> list[bool]:
    """Whether each answer that the template wrote is learned. marked: how many it wrote."""
    learned = [message.train for message in one.messages if message.role == "assistant"]
    if len(learned) != marked and not all(learned):
        raise DataError(
            f"{one.where}: this chat template marks {marked} answers in a conversation of {len(learned)}, so those "
            "that are not to be learned cannot be told apart; split the conversation"
        )
    return learned if len(learned) == marked else [True] * marked


ENDINGS = ("conversation", "conversation.rstrip()", "conversation.rstrip() + eos_token")
"""What of a rendered conversation is kept, tried in this order."""
PROBE = Conversation((("user", "What is 2 + 2?"), ("assistant", "It is 4.")), "a conversation to try the template with")


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
