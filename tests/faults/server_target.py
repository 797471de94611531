"""Requests to the server as inputs: each is answered with 200, or with a 4xx in OpenAI's form."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from llm_quest.errors import UsageError
from tests.serve.local_server import LocalServer, local_server

FIELDS = {
    "model": "tiny", "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "n": 2,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop": ["x", "yz"], "seed": 3, "logit_bias": {"7": 2.5},
    "max_tokens": 3, "min_tokens": 1, "ignore_eos": False, "response_format": {"type": "text"}, "user": "somebody",
}  # fmt: skip
TOOL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT = {
    **FIELDS,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Once"}]},
        {"role": "assistant", "content": "yes", "tool_calls": [TOOL]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ],
    "logprobs": True, "top_logprobs": 2, "tools": [], "tool_choice": "auto", "chat_template_kwargs": {},
}  # fmt: skip
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1]}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip
STRUCTURED = {
    "messages": [{"role": "user", "content": "Once"}], "max_completion_tokens": 4,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
}  # fmt: skip
TEXTS = (
    {**FIELDS, "prompt": ["Once", "upon"], "logprobs": 2, "echo": True, "best_of": 2, "suffix": None},
    {"prompt": [[5, 6, 7], [8]], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
)
FORM = {"message", "type", "param", "code"}


RUNNING = ExitStack()
atexit.register(RUNNING.close)


@functools.cache
def shared_server() -> LocalServer:
    """One server for all inputs, until the process ends."""
    return RUNNING.enter_context(local_server(slots=4, max_model_len=96))


def ask(path: str) -> Callable[[Path], object]:
    def read(file: Path) -> object:
        status, answer, _ = shared_server().ask("POST", path, file.read_bytes())
        if status == 200:
            return answer
        assert 400 <= status < 500, f"status {status}: {answer}"
        assert set(answer["error"]) == FORM, answer
        raise UsageError(answer["error"]["message"])

    return read
