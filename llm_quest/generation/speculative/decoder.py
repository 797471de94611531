"""Speculative decoding (Leviathan, Kalman & Matias 2022, arXiv:2211.17192): a drafter guesses, the model checks all
guesses in one pass, and the text has exactly the distribution the model alone would give it.

      x ~ q     accept with probability min(1, p(x) / q(x))     else draw from max(p - q, 0), normalized

Greedy: a guess is accepted while it is the most probable token, so the text is the plain one token for token.

      known    a b c                      the target reads    c  d' e' f'
      guessed        d' e' f' g'          and judges          d' e' f' g'

Differs: the paper draws one more token from p when all guesses are accepted. Here a steady drafter guesses that token
too, and it is judged like the others. The law is the same, and the token at a place depends on the text before it and
on the seed alone, not on where a cycle began or how far it looked: so a row writes the same text whoever its neighbors
are, and however the lookahead adapts.

Commonly got wrong: p and q must be filtered alike; an eos may stand anywhere among the accepted; where rounding leaves
max(p - q, 0) empty, p itself is drawn from; a token's log-probability is p's, never q's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.compiled import choose_width
from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import SamplingParams, token_presence_mask
from llm_quest.generation.speculative.draft_length import DraftLengthController, SpeculationStats, min_useful_acceptance
from llm_quest.generation.speculative.draft_model import DraftModelDrafter
from llm_quest.generation.speculative.drafters import Drafter, DraftRequest, DraftTokens
from llm_quest.generation.speculative.mtp_drafter import MTPDrafter
from llm_quest.generation.speculative.ngram_drafter import NgramDrafter
from llm_quest.generation.speculative.rejection_sampler import Acceptance, RejectionSampler
from llm_quest.generation.speculative.target_model import TargetModel
from llm_quest.generation.stopping import GeneratedSequence, GeneratedToken
from llm_quest.models.decoder import Decoder

DraftSource = Decoder | str
"""A smaller model, or "mtp" or "ngram"."""
TRIAL_LENGTHS = (4, 8)
"""A sampled row judges its drafter twice, by its first so many tokens: the clock and the neighbors, which could change
its text, are not asked."""


def make_drafter(
    draft: DraftSource, model: Decoder, sampling_params: SamplingParams, *, compile: bool = False
) -> Drafter:
    """The drafter that `draft=` names."""
    if isinstance(draft, Decoder):
        return DraftModelDrafter(draft, model, sampling_params, compile=compile)
    if draft == "mtp":
        return MTPDrafter(model, sampling_params, compile=compile)
    if draft == "ngram":
        return NgramDrafter()
    raise UsageError(f"draft is {draft!r}: give a smaller model, 'mtp' (the model's own modules) or 'ngram'")


class SpeculativeDecoder:
    """A batch of sequences being generated with a drafter. `stats` counts what happened.

    seats: which sequence is in which place of the batch. Eagerly, rows that end leave the batch; compiled, shapes are
    constant: the place stays, empty (None), and what is read there is padding."""

    def __init__(
        self,
        model: Decoder,
        drafter: Drafter,
        sampling_params: SamplingParams,
        logits_processor: LogitsProcessor,
        uniforms: tuple[Float[Tensor, "R S"], Float[Tensor, "R S"], Float[Tensor, "R S"]],
        stats: SpeculationStats,
        *,
        compile: bool = False,
    ):
        self.model, self.drafter, self.sampling_params, self.stats = model, drafter, sampling_params, stats
        self.logits_processor = logits_processor
        self.target_model = TargetModel(model, compile=compile)
        self.compile = compile
        self.guess_uniforms, accept, draw = uniforms
        self.rejection_sampler = RejectionSampler(sampling_params, accept, draw)
        padded = (lambda columns: choose_width(columns) or columns) if compile else None
        self.draft_length = DraftLengthController(
            drafter.max_draft_tokens,
            use_clock=sampling_params.is_greedy,
            tokens_per_step=drafter.tokens_per_step,
            padded_width=padded,
        )
        self.length_is_free = (
            drafter.context_only or sampling_params.is_greedy
        )  # may lookaheads differ without changing the text?
        self.extra_columns = (
            0 if drafter.context_only and not sampling_params.is_greedy else 1
        )  # columns read beyond the guesses
        self.min_acceptance = min_useful_acceptance(drafter.relative_cost)
        self.trials: dict[int, list[int]] = {}
        self.abandoned_rows: set[int] = set()

    def prefill_rows(self, seats: Sequence[GeneratedSequence | None], n: int) -> None:
        """Prefill the current windows, with capacity for all that may follow."""
        self.seats = list(seats)
        windows = [row.window if row else [0] for row in seats[::n]]
        capacity = max(min(row.max_context, len(row.window) + row.tokens_left) for row in self.active_rows)
        hidden = self.target_model.prefill(windows, n, capacity, self.drafter.max_draft_tokens + 1)
        self.drafter.prefill(windows, n, capacity)
        self.target_model.rewind_to(self.row_windows())
        self.drafter.update(hidden, self.row_windows(), [len(row.window) - 1 if row else 0 for row in seats])

    @property
    def active_rows(self) -> list[GeneratedSequence]:
        """The sequences that are still generated."""
        return [row for row in self.seats if row]

    def penalty_mask(self) -> Tensor | None:
        """The tokens that the repetition penalty applies to."""
        if self.sampling_params.repetition_penalty == 1:
            return None
        histories = [row.token_ids if row else [] for row in self.seats]
        return token_presence_mask(histories, self.model.config.vocab_size, self.target_model.device)

    def row_windows(self) -> list[list[int]]:
        """The window of every place; empty for an empty place."""
        return [row.window if row else [] for row in self.seats]

    def run_cycle(self) -> list[tuple[GeneratedSequence, list[int], list[float]]]:
        """Draft, score and verify once: the tokens that now follow in each row."""
        started = time.perf_counter()
        self.seen_tokens_mask = self.penalty_mask()
        texts, remaining = self.row_windows(), [self.remaining_tokens(row) if row else 0 for row in self.seats]
        drafts = self.propose_drafts(texts, remaining)
        drafted = time.perf_counter()
        width = max(1, drafts.max_length + self.extra_columns)
        guesses = [part[: max(min(width, space) - 1, 0)] for part, space in zip(drafts.tokens, remaining, strict=True)]
        hidden, logits = self.target_model.score_drafts(texts, guesses)
        logits, offsets = self.process_logits(logits[:, :width], guesses)
        numbers, num_generated = self.row_numbers(), [row.num_generated if row else 0 for row in self.seats]
        acceptance = self.rejection_sampler(logits, drafts, numbers, num_generated, self.seen_tokens_mask, offsets)
        self.hidden = hidden
        steps, written = drafts.max_length, sum(map(len, acceptance.tokens))
        self.draft_length.record_cycle(width, steps, written, time.perf_counter() - drafted, drafted - started)
        self.update_stats(drafts, acceptance)
        taken = [
            (row, tokens[:space], logprobs[:space])
            for row, tokens, logprobs, space in zip(
                self.seats, acceptance.tokens, acceptance.log_probs, remaining, strict=True
            )
            if row
        ]
        if any(math.isnan(each) for _, _, logprobs in taken for each in logprobs):
            raise ValueError("the model's logits are not finite, so no token can be drawn: look for NaN in its weights")
        return taken

    def process_logits(self, logits: Tensor, guesses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """The target's logits with their bias, and what the history adds at each column."""
        offsets = self.logits_processor.draft_offsets(self.seats, guesses, logits.shape[1])
        return self.logits_processor.add_bias(logits), offsets

    def row_numbers(self) -> list[int]:
        """Whose random numbers each place uses; those of an empty place are not read."""
        return [row.number if row else 0 for row in self.seats]

    def remaining_tokens(self, row: GeneratedSequence) -> int:
        """How many tokens this row can take before it ends, its window slides, or its drafter is judged."""
        places = row.max_context - len(row.window) + (row.stopping_criteria.on_full_context == "slide")
        trials = (
            []
            if self.draft_length.use_clock
            else [evidence - row.num_generated for evidence in TRIAL_LENGTHS if evidence > row.num_generated]
        )
        return min(row.tokens_left, places, *trials)

    def propose_drafts(self, texts: Sequence[Sequence[int]], remaining: Sequence[int]) -> DraftTokens:
        """Drafts for the rows whose drafter is worth its cost."""
        cycle_length = self.draft_length.begin_cycle(len(self.active_rows))
        most = cycle_length if self.length_is_free else self.drafter.max_draft_tokens
        wanted = [
            0 if row is None or self.is_abandoned(row) else max(min(most, space - self.extra_columns), 0)
            for row, space in zip(self.seats, remaining, strict=True)
        ]
        if not any(wanted):
            return DraftTokens([[] for _ in texts], None, [[] for _ in texts])
        num_generated = [row.num_generated if row else 0 for row in self.seats]
        places = torch.tensor(num_generated)[:, None] + torch.arange(self.drafter.max_draft_tokens)
        places = places.clamp(max=self.guess_uniforms.shape[1] - 1)
        uniforms = self.guess_uniforms[self.row_numbers()]
        request = DraftRequest(texts, wanted, uniforms.gather(1, places.to(uniforms.device)), self.seen_tokens_mask)
        return self.drafter.propose(request, self.should_continue)

    def should_continue(self, confidence: Sequence[Sequence[float]]) -> bool:
        """Whether drafting on pays, given how sure the drafter was so far."""
        if not self.length_is_free:
            return True
        chances = [
            math.prod(self.draft_length.acceptance_probability(each) for each in row) for row in confidence if row
        ]
        return self.draft_length.should_continue(chances, max(map(len, confidence)) + self.extra_columns)

    def is_abandoned(self, row: GeneratedSequence) -> bool:
        """Whether this row's own beginning has shown that drafts do not pay. Where the clock may decide, it does
        instead."""
        if not self.draft_length.use_clock and row.num_generated in TRIAL_LENGTHS:
            tested, accepted = self.trials.get(row.number, (0, 0))
            if (accepted + 1) / (tested + 2) < self.min_acceptance:
                self.abandoned_rows.add(row.number)
        return row.number in self.abandoned_rows

    def update_stats(self, drafts: DraftTokens, acceptance: Acceptance) -> None:
        """Count this cycle, and let the draft length learn from it."""
        self.stats.num_passes += 1
        self.stats.num_plain_passes += drafts.max_length == 0
        for row, sure, tokens, accepted in zip(
            self.seats, drafts.confidence, acceptance.tokens, acceptance.num_accepted, strict=True
        ):
            if row is None:
                continue
            tested = sure[: len(tokens)]
            for place, each in enumerate(tested):
                self.draft_length.observe(each, place < accepted)
            if row.num_generated < TRIAL_LENGTHS[-1]:
                seen = self.trials.setdefault(row.number, [0, 0])
                seen[0] += len(tested)
                seen[1] += min(accepted, len(tested))
            self.stats.num_generated_tokens += len(tokens)
            self.stats.num_tested_tokens += len(tested)
            self.stats.num_accepted_tokens += min(accepted, len(tested))

    def keep_rows(self, active: dict[int, GeneratedSequence], previous_lengths: dict[int, int]) -> None:
        """Continue with these rows only, each from its new end; previous_lengths: how long each row's text was."""
        stay = [seat for seat, row in enumerate(self.seats) if row and row.number in active]
        if self.compile:
            self.seats = [row if row and row.number in active else None for row in self.seats]
        elif len(stay) < len(self.seats):
            index = torch.tensor(stay, device=self.target_model.device)
            self.seats = [self.seats[seat] for seat in stay]
            self.target_model.keep_rows(index)
            self.drafter.keep_rows(index)
            self.hidden = self.hidden[index]
        texts = self.row_windows()
        self.target_model.rewind_to(texts)
        self.drafter.update(
            self.hidden, texts, [len(r.token_ids) - previous_lengths[r.number] if r else 0 for r in self.seats]
        )


def speculative_decode(
    decoder: SpeculativeDecoder, rows: Sequence[GeneratedSequence], n: int
) -> Iterator[GeneratedToken]:
    """The speculative decoding loop. n consecutive rows share a prompt."""
    live = {row.number: row for row in rows}
    for row in rows:
        row.slide_window()
    decoder.prefill_rows(rows, n)
    while live:
        before = {number: len(row.token_ids) for number, row in live.items()}
        for row, tokens, logprobs in decoder.run_cycle():
            for token, logprob in zip(tokens, logprobs, strict=True):
                generated = row.append_token(token, logprob)
                if generated.finish_reason:
                    del live[row.number]
                yield generated
                if generated.finish_reason:
                    break
        if not live:
            return
        slid = [row.slide_window() for row in live.values()]
        if any(slid):
            seats = [row if row and row.number in live else None for row in decoder.seats]
            decoder.prefill_rows(seats if decoder.compile else list(live.values()), 1)
        else:
            decoder.keep_rows(live, before)
