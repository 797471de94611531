"""`quest inspect-batch RECIPE`: what a step's batch holds, token by token: what is read and what is learned, at which
position, in which document; or, of texts with labels, at which token the head reads the label. Look before you
train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from llm_quest.cli.screen import clean
from llm_quest.cli.training import understood
from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.labelled import LabelBatch
from llm_quest.data.pairs import AnswerBatch
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.recipes import classify, dpo, pretrain, reward, sft
from llm_quest.recipes.course import company
from llm_quest.recipes.parts import Course
from llm_quest.recipes.pretrain_config import Pretrain
from llm_quest.recipes.tuning_config import Classify, Dpo, Reward, Sft
from llm_quest.train.parallel import Parallel

LEARNED, PLAIN = "\x1b[1;32m", "\x1b[0m"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """One document of one row. learned: of each id, whether the model is to write it (or, of a text with a label,
    whether its head is read there); the last id may be a target alone."""

    row: int
    document: int
    positions: tuple[int, ...]
    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class Shown:
    """A step's rows. kinds: what each row is called. verb: what is done at marked tokens."""

    step: int
    length: int
    rows: int
    padding: int
    pieces: tuple[Piece, ...]
    tokenizer: Tokenizer
    kinds: tuple[str, ...]
    verb: str = "learned"

    def as_json(self) -> dict[str, Any]:
        told = [
            {
                "row": piece.row,
                "kind": self.kinds[piece.row],
                "document": piece.document,
                "tokens": [
                    {"id": i, "text": self.text([i]), "position": p, self.verb: mine}
                    for i, p, mine in zip(piece.ids, piece.positions, piece.learned, strict=True)
                ],
            }
            for piece in self.pieces
        ]
        return {"step": self.step, "rows": self.rows, "length": self.length, "padding": self.padding, "documents": told}

    def lines(self, colour: bool = False) -> list[str]:
        learned = sum(sum(piece.learned) for piece in self.pieces)
        told = [
            f"step {self.step}: {self.rows} rows of {self.length} tokens, {self.padding} of them padding; "
            f"{learned} {self.verb}, {'in green' if colour else 'between [[ and ]]'}"
        ]
        for piece in self.pieces:
            where = f"{piece.positions[0]}..{piece.positions[-1]}"
            told.append(
                f"row {piece.row}{self.kinds[piece.row]}, document {piece.document}, positions {where}: "
                + self.marked(piece, colour)
            )
        return told

    def marked(self, piece: Piece, colour: bool) -> str:
        """The text, with what is learned made visible; line ends as a sign."""
        before, after = (LEARNED, PLAIN) if colour else ("[[", "]]")
        told = ""
        for mine, run in groupby(zip(piece.ids, piece.learned, strict=True), key=lambda pair: pair[1]):
            text = clean(self.text([i for i, _ in run])).replace("\n", "\u21b5")
            told += f"{before}{text}{after}" if mine else text
        return told

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, special=True)


def look(recipe: str, pairs: Sequence[str], *, step: int, rows: int, say: Say) -> Shown:
    """The first rows of a step's batch, as the recipe would train on it."""
    config: Course = understood(recipe, pairs)[1]
    with company(config, 0) as parallel:
        batch, tokenizer, labels = first_batch(config, parallel, step, say)
    kinds = [""] * len(batch.tokens)
    if isinstance(batch, LabelBatch):
        kinds = [f", label {labels[number]}" for number in batch.labels.tolist()]
        batch = TokenBatch(batch.tokens, torch.full_like(batch.tokens, IGNORE), batch.positions)
    if isinstance(batch, AnswerBatch):
        for better, worse in zip(batch.better.tolist(), batch.worse.tolist(), strict=True):
            kinds[better] = kinds[better] or " (better)"
            kinds[worse] = " (worse)"
        batch = batch.rows
    batch = batch.rows(0, min(rows, len(batch.tokens)))
    return shown(batch, tokenizer, step, kinds, "read" if isinstance(config, Reward | Classify) else "learned")


def first_batch(
    config: Course, parallel: Parallel, step: int, say: Say
) -> tuple[TokenBatch | AnswerBatch | LabelBatch, Tokenizer, Sequence[str]]:
    """From the recipe's own feed. The last are the names of the labels, where there are some."""
    labels: Sequence[str] = ()
    if isinstance(config, Pretrain):
        text = pretrain.ready(config.data, config.tokenizer, parallel, say)
        feed: Any = pretrain.feed_of(config, text, parallel)
        return feed.at(step)[0], text.tokenizer, labels
    if isinstance(config, Sft):
        job = sft.assembled(config, parallel, say)
    elif isinstance(config, Reward):
        job = reward.assembled(config, parallel, say)
    elif isinstance(config, Dpo):
        job = dpo.assembled(config, Path(), parallel, say)
    elif isinstance(config, Classify):
        job = classify.assembled(config, parallel, say)
        labels = job.facts["labels"]
    else:
        raise UsageError(
            f"inspect-batch shows rows of tokens: of pretrain, sft, reward, dpo, classify, not of {config.recipe}"
        )
    return job.feed.at(step)[0], job.tokenizer, labels  # type: ignore[return-value]


def shown(batch: TokenBatch, tokenizer: Tokenizer, step: int, kinds: Sequence[str], verb: str) -> Shown:
    tokens = batch.tokens
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) if batch.positions is None else batch.positions
    segments = torch.zeros_like(tokens) if batch.segments is None else batch.segments
    found = tuple(
        piece
        for row in range(len(tokens))
        for piece in pieces(row, tokens[row], batch.targets[row], positions[row], segments[row])
    )
    if verb == "read":
        found = tuple(replace(p, learned=tuple(at == p.positions[-1] for at in p.positions)) for p in found)
    padding = int((positions < 0).sum())
    return Shown(step, tokens.shape[1], len(tokens), padding, found, tokenizer, tuple(kinds), verb)


def pieces(
    row: int, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
) -> Iterator[Piece]:
    """The documents of a row, without padding."""
    columns = zip(*(column.tolist() for column in (tokens, targets, positions, segments)), strict=True)
    for document, run in groupby((c for c in columns if c[2] >= 0), key=lambda column: column[3]):
        ids, wanted, places, _ = map(list, zip(*run, strict=True))
        learned = [False, *(target != IGNORE for target in wanted)]
        if not learned[-1]:
            learned.pop()
        else:
            ids, places = [*ids, wanted[-1]], [*places, places[-1] + 1]
        yield Piece(row, document, tuple(places), tuple(ids), tuple(learned))
