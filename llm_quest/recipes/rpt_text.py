"""What RPT reads: documents as ids, those to learn from and those that are held out; the places in them that a proxy
finds hard, worked out once and kept in the run folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.data.problems import Problem, spelled
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole import fingerprint
from llm_quest.data.worked import as_document, worked
from llm_quest.disk import replace_json
from llm_quest.errors import DataError
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.parts import TokenizerPart
from llm_quest.recipes.rpt_config import Passages, Rpt, Selection
from llm_quest.recipes.text import Say, ready
from llm_quest.rollouts.buckets import evenly
from llm_quest.rollouts.foretelling import Asking, asking_of, cut, room_for
from llm_quest.rollouts.positions import Position, positions, thinned
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed

Documents = list[list[int]]
HELD_OUT = 2000
EVERYTHING = -1.0
FILE = "positions.json"


@dataclass(frozen=True)
class Passage:
    """Documents with their start tokens, no longer than leaves room to think, and how their places are asked for."""

    train: Documents
    held_out: Documents
    asking: Asking

    @property
    def hash(self) -> str:
        return fingerprint([*self.train, *self.held_out])


@dataclass(frozen=True)
class Places:
    """What is asked in training, and what is asked to see how it goes; flops: what finding them cost."""

    train: list[Position]
    held_out: list[Position]
    flops: float
    facts: dict[str, Any]


def problems_of(part: Passages, seed: int) -> tuple[list[Problem], list[Problem]]:
    """A task's problems to learn from, and held-out ones."""
    task, stream = spelled(part.source), derive_seed(seed, "documents")
    return worked(task, "train", part.number, stream), worked(task, "validation", HELD_OUT, stream)


def passage(config: Rpt, tokenizer: Tokenizer, context: int, parallel: Parallel, say: Say) -> Passage:
    """The documents of this run in this tokenizer's ids."""
    if config.data.task:
        train, held = ([as_document(one, tokenizer) for one in part] for part in problems_of(config.data, config.seed))
    else:
        train, held = from_text(config, tokenizer, parallel, say)
    asking = asking_of(
        tokenizer, [*train, *held], before=config.ask.before, after=config.ask.after, ahead=config.ask.ahead
    )
    length = room_for(context, config.rollout.new_tokens, asking, config.data.length)
    return Passage(cut(train, length, tokenizer.start_id), cut(held, length, tokenizer.start_id), asking)


def from_text(config: Rpt, tokenizer: Tokenizer, parallel: Parallel, say: Say) -> tuple[Documents, Documents]:
    """As pretraining reads it, in the model's own tokens."""
    folder = ready(config.data, TokenizerPart(load=config.model.load), parallel, say).folder
    start, end = tokenizer.start_id, tokenizer.end_id
    train, held = ([[start, *map(int, ids), end] for ids in side.documents()] for side in (folder.train, folder.val))
    if not train or not held:
        raise DataError(f"{config.data.source} holds too few documents to keep some of them out of training; add text")
    return train, held


def places(config: Rpt, proxy: Decoder, cost: float, text: Passage, folder: Path) -> Places:
    """From the file where they were kept, or found now. cost: of a forward pass of the proxy over the training text."""
    key = {"documents": text.hash, "select": config.select.model_dump(mode="json"), "each": config.evaluate.each}
    if (found := kept(folder, key)) is not None:
        return found
    part, seed = config.select, derive_seed(config.seed, "positions")
    train, lost = text.asking.askable(text.train, hard(proxy, text.train, part, part.above))
    held, _ = text.asking.askable(text.held_out, hard(proxy, text.held_out, part, EVERYTHING))
    train = train if part.number is None else thinned(train, part.number, seed)
    held = evenly(held, config.evaluate.each, seed)
    short = sum(len(ids) < 2 for ids in text.train)
    facts = told(text, train, held, lost, short)
    require_places(config, train, held, lost, short)
    content = {"key": key, "train": listed(train), "held_out": listed(held), "flops": cost, "facts": facts}
    replace_json(folder / FILE, content)
    return Places(train, held, cost, facts)


def kept(folder: Path, key: Mapping[str, Any]) -> Places | None:
    """The places that were found before, if what is in `key` (of all that decided them) is what it was."""
    if not (folder / FILE).is_file():
        return None
    content = json.loads((folder / FILE).read_text())
    if any(content["key"][name] != value for name, value in key.items()):
        return None
    return Places(read(content["train"]), read(content["held_out"]), content["flops"], content["facts"])


def hard(proxy: Decoder, documents: Documents, part: Selection, above: float) -> list[Position]:
    return positions(proxy, documents, above=above, top=part.top, renormalised=part.renormalised)


def told(
    text: Passage, train: Sequence[Position], held: Sequence[Position], lost: Counter[str], short: int
) -> dict[str, Any]:
    """For the report."""
    dropped = {**lost, **({"a document of one token": short} if short else {})}
    numbers = {"train_documents": len(text.train), "held_out_documents": len(text.held_out)}
    return {**numbers, "train_places": len(train), "held_out_places": len(held), "dropped_places": dropped}


def require_places(
    config: Rpt, train: Sequence[Position], held: Sequence[Position], lost: Counter[str], short: int
) -> None:
    if not train:
        why = "".join(f"; {number:,}: {reason}" for reason, number in lost.items())
        why += f"; {short:,} documents have nothing to foretell" if short else ""
        raise DataError(
            f"no place in {config.data.source} is left to think about: the proxy finds none harder than "
            f"{config.select.above:g} nats{why}; lower select.above, or take a smaller proxy or more text"
        )
    if not held:
        raise DataError(f"nothing of {config.data.source} that was held out can be asked for; add text")


def listed(found: Sequence[Position]) -> list[list[float]]:
    return [[one.document, one.place, round(one.entropy, 6)] for one in found]


def read(rows: Sequence[Sequence[float]]) -> list[Position]:
    return [Position(int(document), int(place), entropy) for document, place, entropy in rows]
