"""`quest inspect-batch RECIPE`: prints the rows of a training batch token by token: which tokens have a loss, their
positions and documents, or, for a classifier, the token at which the head reads the label."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from llm_quest.cli.output import clean_text
from llm_quest.contracts import LogFn
from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.data.text_classification import TextClassificationBatch
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.unpaired import UnpairedBatch
from llm_quest.errors import UsageError
from llm_quest.recipes.planning import open_job
from llm_quest.recipes.recipe import load_recipe
from llm_quest.techniques.score_head import find_score_head

SHOWABLE = TokenBatch | PreferenceBatch | UnpairedBatch | TextClassificationBatch
GREEN, RESET = "\x1b[1;32m", "\x1b[0m"


@dataclass(frozen=True)
class DocumentTokens:
    """One document of one row. learned: whether each id is a target (or, for a classifier, whether the head reads
    there); the last id may be a target only."""

    row: int
    document: int
    positions: tuple[int, ...]
    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class BatchView:
    """The rows of a step. kinds: a note on each row. verb: what happens at marked tokens, learned or read."""

    step: int
    length: int
    rows: int
    padding: int
    pieces: tuple[DocumentTokens, ...]
    tokenizer: Tokenizer
    kinds: tuple[str, ...]
    verb: str = "learned"

    def as_json(self) -> dict[str, Any]:
        documents = [
            {
                "row": piece.row,
                "kind": self.kinds[piece.row],
                "document": piece.document,
                "tokens": [
                    {"id": i, "text": self.decode(piece.ids[:at], [i]), "position": p, self.verb: is_learned}
                    for at, (i, p, is_learned) in enumerate(zip(piece.ids, piece.positions, piece.learned, strict=True))
                ],
            }
            for piece in self.pieces
        ]
        return {
            "step": self.step,
            "rows": self.rows,
            "length": self.length,
            "padding": self.padding,
            "documents": documents,
        }

    def lines(self, color: bool = False) -> list[str]:
        learned = sum(sum(piece.learned) for piece in self.pieces)
        result = [
            f"step {self.step}: {self.rows} rows of {self.length} tokens, {self.padding} of them padding; "
            f"{learned} {self.verb}, {'in green' if color else 'between [[ and ]]'}"
        ]
        for piece in self.pieces:
            where = f"{piece.positions[0]}..{piece.positions[-1]}"
            result.append(
                f"row {piece.row}{self.kinds[piece.row]}, document {piece.document}, positions {where}: "
                + self.highlight(piece, color)
            )
        return result

    def highlight(self, piece: DocumentTokens, color: bool) -> str:
        """The text of a piece with learned tokens marked and line ends as a sign."""
        before, after = (GREEN, RESET) if color else ("[[", "]]")
        highlighted, at = "", 0
        for is_learned, run in groupby(piece.learned):
            end = at + len(list(run))
            text = clean_text(self.decode(piece.ids[:at], piece.ids[at:end])).replace("\n", "\u21b5")
            highlighted, at = highlighted + (f"{before}{text}{after}" if is_learned else text), end
        return highlighted

    def decode(self, before: Sequence[int], ids: Sequence[int]) -> str:
        return self.tokenizer.decode_continuation(before, ids, keep_special_tokens=True)


def load_batch_view(recipe: str, overrides: Sequence[str], *, step: int, rows: int, log: LogFn) -> BatchView:
    """The first rows of a step's batch, as the recipe would train on it."""
    loaded_recipe, config, settings = load_recipe(recipe, overrides)
    with tempfile.TemporaryDirectory() as scratch, open_job(loaded_recipe, config, settings, log, Path(scratch)) as job:
        batch: Any = job.loader.batches(step)[0]
        if job.tokenizer is None and isinstance(batch, SHOWABLE):
            raise UsageError(f"{config.recipe} has no tokenizer to show its tokens with; give its Job one")
        if job.tokenizer is None or not isinstance(batch, SHOWABLE):
            raise UsageError(
                "inspect-batch shows rows of tokens: of pretrain, sft, reward, dpo, kto, gkd, classify, "
                f"not of {config.recipe}"
            )
        labels: Sequence[str] = job.facts.get("labels", ())
    kinds = [""] * len(batch.input_ids)
    verb = "read" if find_score_head(job.model) is not None else "learned"
    if isinstance(batch, TextClassificationBatch):
        kinds = [f", label {labels[number]}" for number in batch.labels.tolist()]
        batch = TokenBatch(batch.input_ids, torch.full_like(batch.input_ids, IGNORE_INDEX), batch.position_ids)
    if isinstance(batch, UnpairedBatch):
        kinds = [" (desirable)" if label else " (undesirable)" for label in batch.desirable.tolist()]
        batch = TokenBatch(batch.input_ids, batch.targets, batch.position_ids)
    if isinstance(batch, PreferenceBatch):
        for better, worse in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True):
            kinds[better] = kinds[better] or " (better)"
            kinds[worse] = " (worse)"
        batch = batch.full_rows
    batch = batch.slice_rows(0, min(rows, len(batch.input_ids)))
    return make_batch_view(batch, job.tokenizer, step, kinds, verb)


def make_batch_view(batch: TokenBatch, tokenizer: Tokenizer, step: int, kinds: Sequence[str], verb: str) -> BatchView:
    tokens = batch.input_ids
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) if batch.position_ids is None else batch.position_ids
    segments = torch.zeros_like(tokens) if batch.segment_ids is None else batch.segment_ids
    rows = tuple(
        piece
        for row in range(len(tokens))
        for piece in split_row_documents(row, tokens[row], batch.targets[row], positions[row], segments[row])
    )
    if verb == "read":
        rows = tuple(replace(p, learned=tuple(at == p.positions[-1] for at in p.positions)) for p in rows)
    padding = int((positions < 0).sum())
    return BatchView(step, tokens.shape[1], len(tokens), padding, rows, tokenizer, tuple(kinds), verb)


def split_row_documents(
    row: int, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
) -> Iterator[DocumentTokens]:
    """Yield the documents of a row, without padding."""
    columns = zip(*(column.tolist() for column in (tokens, targets, positions, segments)), strict=True)
    for document, run in groupby((c for c in columns if c[2] >= 0), key=lambda column: column[3]):
        ids, wanted, places, _ = map(list, zip(*run, strict=True))
        learned = [False, *(target != IGNORE_INDEX for target in wanted)]
        if not learned[-1]:
            learned.pop()
        else:
            ids, places = [*ids, wanted[-1]], [*places, places[-1] + 1]
        yield DocumentTokens(row, document, tuple(places), tuple(ids), tuple(learned))
