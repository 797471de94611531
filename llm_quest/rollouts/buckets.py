"""How often is the next token foretold, read straight off and after thinking, by how hard a proxy finds the place (RPT,
arXiv:2506.08007, table 1). The paper's sets are nested (easy: above 0.5 nat); here the buckets are disjoint as well.

After thinking, right is what the reward calls right: one true token or several, to the byte. So an answer of two tokens
is wrong where its second one is: the harder measure of the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_quest.data.problems.problem import chance
from llm_quest.data.whole import whole_rows
from llm_quest.generation.generate import complete
from llm_quest.generation.sampling import Sampling
from llm_quest.generation.until import Until
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.foretelling import Asking
from llm_quest.rollouts.measures import Interval, wilson
from llm_quest.rollouts.positions import THRESHOLDS, Position, bucket
from llm_quest.rollouts.prefix_match import PrefixMatch, prefix_match
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.writer import Writer, evaluating

NAMES = ("trivial", "easy", "medium", "hard")
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Foretold:
    """One place: was the likeliest next token right, and was the answer after thinking?

    said: the answer, None where there was none to be read; tokens: the completion's; several: it foretold more than one
    true token, or tried to."""

    position: Position
    plain: bool
    thought: bool
    said: str | None
    text: str
    tokens: int
    several: bool


@dataclass(frozen=True)
class Bucket:
    """A part of the places. Intervals are Wilson's, 95 %."""

    name: str
    count: int
    plain: Interval
    thought: Interval
    unread: float
    several: float
    tokens: float

    def line(self) -> str:
        return (
            f"{self.name:<8}{self.count:>6,}   plain {self.plain}   thought {self.thought}   "
            f"no answer {self.unread:.1%}, {self.tokens:.1f} tokens"
        )


@dataclass(frozen=True)
class Table:
    """buckets: disjoint; nested: the paper's sets, each holding the harder ones."""

    buckets: tuple[Bucket, ...]
    nested: tuple[Bucket, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        return [one.line() for one in self.buckets]

    def numbers(self) -> dict[str, float]:
        """For a row of metrics."""
        told: dict[str, float] = {}
        for one in self.buckets:
            told |= {f"plain_{one.name}": one.plain.share, f"thought_{one.name}": one.thought.share}
        return told


@dataclass(frozen=True)
class Foretelling:
    """documents, positions: the held-out places. asking: how they become questions. writer: tokenizer, ends, budget and
    precision; the answers are greedy."""

    documents: Sequence[Sequence[int]]
    positions: Sequence[Position]
    asking: Asking
    writer: Writer
    reward: PrefixMatch

    def table(self, model: Decoder) -> Table:
        return tabled(self.of(model))

    def of(self, model: Decoder) -> list[Foretold]:
        with evaluating(model), torch.no_grad():
            plain = self.read(model)
            samples = self.thought(model)
        return [self.judged(*one) for one in zip(self.positions, plain, samples, strict=True)]

    def judged(self, position: Position, plain: bool, sample: Sample) -> Foretold:
        said, truth = self.reward.said(sample), sample.problem.truth
        right = said is not None and prefix_match(said.encode(), truth) == 1
        several = said is not None and len(said.encode()) > len(truth[0])
        return Foretold(position, plain, right, said, sample.text, len(sample.tokens), several)

    def read(self, model: Decoder) -> list[bool]:
        """Is the likeliest next token the true one? One pass for all places of a document."""
        device = next(model.parameters()).device
        places: dict[int, list[int]] = {}
        for one in self.positions:
            places.setdefault(one.document, []).append(one.place)
        right: dict[tuple[int, int], bool] = {}
        numbers = sorted(places, key=lambda number: -len(self.documents[number]))
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            some = numbers[start : start + ROWS_AT_ONCE]
            batch = whole_rows([self.documents[number] for number in some]).to(device)
            with self.writer.within():
                likeliest = model(batch.tokens).argmax(dim=-1)
            hits = (likeliest == batch.targets).cpu()
            for row, number in enumerate(some):
                right |= {(number, place): bool(hits[row, place - 1]) for place in places[number]}
        return [right[one.document, one.place] for one in self.positions]

    def thought(self, model: Decoder) -> list[Sample]:
        """A greedy answer for each place."""
        until = Until(max_new_tokens=self.writer.new_tokens, eos=self.writer.eos)
        samples: list[Sample] = []
        for start in range(0, len(self.positions), ROWS_AT_ONCE):
            some = self.positions[start : start + ROWS_AT_ONCE]
            asked = [self.asking.question(self.documents[one.document], one.place) for one in some]
            with self.writer.within():
                made = complete(model, [each.prompt for each in asked], Sampling(temperature=0.0), until)
            samples += [self.writer.sample(question, one) for question, one in zip(asked, made, strict=True)]
        return samples


def tabled(found: Sequence[Foretold], thresholds: Sequence[float] = THRESHOLDS) -> Table:
    """Disjoint buckets and the paper's nested sets, those that hold anything."""
    placed = [(bucket(one.position.entropy, thresholds), one) for one in found]
    apart = [(name, [one for at, one in placed if at == number]) for number, name in enumerate(NAMES)]
    above = [
        (f"H > {limit:g}", [one for at, one in placed if at >= number]) for number, limit in enumerate(thresholds, 1)
    ]
    return Table(*(tuple(summed(name, some) for name, some in parts if some) for parts in (apart, above)))


def summed(name: str, some: Sequence[Foretold]) -> Bucket:
    count = len(some)
    return Bucket(
        name,
        count,
        wilson(sum(one.plain for one in some), count),
        wilson(sum(one.thought for one in some), count),
        sum(one.said is None for one in some) / count,
        sum(one.several for one in some) / count,
        sum(one.tokens for one in some) / count,
    )


def evenly(found: Sequence[Position], number: int, seed: int) -> list[Position]:
    """At most `number` places of each bucket, drawn evenly, in the order they had."""
    kept: list[int] = []
    for at in range(len(NAMES)):
        some = [place for place, one in enumerate(found) if bucket(one.entropy) == at]
        kept += chance("buckets", seed, at).sample(some, min(number, len(some)))
    return [found[place] for place in sorted(kept)]
