"""Images with words: what a vision-language model is trained on, and how a step's rows are made.

A row is a start token, a placeholder for every patch, then turns: a question, its answer, an end. Only answers and ends
are learned:

      tokens    <s>  <image> <image> ...  how many red circles ?   two  </s>  describe :  two red ...
      targets    -      -       -          -   -    -    -    two  </s>   -      -     two red ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.contracts import Share
from llm_quest.data import scenes
from llm_quest.data.batch import IGNORE
from llm_quest.data.images import Preprocess, open_image
from llm_quest.data.packing import shuffled
from llm_quest.data.scenes import Turn
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError

CAPTION = "describe:"
ROUND = 8


@dataclass(frozen=True)
class Sight:
    """An image, as uint8 (C,H,W), and what is said about it."""

    pixels: np.ndarray
    turns: tuple[Turn, ...]


class Sights(Protocol):
    """Where images with words come from."""

    hash: str

    def train(self, number: int, seed: int) -> Sight:
        """What stands in row `number` of training."""

    def held_out(self, number: int) -> Sight:
        """Held-out sight `number`, the same in every run."""

    def texts(self) -> list[str]:
        """Text to train a tokenizer on, from the training side."""


class Scenes:
    """Rendered scenes of shapes, as many as are asked for; combinations are held out (`data.scenes`)."""

    def __init__(self, size: int):
        self.size = size
        self.hash = hashlib.sha256(f"scenes 3, {size} pixels".encode()).hexdigest()

    def train(self, number: int, seed: int) -> Sight:
        return self.sight(scenes.scene(seed, number))

    def held_out(self, number: int) -> Sight:
        return self.sight(scenes.scene(0, number, held_out=True))

    def texts(self) -> list[str]:
        return [f"{turn.question} {turn.answer}" for i in range(500) for turn in scenes.scene(0, i).turns]

    def sight(self, scene: scenes.Scene) -> Sight:
        return Sight(scenes.pixels([scene], self.size)[0], tuple(scene.turns))


class Captions:
    """A JSONL file of yours: {"image": "a.png", "caption": "..."} or {"image": ..., "question": ..., "answer": ...} a
    line, paths beside the file. Lines about one image stay together; about `held_out` of the images, by the hash of
    their pixels, are held out. Every image is opened once, so a broken one is found before training."""

    def __init__(self, file: str | Path, preprocess: Preprocess, held_out: float):
        grouped: dict[Path, list[Turn]] = {}
        for image, turn in read_lines(Path(file)):
            grouped.setdefault(image, []).append(turn)
        sights = [Sight(preprocess.pixels(open_image(image)), tuple(turns)) for image, turns in grouped.items()]
        marks = [hashlib.sha256(sight.pixels.tobytes()).digest() for sight in sights]
        out = [int.from_bytes(mark[:8], "big") < held_out * 2.0**64 for mark in marks]
        self.learned = [sight for sight, away in zip(sights, out, strict=True) if not away]
        self.kept = [sight for sight, away in zip(sights, out, strict=True) if away]
        if not self.learned or not self.kept:
            raise DataError(f"{file}: {len(sights)} images are too few to hold out {held_out:.0%} of them; add images")
        told = [(mark.hex(), [vars(turn) for turn in sight.turns]) for mark, sight in zip(marks, sights, strict=True)]
        self.hash = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def train(self, number: int, seed: int) -> Sight:
        epoch, place = divmod(number, len(self.learned))
        return self.learned[int(shuffled(len(self.learned), seed, epoch)[place])]

    def held_out(self, number: int) -> Sight:
        return self.kept[number % len(self.kept)]

    def texts(self) -> list[str]:
        return [f"{turn.question} {turn.answer}" for sight in self.learned for turn in sight.turns]


def read_lines(file: Path) -> list[tuple[Path, Turn]]:
    """Image and turn of every line; DataError names the line."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; a JSONL file of images and captions was expected")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: no JSON: {error}") from None
        keys = row.keys() if isinstance(row, dict) else set()
        wanted = ("image", "caption") if "caption" in keys else ("image", "question", "answer")
        wrong = [
            key for key in wanted if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]
        ]
        if wrong:
            raise DataError(
                f"{file}:{number}: {wrong[0]!r} is missing or no text; a line has image and caption, "
                "or image, question, answer"
            )
        turn = (
            Turn("caption", CAPTION, row["caption"])
            if "caption" in keys
            else Turn("question", row["question"], row["answer"])
        )
        found.append((file.parent / row["image"], turn))
    if not found:
        raise DataError(f"{file}: is empty; a line for each image was expected")
    return found


@dataclass(frozen=True)
class SightBatch:
    """tokens, targets (B,T) as in `TokenBatch`, rows filled up at their end; images (B,C,H,W), one a row, whose
    placeholders stand in the tokens. No token can see the filling, which stands after it."""

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    images: Float[Tensor, "B C H W"]
    counted: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are not filling."""
        return self.counted

    def to(self, device: torch.device | str) -> SightBatch:
        """The same batch on another device."""
        tokens, targets, images = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.images))
        return SightBatch(tokens, targets, images, self.counted)


@dataclass(frozen=True)
class Writer:
    """Turns to tokens. image_token stands `image_tokens` times for an image; a row has at most `length` tokens."""

    tokenizer: Tokenizer
    image_token: int
    image_tokens: int
    length: int

    @property
    def start(self) -> list[int]:
        """What every row begins with."""
        return [self.tokenizer.start_id, *[self.image_token] * self.image_tokens]

    def prompt(self, question: str) -> list[int]:
        """A row up to where the answer begins."""
        return self.start + self.tokenizer.encode(question, template=False)

    def row(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Tokens and targets. ValueError where the first turn does not fit; turns that come after the room is used up
        are left out."""
        tokens, learned = self.start, [False] * len(self.start)
        for turn in turns:
            question = self.tokenizer.encode(turn.question, template=False)
            answer = [*self.tokenizer.encode(f" {turn.answer}", template=False), self.tokenizer.end_id]
            if len(tokens) + len(question) + len(answer) > self.length + 1:
                break
            tokens, learned = tokens + question + answer, learned + [False] * len(question) + [True] * len(answer)
        if not any(learned):
            raise UsageError(
                f"an image's {self.image_tokens} placeholders and {turns[0].answer[:40]!r} do not fit a row of "
                f"{self.length} tokens: "
                "set a larger batch.length or a larger patch"
            )
        return tokens[:-1], [token if learn else IGNORE for token, learn in zip(tokens[1:], learned[1:], strict=True)]

    def batch(self, sights: Sequence[Sight], orders: Sequence[np.ndarray], preprocess: Preprocess) -> SightBatch:
        """Rows of one length; the turns of each in its own order."""
        rows = [self.row([sight.turns[i] for i in order]) for sight, order in zip(sights, orders, strict=True)]
        length = -(-max(len(tokens) for tokens, _ in rows) // ROUND) * ROUND
        tokens = torch.full((len(rows), length), self.tokenizer.end_id)
        targets = torch.full((len(rows), length), IGNORE)
        for number, (row, wanted) in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
            targets[number, : len(row)] = torch.tensor(wanted)
        images = preprocess.normalized(np.stack([sight.pixels for sight in sights]))
        return SightBatch(tokens, targets, images, sum(len(row) for row, _ in rows))


class SightFeed:
    """Row number r of training is a pure function of (seed, r): which sight, and in which order its turns come.

    turns: so many of them at most; None: all that fit. captions: in so many first steps the caption comes first, where
    there is one: it tells everything, and captions are hardly learned among questions.

    Commonly got wrong: of several turns in a row the later ones can be copied from the earlier ("how many red circles"
    tells the circles' colour), and the model learns to read, not to see."""

    def __init__(
        self,
        sights: Sights,
        writer: Writer,
        preprocess: Preprocess,
        *,
        rows: int,
        micro_rows: int,
        seed: int,
        turns: int | None = None,
        captions: int = 0,
        share: Share | None = None,
    ):
        share = share or Share()
        if rows % share.world:
            raise UsageError(f"{rows} rows cannot be shared by {share.world} processes; make rows a multiple of that")
        self.turns, self.captions = turns, captions
        self.sights, self.writer, self.preprocess = sights, writer, preprocess
        self.rows, self.micro_rows, self.seed, self.share = rows, micro_rows, seed, share

    def at(self, step: int) -> list[SightBatch]:
        """This rank's micro-batches of optimiser step `step`."""
        mine = self.rows // self.share.world
        first = step * self.rows + self.share.rank * mine
        starts = range(first, first + mine, self.micro_rows)
        return [self.batch(range(start, min(start + self.micro_rows, first + mine))) for start in starts]

    def batch(self, numbers: range) -> SightBatch:
        """Rows by their number since the beginning of training."""
        sights = [self.sights.train(number, self.seed) for number in numbers]
        orders = [self.order(sight, number)[: self.turns] for number, sight in zip(numbers, sights, strict=True)]
        return self.writer.batch(sights, orders, self.preprocess)

    def order(self, sight: Sight, number: int) -> np.ndarray:
        """In which order the turns of row `number` come."""
        order = shuffled(len(sight.turns), self.seed, number)
        if number >= self.captions * self.rows:
            return order
        return np.array(sorted(order, key=lambda turn: sight.turns[turn].kind != "caption"))

    def bookmark(self) -> dict[str, Any]:
        """What the rows depend on. There is no state: the step says where the feed stands."""
        told = {"turns": self.turns, "captions": self.captions}
        return {"feed": "sights", "data": self.sights.hash, "rows": self.rows, "seed": self.seed, **told}

    def resume(self, bookmark: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        if changed := [key for key, value in self.bookmark().items() if bookmark.get(key) != value]:
            raise DataError(f"the checkpoint belongs to other images: {', '.join(changed)} differ; start a new run")
