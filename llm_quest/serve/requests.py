"""A request as the engine runs it, and what it is told while it runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import NEG_INF, SamplingParams, row_uniforms, token_presence_mask
from llm_quest.generation.stopping import FinishReason, GeneratedSequence, GeneratedToken, StoppingCriteria


class Grammar(Protocol):
    """What a text may be: `token_mask` of the next one, and `consume` of the one that was drawn."""

    def token_mask(self) -> Bool[Tensor, " V"]: ...

    def consume(self, token: int) -> None: ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in the model's own distribution (before bias, penalties, temperature and filters), and
    the most probable tokens with theirs."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read. cached: how many of its tokens were known. logprobs: of the prompt's tokens, if they
    were asked for."""

    cached: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenMade:
    """One token of a choice. text: what became certain with it."""

    choice: int
    token: int
    text: str
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class RequestFailed:
    """The request ended without an answer. status: of HTTP."""

    status: int
    message: str
    code: str | None = None


Event = PromptRead | TokenMade | RequestFailed
Deliver = Callable[["GenerationRequest", Sequence[Event]], None]

NUMBERS = itertools.count()


@dataclass(eq=False)
class GenerationRequest:
    """n texts after one prompt. top_logprobs: how many alternatives are wanted of each token; None: no
    log-probabilities. read_prompt_only: no text is wanted. deliver: called by the engine's thread with the events of a
    step. images: of the prompt, uint8 (C,H,W) each. deadline: by time.monotonic."""

    prompt: Sequence[int]
    sampling_params: SamplingParams
    stopping_criteria: StoppingCriteria
    deliver: Deliver
    n: int = 1
    seed: int = 0
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    read_prompt_only: bool = False
    make_grammar: Callable[[], Grammar] | None = None
    images: Sequence[np.ndarray] = ()
    deadline: float = float("inf")
    cancelled: bool = False
    number: int = field(default_factory=lambda: next(NUMBERS))
    arrival: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float = 0.0
    num_unfinished: int = 0


class RunningRow:
    """One choice of a request while it is generated. token: the last one that was drawn, -1 if none could be."""

    def __init__(
        self,
        request: GenerationRequest,
        choice: int,
        uniforms: Sequence[float],
        vocab_size: int,
        context: int,
        device: torch.device,
    ):
        self.request, self.choice, self.uniforms, self.token = request, choice, uniforms, -1
        self.sequence = GeneratedSequence(choice, request.prompt, request.stopping_criteria, context)
        params = self.sampling_params = request.sampling_params
        self.processor = LogitsProcessor(params, request.stopping_criteria, vocab_size, device)
        penalized = params.repetition_penalty != 1
        self.seen = token_presence_mask([request.prompt], vocab_size, device) if penalized else None
        self.grammar = request.make_grammar() if request.make_grammar else None

    @property
    def is_plain(self) -> bool:
        """Whether its tokens depend on the logits and the sampling parameters alone."""
        return not (
            self.grammar or self.seen is not None or self.processor.bias is not None or self.processor.reads_history
        )

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        return self.uniforms[self.sequence.num_generated]

    def add_bias(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        return self.processor.add_bias(logits)

    def offsets(self) -> Float[Tensor, "B V"] | None:
        """What history and grammar add to the logits; None: nothing."""
        offsets = self.processor.history_offsets([self.sequence])
        if self.grammar is None:
            return offsets
        allowed = self.grammar.token_mask()
        forbidden = torch.zeros(1, len(allowed)).masked_fill(~allowed, NEG_INF).to(self.processor.device)
        return forbidden if offsets is None else forbidden + offsets

    def append(self) -> GeneratedToken:
        """Append the token that was drawn."""
        if self.seen is not None:
            self.seen[0, self.token] = True
        if self.grammar is not None:
            self.grammar.consume(self.token)
        return self.sequence.append_token(self.token, 0.0)


def start_rows(request: GenerationRequest, vocab_size: int, context: int, device: torch.device) -> list[RunningRow]:
    """The rows of a request. Their random numbers are those of `generate` with this seed and prompt."""
    criteria = request.stopping_criteria
    uniforms = row_uniforms([request.prompt], request.n, criteria.max_new_tokens, request.seed).tolist()
    return [
        RunningRow(request, choice, numbers, vocab_size, context, device) for choice, numbers in enumerate(uniforms)
    ]
