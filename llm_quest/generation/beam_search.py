"""Beam search: the most probable completions, by keeping the best `num_beams` beginnings of each.

Every step extends each beam by every token and ranks the extensions by the sum of their log-probabilities. Of the best
(1 + number of eos tokens) * num_beams, those that end and rank among the first num_beams become finished hypotheses;
the first num_beams of the others go on. A hypothesis of n tokens scores

    sum of log-probabilities / n ** length_penalty

as in transformers, whose tokens these are. A text that reaches a stop has ended like one that reaches an eos. Compiled,
a step reads num_beams places for every prompt, those that are left as padding.

Commonly got wrong: a positive length_penalty favors *long* texts, for the sums are negative; only candidates of the
first num_beams ranks may finish, the others are there so that enough go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.decoding import BatchDecoder
from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import SamplingParams, token_presence_mask
from llm_quest.generation.stopping import Completion, GeneratedSequence, StoppingCriteria
from llm_quest.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """The settings of beam search. num_beams: how many beginnings are kept. length_penalty: the exponent of the length
    that sums are divided by. early_stopping: when a prompt is done that has num_beams finished hypotheses: True, at
    once; False, when the best beam would not improve on the worst of them if it ended now; "never", when it could not
    at any length."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UsageError(f"num_beams is {self.num_beams}: give at least 1")
        if not math.isfinite(self.length_penalty):
            raise UsageError(f"length_penalty is {self.length_penalty}: give a finite number; 0 does not divide")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"early_stopping is {self.early_stopping!r}: give True, False or 'never'")


@dataclass(frozen=True)
class Hypothesis:
    """A beginning or a whole completion. score: the sum of its log-probabilities, divided where it is finished."""

    score: float
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Extension:
    """A beam of this number with one more token. score: the sum of all its log-probabilities."""

    score: float
    beam: int
    token: int


@dataclass
class BeamState:
    """The search of one prompt."""

    prompt: Sequence[int]
    max_new_tokens: int
    params: BeamSearchParams
    eos_token_ids: tuple[int, ...]
    stopping_criteria: StoppingCriteria | None = None
    beams: list[Hypothesis] = field(default_factory=lambda: [Hypothesis(0.0)])
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, extensions: Sequence[Extension]) -> list[int]:
        """Take the ranked extensions of a step; which beams the new ones continue."""
        length = len(self.beams[0].tokens) + 1
        grown = [self.extend(one) for one in extensions]
        ends = [length >= self.max_new_tokens or self.is_ended(one.tokens) for one in grown]
        first = list(zip(grown, ends, strict=True))[: self.params.num_beams]
        divisor = length**self.params.length_penalty
        new = [replace(one, score=one.score / divisor) for one, end in first if end]
        self.finished = sorted([*self.finished, *new], key=lambda one: -one.score)[: self.params.num_beams]
        going_on = [number for number, end in enumerate(ends) if not end][: self.params.num_beams]
        self.beams = [grown[number] for number in going_on]
        return [extensions[number].beam for number in going_on]

    def extend(self, one: Extension) -> Hypothesis:
        old = self.beams[one.beam]
        return Hypothesis(one.score, (*old.tokens, one.token), (*old.logprobs, one.score - old.score))

    def is_ended(self, tokens: Sequence[int]) -> bool:
        """Whether this completion ends with its last token: an eos, or the end of a stop."""
        if tokens[-1] in self.eos_token_ids:
            return True
        if self.stopping_criteria is None or not self.stopping_criteria.stop:
            return False
        row = GeneratedSequence(0, self.prompt, self.stopping_criteria, len(self.prompt) + self.max_new_tokens + 1)
        return [row.append_token(token, 0.0).finish_reason for token in tokens][-1] == "stop"

    @property
    def done(self) -> bool:
        """Whether no beam goes on, or none could enter the finished hypotheses."""
        if not self.beams:
            return True
        if len(self.finished) < self.params.num_beams:
            return False
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        length = self.max_new_tokens if longest else len(self.beams[0].tokens)
        best = self.beams[0].score / length**self.params.length_penalty
        return self.params.early_stopping is True or best <= self.finished[-1].score


def beam_search(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    params: BeamSearchParams,
    *,
    n: int = 1,
    compile: bool = False,
) -> list[Completion]:
    """The n best completions of each prompt, the best first; lengths may differ. The log-probabilities of a completion
    are those that were summed. Draws nothing: temperature has to be 0. compile: compiled steps."""
    require_beam_options(sampling_params, stopping_criteria, params, n)
    context = model.config.max_position_embeddings
    states = [
        BeamState(prompt, min(stopping_criteria.max_new_tokens, context - len(prompt)), params,
                  stopping_criteria.eos_token_ids, stopping_criteria)
        for prompt in prompts
    ]  # fmt: skip
    search_beams(model, states, sampling_params, stopping_criteria, compile)
    return [build_hypothesis(one, state, stopping_criteria, context) for state in states for one in state.finished[:n]]


def require_beam_options(
    sampling_params: SamplingParams, stopping_criteria: StoppingCriteria, params: BeamSearchParams, n: int
) -> None:
    """UsageError for options that mean nothing here."""
    if not sampling_params.is_greedy:
        raise UsageError(f"beam search draws nothing: set temperature to 0; it is {sampling_params.temperature}")
    if stopping_criteria.on_full_context == "slide":
        raise UsageError(
            "beam search stays within the context, for a sum of log-probabilities of two contexts ranks nothing: leave "
            "on_full_context='slide' out"
        )
    if n > params.num_beams:
        raise UsageError(f"n is {n}, but {params.num_beams} beams give {params.num_beams} completions: raise num_beams")


def search_beams(
    model: Decoder,
    states: Sequence[BeamState],
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    compile: bool,
) -> None:
    """Search for all prompts at once. One prefill serves the beams of a prompt, which leave the batch when done."""
    device = next(model.parameters()).device
    processor = LogitsProcessor(sampling_params, stopping_criteria, model.config.vocab_size, device)
    decoder = BatchDecoder(
        model, sampling_params, processor, torch.zeros(len(states), 1, device=device), compile=compile
    )
    most_places = len(states) * max(state.params.num_beams for state in states)
    capacity = max(len(state.prompt) + state.max_new_tokens for state in states)
    decoder.prefill_windows([state.prompt for state in states], capacity=capacity)
    active = list(states)
    while active:
        ranked = rank_extensions(decoder, active, processor)
        places, tokens, first, still = list[int](), list[int](), 0, list[BeamState]()
        for state, extensions in zip(active, ranked, strict=True):
            size = len(state.beams)
            continued = state.advance(extensions)
            if not state.done:
                still.append(state)
                places += [first + beam for beam in continued]
                tokens += [beam.tokens[-1] for beam in state.beams]
            first += size
        active = still
        if active:
            decoder.continue_places(places, tokens, most_places)


@torch.inference_mode()
def rank_extensions(
    decoder: BatchDecoder, states: Sequence[BeamState], processor: LogitsProcessor
) -> list[list[Extension]]:
    """The best extensions of each prompt's beams. The processors act on log-probabilities, as in transformers."""
    log_probs = next_log_probs(decoder.logits, states, processor)
    first, ranked = 0, []
    for state in states:
        size = len(state.beams)
        scores = torch.tensor([beam.score for beam in state.beams], device=log_probs.device)
        summed = (log_probs[first : first + size] + scores[:, None]).flatten()
        most = max(2, 1 + len(state.eos_token_ids)) * state.params.num_beams
        best, places = summed.topk(min(most, len(summed)))
        beams, tokens = places // log_probs.shape[-1], places % log_probs.shape[-1]
        rows = zip(best.tolist(), beams.tolist(), tokens.tolist(), strict=True)
        ranked.append([Extension(*row) for row in rows if row[0] > -math.inf])
        first += size
    return ranked


def next_log_probs(logits: Tensor, states: Sequence[BeamState], processor: LogitsProcessor) -> Tensor:
    """Log-probabilities (R,V) of the next token of every beam, after the logits processors."""
    places = sum(len(state.beams) for state in states)
    log_probs = processor.add_bias(logits[:places].float().log_softmax(dim=-1))
    rows = [as_sequence(state, beam, processor.stopping_criteria) for state in states for beam in state.beams]
    seen = None
    if processor.sampling_params.repetition_penalty != 1:
        seen = token_presence_mask([row.token_ids for row in rows], log_probs.shape[-1], log_probs.device)
    return processor.sampling_params.apply_penalties(log_probs, seen, processor.history_offsets(rows))


def as_sequence(state: BeamState, beam: Hypothesis, stopping_criteria: StoppingCriteria) -> GeneratedSequence:
    """A beam as the processors read it: its tokens, and where its prompt ends."""
    row = GeneratedSequence(0, state.prompt, replace(stopping_criteria, tokenizer=None, stop=()), 0)
    row.token_ids += beam.tokens
    return row


def build_hypothesis(
    one: Hypothesis, state: BeamState, stopping_criteria: StoppingCriteria, context: int
) -> Completion:
    """A finished hypothesis as a completion, with its text."""
    row = GeneratedSequence(0, state.prompt, stopping_criteria, context)
    generated = [row.append_token(token, logprob) for token, logprob in zip(one.tokens, one.logprobs, strict=True)]
    text = "".join(each.text for each in generated) if stopping_criteria.tokenizer is not None else None
    ended = generated[-1].finish_reason
    assert ended is not None, "a hypothesis is finished at its last token"
    return Completion(list(one.tokens), list(one.logprobs), ended, text)
