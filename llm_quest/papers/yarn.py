"""YaRN (Peng et al. 2023, arXiv:2309.00071) and the other stretches, on a model that was trained at a quarter of the
length: perplexity and retrieval, without any further training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.next_token import NextToken
from llm_quest.papers.lab import VOCAB, fresh, remembered, small_llama, text, trained
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.techniques.length import LengthExtension
from llm_quest.train.optimizers import adamw

SHORT, FACTOR, STEPS, ROWS, RATE = 64, 4, 700, 32, 2e-3
LONG = SHORT * FACTOR
ALPHABET = 64
"""How many different tokens a text that is to be repeated is made of."""


class HalfCopies:
    """A feed: half of the rows are text, half a random text and itself again, of which only the repetition is learned
    (it can be retrieved, and nothing else helps)."""

    def __init__(self, seed: int):
        self.text, self.seed = text().feed(seed, length=SHORT, rows=ROWS // 2), seed

    def at(self, step: int) -> list[TokenBatch]:
        return [*self.text.at(step), copies(ROWS // 2, SHORT, self.seed * 100_003 + step)]

    def bookmark(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def resume(self, bookmark: dict[str, Any]) -> None:
        """It has no state."""


def copies(rows: int, length: int, seed: int) -> TokenBatch:
    """Rows of `length` inputs: a random text of half that length, and again."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    half = torch.randint(VOCAB - ALPHABET, VOCAB, (rows, length // 2), generator=generator)
    ids = torch.cat((half, half, half[:, :1]), dim=1)
    targets = ids[:, 1:].clone()
    targets[:, : length // 2] = IGNORE
    return TokenBatch(ids[:, :-1], targets)


def base(seed: int) -> Decoder:
    """Trained at 64 tokens."""

    def make() -> Decoder:
        model = fresh(small_llama(layers=3, context=SHORT), seed)
        trained(NextToken(model), HalfCopies(seed), adamw(model, lr=RATE), steps=STEPS, seed=seed)
        return model

    return remembered("yarn-base", seed, small_llama(layers=3, context=SHORT), make)


def arm(technique: LengthExtension | None) -> Callable[[int], Measured]:
    def run(seed: int) -> Measured:
        model: Any = base(seed)
        model = (model if technique is None else technique(model)).eval()
        curve = by_position(model)
        far = [loss for place, loss in curve if place >= LONG - SHORT]
        near = [loss for place, loss in curve if place < SHORT]
        numbers = {"loss within 64": sum(near) / len(near), "loss at 192-256": sum(far) / len(far)}
        return Measured(numbers | {"retrieved at 256": retrieved(model, LONG)}, curve)

    return run


@torch.no_grad()
def by_position(model: Decoder, step: int = 8) -> list[tuple[float, float]]:
    """Mean loss of held-out text, by position: documents that are long enough, laid out alone."""
    batch = long_rows()
    losses = -token_log_probs(model, batch).mean(dim=0)
    return [(place, float(losses[place : place + step].mean())) for place in range(0, LONG, step)]


@functools.cache
def long_rows(rows: int = 48) -> TokenBatch:
    ids, offsets = text().folder.val.ids, text().folder.val.offsets
    starts = [begin for begin, end in itertools.pairwise(offsets) if end - begin > LONG]
    found = torch.stack([torch.from_numpy(ids[begin : begin + LONG + 1].astype("int64")) for begin in starts[:rows]])
    return TokenBatch(found[:, :-1], found[:, 1:])


@torch.no_grad()
def retrieved(model: Decoder, length: int) -> float:
    """The share of a repeated random text that is predicted greedily, at half the length's distance."""
    batch = copies(16, length, 5)
    said: Tensor = model(batch.tokens).argmax(dim=-1)
    learned = batch.targets != IGNORE
    return float((said == batch.targets)[learned].float().mean())


ARMS = {
    "plain": arm(None),
    "linear": arm(LengthExtension(FACTOR, "linear")),
    "NTK": arm(LengthExtension(FACTOR, "ntk")),
    "YaRN": arm(LengthExtension(FACTOR, "yarn", original=SHORT)),
}


def judge(results: Results) -> Verdict:
    loss = results.difference("YaRN", "plain", "loss at 192-256")
    kept = results.difference("YaRN", "plain", "retrieved at 256")
    words = f"at four times the trained length YaRN changes the loss by {loss} nats and the retrieved share by {kept}"
    if loss.negative and kept.mean + kept.half > 0:
        return Verdict("confirmed", words)
    return Verdict("refuted" if loss.positive or kept.negative else "no effect seen", words)


PAPER = Paper(
    name="yarn",
    title="YaRN: Efficient Context Window Extension of Large Language Models",
    arxiv="2309.00071",
    claim="Stretching slow rotations and leaving fast ones keeps perplexity and retrieval far beyond the trained "
    "length, where plain RoPE fails.",
    experiment=f"A 0.7M-parameter Llama trained at {SHORT} tokens ({STEPS} steps, half text, half random texts to be "
    f"repeated) is read at {LONG} without further training. Control: no stretch; beside it linear and NTK-aware.",
    confirms="the loss at positions 192 to 256 falls (95 % interval of the paired difference below zero) and no less "
    "is retrieved.",
    refutes="the loss rises, or less is retrieved.",
    arms=ARMS,
    judge=judge,
    picture=Picture("position", "held-out loss"),
    minutes=12,
)
