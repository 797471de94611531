"""Messages become a prompt: the model's chat template, in a process of its own that stays. Images become placeholders
in it, as `quest generate --image` writes them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.message_parsing import TEXT_PARTS
from llm_quest.data.template_program import TemplateSettings, find_reserved_argument, find_unread_arguments
from llm_quest.data.template_sandbox import CPU_SECONDS
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.rollouts.worker_process import WorkerFailure, WorkerProcess
from llm_quest.serve.errors import ApiError
from llm_quest.serve.images import ImageReader, Pixels, image_url, is_image
from llm_quest.serve.protocol import ChatBody, ChatMessage
from llm_quest.serve.template_worker import render_requests


@dataclass(frozen=True)
class EncodedChat:
    """The ids of a conversation, and its images in their order."""

    ids: list[int]
    images: Sequence[Pixels] = ()


class ChatPrompts:
    """Renders conversations with a tokenizer's chat template. Calls from several threads wait for each other. reader:
    of a model that reads images. max_tokens: how many of a prompt images may take."""

    def __init__(self, tokenizer: Tokenizer, reader: ImageReader | None = None, max_tokens: int = 0):
        self.reader, self.max_tokens = reader, max_tokens
        self.template = ChatTemplate(tokenizer)
        self.worker = WorkerProcess(render_requests)
        self.lock = threading.Lock()

    def encode(self, body: ChatBody) -> EncodedChat:
        """The prompt. ApiError 400 for messages that the template refuses."""
        images = self.read_images(body.messages)
        given = template_arguments(self.template.template, body)
        settings = replace(self.template.settings, chat_template_kwargs=given)
        writer = self.template.writer
        write = message_for_template if self.writes_text and not images else message_with_parts
        messages = writer.write([write(message, at) for at, message in enumerate(body.messages)])
        tools = [writer.escape_value(tool) for tool in body.tools if body.tool_choice != "none"]
        if tools and "tools" not in self.template.template:
            raise ApiError(400, "this model's chat template takes no tools", param="tools")
        text = self.render(settings, messages, tools)
        if self.reader is None or not images:
            return EncodedChat(self.template.encode(text))
        lengths = [self.reader.num_tokens(image) for image in images]
        return EncodedChat(self.reader.chat.encode_expanded(text, lengths), images)

    def render(self, settings: TemplateSettings, messages: Sequence[Any], tools: Sequence[Any] = ()) -> str:
        """The conversation as a text, with the beginning of the answer. ApiError 400 where the template fails."""
        with self.lock:
            try:
                return self.worker.call((vars(settings), messages, tools), CPU_SECONDS * 5)
            except WorkerFailure as failure:
                raise ApiError(400, f"the chat template failed: {failure.message[:300]}", param="messages") from None

    @cached_property
    def writes_text(self) -> bool:
        """Whether the template writes a content that is a text; LLaVA's writes lists of parts alone."""
        try:
            return "hello" in self.render(self.template.settings, [{"role": "user", "content": "hello"}])
        except ApiError:
            return True

    def read_images(self, messages: Sequence[ChatMessage]) -> list[Pixels]:
        """The images of a conversation. ApiError 400 where the model or its template reads none, and for more of them
        than fit in a prompt."""
        images: list[Pixels] = []
        total = 0
        for place, message in enumerate(messages):
            for number, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if not is_image(part):
                    continue
                param = f"messages.{place}.content.{number}"
                reader = self.require_reader(param)
                images.append(reader.read(image_url(part), param))
                total += reader.num_tokens(images[-1])
                if total > self.max_tokens:
                    problem = f"{len(images)} images take {total} tokens; this model's context has {self.max_tokens}"
                    raise ApiError(400, problem, param=param, code="context_length_exceeded")
        return images

    def require_reader(self, param: str) -> ImageReader:
        """What reads images. ApiError 400 where nothing does."""
        if self.reader is None:
            raise ApiError(400, "this model reads no images", param=param, code="image_not_supported")
        if not self.reader.chat.has_template:
            problem = (
                "this model's chat template writes no images (quest generate --image takes a prompt written whole)"
            )
            raise ApiError(400, problem, param=param, code="image_not_supported")
        return self.reader

    def close(self) -> None:
        self.worker.close()


def template_arguments(source: str, body: ChatBody) -> dict[str, Any]:
    """What the template reads besides messages. ApiError 400 for what it does not read."""
    given = dict(body.chat_template_kwargs)
    if name := find_reserved_argument(given):
        raise ApiError(400, f"{name!r} is given to every chat template", param="chat_template_kwargs")
    if unread := find_unread_arguments(source, given):
        raise ApiError(400, f"this chat template reads no {', '.join(unread)[:200]}", param="chat_template_kwargs")
    if body.reasoning_effort is not None and "reasoning_effort" in source:
        given["reasoning_effort"] = body.reasoning_effort
    return given


def message_for_template(message: ChatMessage, place: int) -> dict[str, Any]:
    """A message with one text as its content. ApiError 400 for parts other than text."""
    content = message.content
    if isinstance(content, list):
        content = "".join(text_of_part(part, place) for part in content)
    return with_content(message, content, place)


def message_with_parts(message: ChatMessage, place: int) -> dict[str, Any]:
    """A message as templates that write images take it: a list of parts in their order. ApiError 400 for parts that
    are neither text nor image."""
    content: Any = message.content
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif content is not None:
        content = [
            {"type": "image"} if is_image(part) else {"type": "text", "text": text_of_part(part, place)}
            for part in content
        ]
    return with_content(message, content, place)


def text_of_part(part: Mapping[str, Any], place: int) -> str:
    text = part.get("text")
    if part.get("type") not in TEXT_PARTS or not isinstance(text, str):
        raise ApiError(400, "this model reads no parts of this type: send text", param=f"messages.{place}.content")
    return text


def with_content(message: ChatMessage, content: Any, place: int) -> dict[str, Any]:
    """A message for the template. ApiError 400 for one without content."""
    fields = {key: value for key, value in message.model_dump().items() if value is not None}
    if content is None and not fields.get("tool_calls"):
        raise ApiError(400, "a message has a content", param=f"messages.{place}.content")
    return fields | {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
