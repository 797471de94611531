"""From logits to a token: what is drawn from, how it is drawn, and how probable the draw was.

The order is fixed, so that combinations mean one thing. Each step works on the renormalized distribution the one
before it left, and can only narrow it:

    logits -> logits processors -> temperature -> top-k -> top-p -> min-p -> softmax -> draw

`logits_processor.py` has the processors, which read what a row has generated.

Commonly got wrong: a nucleus measured on mass that top-k has already cut, but not renormalized, is too wide; min-p
that keeps "at least k" widens; and a policy-gradient ratio must be taken under *this* distribution, not under the
full softmax."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.errors import UsageError

NEG_INF = float("-inf")
MIN_TEMPERATURE = 1e-8


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. None: that filter is off.

    temperature: logits are divided by it; 0 takes the most probable token. top_k: the k most probable (exactly k,
    also among equals). top_p: the fewest most probable that together reach p; the one that crosses p stays (Holtzman
    et al. 2020, arXiv:1904.09751). min_p: those at least p times as probable as the most probable (Nguyen et al.
    2024, arXiv:2407.01082). repetition_penalty: a positive logit of a token already in the prompt or the text is
    divided by it, a negative one multiplied: Hugging Face's form. CTRL's (Keskar et al. 2019, arXiv:1909.05858)
    divides whatever the sign, and of generated tokens alone. presence_penalty, frequency_penalty: subtracted from the
    logit of a generated token, once and times its count (OpenAI's form). no_repeat_ngram_size: no sequence of so many
    tokens occurs twice, the prompt included. logit_bias: (token id, what is added to its logit) each."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature is {self.temperature}: give 0 (the most probable token) or a number of at least "
                f"{MIN_TEMPERATURE}"
            )
        if self.top_k is not None and (self.top_k < 1 or self.top_k != int(self.top_k)):
            raise UsageError(f"top_k is {self.top_k}: give a whole number of at least 1, or None to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(
                f"top_p is {self.top_p}: give a probability above 0 and at most 1, or None to keep every token"
            )
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}: give a number from 0 to 1, or None to keep every token")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty}: give a positive number; 1 is no penalty"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} is {getattr(self, name)}: give a finite number; 0 is no penalty")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            raise UsageError(
                f"no_repeat_ngram_size is {self.no_repeat_ngram_size}: give at least 1, or None to allow repetition"
            )
        if any(math.isnan(bias) or bias == math.inf for _, bias in self.logit_bias):
            raise UsageError("a logit_bias is a finite number, or -inf for a token that must not be drawn")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def log_probs(
        self,
        logits: Float[Tensor, "*batch V"],
        seen: Bool[Tensor, "*batch V"] | None = None,
        offsets: Float[Tensor, "*batch V"] | None = None,
    ) -> Float[Tensor, "*batch V"]:
        """Log-probabilities, in float32, of the distribution that `sample` draws from; -inf for what it never draws.
        Differentiable. seen: which tokens the repetition penalty applies to. offsets: what the logits processors add.
        At temperature 0 all mass is on one token."""
        logits = self.apply_penalties(logits.float(), seen, offsets)
        if self.is_greedy:
            return torch.full_like(logits, NEG_INF).scatter(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
        kept, tokens = self.process_logits(logits)
        if tokens is not None:
            kept = torch.full_like(logits, NEG_INF).scatter(-1, tokens, kept)
        return kept.log_softmax(dim=-1)

    def sample(
        self,
        logits: Float[Tensor, "B V"],
        uniforms: Float[Tensor, " B"],
        seen: Bool[Tensor, "B V"] | None = None,
        offsets: Float[Tensor, "B V"] | None = None,
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
        """One token per row and its log-probability. uniforms: one number in [0, 1) per row decides it, so that no
        row's draw depends on its neighbors.

        At temperature 0 the log-probability is that of the (penalized) softmax: the point mass would say 0 for every
        token."""
        logits = self.apply_penalties(logits.float(), seen, offsets)
        if self.is_greedy:
            return most_probable(logits)
        kept, names = self.process_logits(logits)
        weights = kept.exp()
        choice = inverse_cdf(weights, uniforms)
        logprobs = kept.gather(-1, choice)[:, 0] - weights.sum(dim=-1).log()
        return (choice if names is None else names.gather(-1, choice))[:, 0], logprobs

    def apply_penalties(self, logits: Tensor, seen: Tensor | None, offsets: Tensor | None = None) -> Tensor:
        """The repetition penalty, then what the logits processors add."""
        if self.repetition_penalty != 1 and seen is not None:
            factor = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
        return logits if offsets is None else logits + offsets

    def process_logits(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tempered logits after the filters, 0 for the most probable and -inf for what they drop: the whole row with
        None, or the most probable first with the tokens they belong to."""
        logits = logits - logits.amax(dim=-1, keepdim=True).detach()  # so that a tiny temperature cannot overflow
        logits, tokens = self.apply_top_k(logits if self.temperature == 1 else logits / self.temperature)
        if self.top_p is not None and self.top_p < 1:
            p = logits.detach().softmax(dim=-1)
            logits = logits.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, NEG_INF)
        if self.min_p:
            p = logits.detach().softmax(dim=-1)
            logits = logits.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), NEG_INF)
        return logits, tokens

    def apply_top_k(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The top k, or all of them in order if a nucleus is to be measured, or the row as it is."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            return logits.topk(self.top_k, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            return logits.sort(dim=-1, descending=True, stable=True)
        return logits, None


def most_probable(logits: Float[Tensor, "B V"]) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The most probable token of each row and its log-probability."""
    top, tokens = logits.max(dim=-1)
    return tokens, top - logits.logsumexp(dim=-1)


def inverse_cdf(weights: Float[Tensor, "B K"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, "B 1"]:
    """The first index whose running sum exceeds u times the total. A weight of zero adds nothing, so it is never
    chosen; the bound below the total keeps u near 1 from rounding past the end."""
    running = weights.cumsum(dim=-1)
    total = running[:, -1:]
    bound = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(running, bound, right=True).clamp(max=weights.shape[-1] - 1)  # beyond: the total is NaN


def row_uniforms(
    prompts: Sequence[Sequence[int]],
    copies: int,
    length: int,
    seed: int | tuple[int, str],
    copy_offsets: Sequence[int] | None = None,
) -> Float[Tensor, "R length"]:
    """The random numbers of `copies` rows per prompt, on the host. A row's stream is named by the seed (perhaps with
    what the numbers are for), its prompt and which copy of that prompt it is, so its text is the same alone, in any
    batch and in any order. copy_offsets: how many equal prompts came before each; None: they are counted here."""
    streams, prompt_counts = [], Counter[tuple[int, ...]]()
    for place, prompt in enumerate(prompts):
        before = prompt_counts[tuple(prompt)] if copy_offsets is None else copy_offsets[place]
        prompt_counts[tuple(prompt)] += 1
        for copy in range(before * copies, (before + 1) * copies):
            name = repr((seed, tuple(prompt), copy))
            stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
            streams.append(torch.rand(length, generator=torch.Generator().manual_seed(stream)))
    return torch.stack(streams) if streams else torch.zeros(0, length)


def token_presence_mask(rows: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Bool[Tensor, "B V"]:
    """Which tokens occur in each row."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for row, tokens in zip(seen, rows, strict=True):
        row[list(tokens)] = True
    return seen.to(device)
