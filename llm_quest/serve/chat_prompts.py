"""Messages become a prompt: the model's chat template, in a process of its own that stays."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.message_parsing import TEXT_PARTS
from llm_quest.data.template_program import find_reserved_argument, find_unread_arguments
from llm_quest.data.template_sandbox import CPU_SECONDS
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.rollouts.worker_process import WorkerFailure, WorkerProcess
from llm_quest.serve.errors import ApiError
from llm_quest.serve.protocol import ChatBody, Message
from llm_quest.serve.template_worker import render_requests

IMAGE_PARTS = ("image_url", "input_image", "image")


class ChatPrompts:
    """Renders conversations with a tokenizer's chat template. Calls from several threads wait for each other."""

    def __init__(self, tokenizer: Tokenizer):
        self.template = ChatTemplate(tokenizer)
        self.worker = WorkerProcess(render_requests)
        self.lock = threading.Lock()

    def encode(self, body: ChatBody) -> list[int]:
        """The ids of the prompt. ApiError 400 for messages that the template refuses."""
        given = template_arguments(self.template.template, body)
        settings = replace(self.template.settings, chat_template_kwargs=given)
        writer = self.template.writer
        messages = writer.write([message_for_template(one, at) for at, one in enumerate(body.messages)])
        tools = [writer.escape_value(tool) for tool in body.tools if body.tool_choice != "none"]
        if tools and "tools" not in self.template.template:
            raise ApiError(400, "this model's chat template takes no tools", param="tools")
        with self.lock:
            try:
                text = self.worker.call((vars(settings), messages, tools), CPU_SECONDS * 5)
            except WorkerFailure as failure:
                raise ApiError(400, f"the chat template failed: {failure.message[:300]}", param="messages") from None
        return self.template.encode(text)

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


def message_for_template(message: Message, place: int) -> dict[str, Any]:
    """A message with one text as its content. ApiError 400 for parts other than text."""
    found = {key: value for key, value in message.model_dump().items() if value is not None}
    content = message.content
    if isinstance(content, list):
        if any(part.get("type") in IMAGE_PARTS for part in content):
            refusal = "this server reads no images: send parts of type text (quest generate --image answers about one)"
            raise ApiError(400, refusal, param=f"messages.{place}.content", code="image_not_supported")
        if any(part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str) for part in content):
            raise ApiError(400, "only parts of type text are read by this model", param=f"messages.{place}.content")
        content = "".join(part["text"] for part in content)
    if content is None and not found.get("tool_calls"):
        raise ApiError(400, "a message has a content", param=f"messages.{place}.content")
    return found | {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
