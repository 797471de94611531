"""The bodies of OpenAI's requests. Unknown fields are ignored, for clients add some every month; null is absent; a
field of another type or out of its range is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from llm_quest.serve.errors import ApiError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_MESSAGES, MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, MAX_STOP_CHARACTERS = 10_000, 16, 64, 16, 200
MAX_TOP_LOGPROBS = 20
MAX_DEPTH = 100
MAX_SEED = 2**63
KINDS = ("constrained", "list[", "dict[", "function-")
"""What the name of a kind begins with in an error's place."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1)]


def require_token_bias(given: dict[str, float]) -> dict[str, float]:
    """Token ids as decimal strings, each with a number from -100 to 100."""
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"{token[:40]!r} is no token id")
        if not -100 <= bias <= 100:
            raise ValueError(f"the bias of {token} is {bias:g}: give a number from -100 to 100")
    return given


class Part(BaseModel):
    """A body or a part of one."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Part):
    include_usage: StrictBool = False


class JsonSchema(Part):
    name: StrictStr = ""
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationFields(Part):
    """What chat and text completions have in common. max_tokens ... min_p: None: the model's own."""

    model: StrictStr | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    logit_bias: Annotated[dict[StrictStr, Number], Field(max_length=1024), AfterValidator(require_token_bias)] = {}
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool = False
    min_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    max_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def schema(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """The JSON schema that the text must follow."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "object"}
        if form.json_schema is None:
            raise ApiError(400, "response_format json_schema has no json_schema", param="response_format.json_schema")
        return form.json_schema.schema_


class ChatMessage(Part):
    """A message of a conversation. Further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatBody(GenerationFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: StrictStr | None = None


class CompletionBody(GenerationFields):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: StrictBool = False
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None


class TokenizeBody(Part):
    """POST /tokenize."""

    model: StrictStr | None = None
    prompt: StrictStr
    add_special_tokens: StrictBool = True


class DetokenizeBody(Part):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: list[Annotated[StrictInt, Field(ge=0, lt=2**31)]]


Body = TypeVar("Body", bound=Part)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """A request's body. ApiError 400 for what is not valid, which names the field."""
    value = parse_request_json(raw)
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}; give an object")
    try:
        return kind.model_validate({key: one for key, one in value.items() if one is not None})
    except ValidationError as error:
        problem = most_specific(error.errors(include_url=False, include_context=False, include_input=False))
        where, message = ".".join(field_path(problem)), problem["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where or 'the body'}: {message}"[:500], param=where[:200] or None) from None


def most_specific(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The error that says most of the first wrong field. A value that may be of several kinds has an error for each of
    them; that of the kind that was meant is no complaint about the kind itself, and lies deepest."""
    same_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return max(same_field, key=lambda one: (not one["type"].endswith("_type"), len(field_path(one))))


def field_path(error: ErrorDetails) -> list[str]:
    """The names of an error's field, without those of the kinds that it may be of."""
    return [str(part) for part in error["loc"] if not (part == "str" or str(part).startswith(KINDS))]


def parse_request_json(raw: bytes) -> Any:
    """The value of a JSON document in UTF-8, without NaN and infinity. ApiError 400 otherwise."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}") from None
    if depth(value) > MAX_DEPTH:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep")
    return value


def depth(value: Any) -> int:
    """How many containers lie in one another."""
    level, layer = 0, [value]
    while layer := [one for one in layer if isinstance(one, dict | list)]:
        level += 1
        layer = [inner for one in layer for inner in (one.values() if isinstance(one, dict) else one)]
    return level
