"""What is served, and how the body of a request becomes requests of the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import token_bytes
from llm_quest.errors import UsageError
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.speculative.decoder import DraftSource
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.hub.pooling import Pooling
from llm_quest.serve.batch import RunningBatch
from llm_quest.serve.chat_prompts import ChatPrompts
from llm_quest.serve.errors import ApiError
from llm_quest.serve.grammar import GrammarCompiler
from llm_quest.serve.images import ImageReader
from llm_quest.serve.metrics import Samples, model_label, value_samples
from llm_quest.serve.protocol import ChatBody, CompletionBody, GenerationFields
from llm_quest.serve.requests import Deliver, GenerationRequest, Grammar

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's max_tokens of /v1/completions."""


@dataclass(eq=False)
class ServedModel:
    """A model under its name. defaults: temperature, top_p and their like, where a request says nothing. pooling: of a
    model that makes embeddings. draft: whose proposals the inside view shows. images: of a model that reads them."""

    name: str
    tokenizer: Tokenizer
    batch: RunningBatch
    eos_token_ids: tuple[int, ...]
    defaults: Mapping[str, Any]
    parent: str | None = None
    pooling: Pooling | None = None
    draft: DraftSource | None = None
    images: ImageReader | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def chat_prompts(self) -> ChatPrompts:
        return ChatPrompts(self.tokenizer, self.images, self.max_model_len)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.batch.vocab_size, self.eos_token_ids)

    @property
    def max_model_len(self) -> int:
        return self.batch.limits.max_model_len

    def close(self) -> None:
        """End the process that renders its chat template."""
        if "chat_prompts" in self.__dict__:
            self.chat_prompts.close()

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; of a control token, those of its name."""
        try:
            token_bytes_ = token_bytes(self.tokenizer, [token])[0]
        except UsageError:
            name = self.tokenizer.backend_tokenizer.id_to_token(token) or ""
            if token in self.tokenizer.byte_token_ids:
                return bytes([int(name[3:5], 16)])
            token_bytes_ = name.replace("\u2581", " ").encode()
        return token_bytes_ or self.tokenizer.decode([token], keep_special_tokens=True).encode()


@dataclass(frozen=True)
class RequestOptions:
    """What all requests of one body share."""

    deliver: Deliver
    deadline: float


def sampling_params(body: GenerationFields, defaults: Mapping[str, Any], vocab_size: int) -> SamplingParams:
    """How tokens are drawn. ApiError 400 for what is not possible."""
    given = {name: getattr(body, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    chosen = {"temperature": 1.0} | dict(defaults) | {name: one for name, one in given.items() if one is not None}
    if chosen.get("top_k") in (0, -1):
        del chosen["top_k"]
    bias = tuple((int(token), value) for token, value in body.logit_bias.items())
    if wrong := [token for token, _ in bias if token >= vocab_size]:
        raise ApiError(400, f"token {wrong[0]} does not exist: ids end at {vocab_size - 1}", param="logit_bias")
    return SamplingParams(
        **chosen,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
    )


def check_length(served: ServedModel, prompt: Sequence[int], wanted: int | None, read_only: bool, param: str) -> int:
    """How many tokens may be generated. ApiError 400 where prompt and text do not fit in the context. param: the field
    that the prompt came from."""
    if not prompt:
        raise ApiError(400, "the text is empty: it has no tokens", param=param)
    if wrong := next((token for token in prompt if not 0 <= token < served.batch.vocab_size), None):
        raise ApiError(400, f"token {wrong} does not exist: ids end at {served.batch.vocab_size - 1}", param=param)
    context, more = served.max_model_len, 0 if read_only else 1 if wanted is None else wanted
    if len(prompt) + more > context:
        rest = context - len(prompt)
        remedy = f", and {more} more are asked for: ask for at most {rest}" if rest > 0 else ": shorten it"
        message = f"this model's maximum context length is {context} tokens; the prompt has {len(prompt)}{remedy}"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return context - len(prompt) if wanted is None else wanted


def start_grammar(served: ServedModel, body: GenerationFields) -> Callable[[], Grammar] | None:
    """What begins a text that follows the schema of response_format; None without one. ApiError 400 for one that cannot
    be enforced."""
    if body.schema is None:
        return None
    try:
        return partial(served.grammars.start, served.grammars.compile(body.schema))
    except UsageError as error:
        raise ApiError(400, str(error), param="response_format") from None


def chat_request(served: ServedModel, body: ChatBody, options: RequestOptions) -> GenerationRequest:
    """The request of a chat completion. ApiError 400 for what is not possible."""
    if body.tool_choice not in (None, "none", "auto"):
        raise ApiError(400, "a forced tool is not supported: give tool_choice auto or none", param="tool_choice")
    prompt = served.chat_prompts.encode(body)
    wanted = body.max_completion_tokens or body.max_tokens
    top = body.top_logprobs if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    length = check_length(served, prompt.ids, wanted, False, "messages")
    request = make_request(served, body, options, prompt.ids, length, top)
    request.images = prompt.images
    return request


def completion_requests(served: ServedModel, body: CompletionBody, options: RequestOptions) -> list[GenerationRequest]:
    """The requests of a text completion, one for each prompt. ApiError 400 for what is not possible."""
    if body.suffix is not None:
        raise ApiError(400, "suffix is not supported", param="suffix")
    if body.best_of not in (None, body.n):
        raise ApiError(400, "best_of is supported where it equals n", param="best_of")
    wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if wanted == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0: give at least 1, or echo", param="max_tokens")
    requests = []
    for prompt in encode_prompts(served.tokenizer, body):
        length = check_length(served, prompt, wanted, wanted == 0, "prompt")
        one = make_request(served, body, options, prompt, max(length, 1), body.logprobs)
        one.read_prompt_only, one.prompt_logprobs = wanted == 0, body.echo and body.logprobs is not None
        requests.append(one)
    return requests


def encode_prompts(tokenizer: Tokenizer, body: CompletionBody) -> list[list[int]]:
    """The ids of the prompts of a text completion; what spells a control token is text."""
    prompts: Any = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    return [one or [tokenizer.start_token_id] for one in ids]


def make_request(
    served: ServedModel,
    body: GenerationFields,
    options: RequestOptions,
    prompt: Sequence[int],
    max_new_tokens: int,
    top_logprobs: int | None,
) -> GenerationRequest:
    """A request of the engine. ApiError 400 for more choices than slots."""
    if body.n > served.batch.limits.slots:
        raise ApiError(400, f"n is {body.n}: this server generates {served.batch.limits.slots} at a time", param="n")
    if body.min_tokens > max_new_tokens:
        raise ApiError(400, f"min_tokens is more than the {max_new_tokens} that may follow", param="min_tokens")
    criteria = StoppingCriteria(
        max_new_tokens=max_new_tokens,
        eos_token_ids=() if body.ignore_eos else served.eos_token_ids,
        stop=body.stops,
        tokenizer=served.tokenizer,
        min_new_tokens=body.min_tokens,
    )
    return GenerationRequest(
        prompt,
        sampling_params(body, served.defaults, served.batch.vocab_size),
        criteria,
        options.deliver,
        n=body.n,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        top_logprobs=top_logprobs,
        make_grammar=start_grammar(served, body),
        deadline=options.deadline,
    )


def model_samples(served: ServedModel) -> Samples:
    """The metrics of a model."""
    batch, label = served.batch, model_label(served.name)
    gauges = {
        "vllm:num_requests_running": batch.num_running,
        "vllm:num_requests_waiting": len(batch.waiting),
        "vllm:kv_cache_usage_perc": batch.slots.use,
    }
    reuse = {
        "vllm:prefix_cache_queries_total": batch.prefixes.queries,
        "vllm:prefix_cache_hits_total": batch.prefixes.hits,
    }
    return batch.metrics.samples(label) | value_samples("gauge", gauges, label) | value_samples("counter", reuse, label)
