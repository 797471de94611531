"""What a speculative draft proposes along a finished text, and what of it is accepted.

      known   a b c      the draft proposes   d e x y      the text goes on   d e f
                         d and e are accepted, x is rejected, y is not judged; f is the model's own token

A proposal is accepted where the text has the same token, so the accepted text is the answer at any temperature, and
greedily these are the cycles of `quest generate --draft`. Sampled, that command accepts with probability min(1, p/q)
and writes another text of the same distribution; the probability stands beside each proposal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_quest.generation.sampling import row_uniforms, token_presence_mask
from llm_quest.generation.speculative.decoder import DraftSource, make_drafter
from llm_quest.generation.speculative.drafters import DraftRequest, DraftTokens
from llm_quest.generation.speculative.ngram_drafter import NgramDrafter
from llm_quest.serve.inside import TextInside


@dataclass(frozen=True)
class Proposal:
    """A drafted token. q: its probability under the draft, 1 for n-grams; p: under the model, in the distribution that
    is drawn from (temperature 0: both before the largest is taken); chance: that speculative decoding accepts it. p and
    chance: None behind a rejected proposal, which is not judged."""

    token: int
    q: float
    p: float | None
    chance: float | None
    is_accepted: bool


@dataclass(frozen=True)
class DraftCycle:
    """What was proposed at once. place: the number of the answer's token that the first proposal is for. num_taken: how
    many tokens of the answer one pass of the model gives: the accepted ones, and one of its own."""

    place: int
    proposals: tuple[Proposal, ...]
    num_taken: int


class DraftReplay:
    """A draft beside a finished text. length: how many tokens it proposes at once, where it can."""

    @torch.inference_mode()
    def __init__(self, inside: TextInside, draft: DraftSource, length: int):
        self.inside, self.text, self.length = inside, inside.text, length
        self.params, self.ids = self.text.sampling_params, list(self.text.token_ids)
        self.place, prompt = self.text.prompt_length, self.ids[: self.text.prompt_length]
        self.grammar = self.text.make_grammar() if self.text.make_grammar else None
        self.drafter = make_drafter(draft, inside.model, self.params)
        count = len(self.ids) - self.place
        numbers = row_uniforms([prompt], self.text.copy + 1, count, (self.text.seed, "guess"))
        self.uniforms = numbers[self.text.copy :].to(inside.device)
        self.hidden = inside.model.hidden_states(inside.ids, inside.scope())
        self.drafter.prefill([prompt], 1, len(self.ids) + length)
        self.drafter.update(self.hidden[:, : self.place - 1], [prompt], [self.place - 1])

    @property
    def is_finished(self) -> bool:
        return self.place == len(self.ids)

    @torch.inference_mode()
    def run_cycle(self) -> DraftCycle:
        """Let the draft propose at the next place, and go on behind what the text takes of it."""
        place, following = self.place, self.ids[self.place :]
        drafts = self.propose(self.ids[:place])
        tokens = drafts.tokens[0]
        accepted = next((n for n, token in enumerate(tokens) if token != following[n]), len(tokens))
        taken = accepted + 1
        judged = [self.judge(place + n, drafts, n) for n in range(taken)] + [(None, None)] * len(tokens)
        proposals = tuple(
            Proposal(token, self.draft_probability(drafts, n), *judged[n], n < accepted)
            for n, token in enumerate(tokens)
        )
        self.place += taken
        columns = self.hidden[:, place - 1 : self.place - 1]
        self.drafter.update(columns, [self.ids[: self.place]], [taken])
        return DraftCycle(place - self.text.prompt_length, proposals, taken)

    def propose(self, known: Sequence[int]) -> DraftTokens:
        """The draft's next tokens; the last one of the text is left to the model."""
        vocab_size, at = int(self.inside.model.config.vocab_size), self.place - self.text.prompt_length
        penalized = self.params.repetition_penalty != 1
        seen = token_presence_mask([known], vocab_size, self.inside.device) if penalized else None
        wanted = min(self.length, len(self.ids) - self.place - 1)
        request = DraftRequest([known], [wanted], self.uniforms[:, at : at + wanted], seen)
        return self.drafter.propose(request, lambda confidence: True)

    def judge(self, place: int, drafts: DraftTokens, number: int) -> tuple[float | None, float | None]:
        """The model's probability of proposal `number`, which is for `place`, and the chance that it is accepted; None
        where nothing was proposed. The schema goes on to the text's token."""
        logits = self.inside.model.head(self.hidden[:, place - 1 : place])[0].float()
        logits, _ = self.inside.penalize(place, logits, self.grammar)
        if self.grammar is not None:
            self.grammar.consume(self.ids[place])
        if number >= len(drafts.tokens[0]):
            return None, None
        token = drafts.tokens[0][number]
        if self.params.is_greedy:
            return float(logits.softmax(dim=-1)[0, token]), float(logits[0].argmax() == token)
        p = float(self.params.log_probs(logits)[0, token].exp())
        return p, min(p / self.draft_probability(drafts, number), 1.0)

    def draft_probability(self, drafts: DraftTokens, number: int) -> float:
        """q of a proposal: what it was drawn with."""
        return 1.0 if isinstance(self.drafter, NgramDrafter) else drafts.confidence[0][number]
