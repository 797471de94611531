"""Images with text, for vision-language models: captions, questions and answers, and the rows of training.

A row is a start token, a placeholder for every patch, then turns: a question, its answer, an end. Only answers and ends
are learned:

      tokens    <s>  <image> <image> ...  how many red circles ?   two  </s>  describe :  two red ...
      targets    -      -       -          -   -    -    -    two  </s>   -      -     two red ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data import synthetic_shapes
from llm_quest.data.batch import IGNORE_INDEX, pad, split_rows
from llm_quest.data.document import DropReport
from llm_quest.data.images import ImageProcessor, is_file, load_image
from llm_quest.data.loader import repeat_by_weight, shuffle_indices
from llm_quest.data.message_parsing import text_field
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import IMAGE_TEXT_FORMS, select_form
from llm_quest.data.split import choose_eval_part
from llm_quest.data.synthetic_shapes import QuestionAnswer
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, RowError, UsageError

CAPTION_PROMPT = "describe:"
PAD_TO_MULTIPLE_OF = 8


@dataclass(frozen=True)
class ImageText:
    """An image, as uint8 (C,H,W), with its questions and answers. weight: how often it is seen in an epoch."""

    pixels: np.ndarray
    turns: tuple[QuestionAnswer, ...]
    weight: float = 1.0


class ImageTextDataset(Protocol):
    """A source of images with text."""

    hash: str

    @property
    def num_train_examples(self) -> int | None:
        """Images of an epoch of training; None: without end."""

    @property
    def num_eval_examples(self) -> int | None:
        """Held-out images; None: without end."""

    def train_example(self, number: int, seed: int) -> ImageText:
        """The image of row `number` of training."""

    def eval_example(self, number: int) -> ImageText:
        """Held-out image `number`, the same in every run."""

    def tokenizer_texts(self) -> list[str]:
        """Text to train a tokenizer on, from the training side."""


class SceneDataset:
    """Rendered scenes of shapes, without end; combinations are held out (`data.synthetic_shapes`)."""

    num_train_examples: int | None = None
    num_eval_examples: int | None = None

    def __init__(self, size: int):
        self.size = size
        self.hash = hashlib.sha256(f"scenes 3, {size} pixels".encode()).hexdigest()

    def train_example(self, number: int, seed: int) -> ImageText:
        return self.render_example(synthetic_shapes.split_scene(seed, number))

    def eval_example(self, number: int) -> ImageText:
        return self.render_example(synthetic_shapes.split_scene(0, number, held_out=True))

    def tokenizer_texts(self) -> list[str]:
        return [
            f"{turn.question} {turn.answer}"
            for i in range(500)
            for turn in synthetic_shapes.split_scene(0, i).question_answers
        ]

    def render_example(self, scene: synthetic_shapes.Scene) -> ImageText:
        return ImageText(synthetic_shapes.render_scenes([scene], self.size)[0], tuple(scene.question_answers))


def read_examples(rows: Sequence[CaptionRow], image_processor: ImageProcessor) -> list[ImageText]:
    """The images of rows, each with all that is said about it."""
    grouped: dict[Path, list[QuestionAnswer]] = {}
    weights: dict[Path, float] = {}
    for row in rows:
        grouped.setdefault(row.image, []).extend(row.turns)
        weights.setdefault(row.image, row.weight)
    return [
        ImageText(image_processor.resize_to_pixels(load_image(image)), tuple(turns), weights[image])
        for image, turns in grouped.items()
    ]


class CaptionDataset:
    """Rows of images with captions or questions. Those about one image stay together; about `held_out` of the images,
    by the hash of their pixels, are held out. Every image is opened once, so that a broken one is found before
    training. name: of the rows, for messages. validation: rows to evaluate on, beside which held_out is 0. eval_part:
    which half of the images held out is kept."""

    def __init__(
        self,
        rows: Sequence[CaptionRow],
        image_processor: ImageProcessor,
        held_out: float,
        name: str,
        validation: Sequence[CaptionRow] = (),
        eval_part: str = "all",
    ):
        examples = read_examples(rows, image_processor)
        marks = [hashlib.sha256(example.pixels.tobytes()).digest() for example in examples]
        out = [int.from_bytes(mark[:8], "big") < held_out * 2.0**64 for mark in marks]
        learned = [example for example, away in zip(examples, out, strict=True) if not away]
        self.train_examples = repeat_by_weight(learned)
        self.held_out_examples = [example for example, away in zip(examples, out, strict=True) if away]
        self.held_out_examples += read_examples(validation, image_processor)
        keys = [hashlib.sha256(example.pixels.tobytes()).hexdigest() for example in self.held_out_examples]
        part = choose_eval_part([1] * len(keys), keys, eval_part)
        self.held_out_examples = [self.held_out_examples[number] for number in part]
        if not self.train_examples or (held_out and not self.held_out_examples):
            raise DataError(
                f"{name}: {len(examples)} images are too few to hold out {held_out:.0%} of them; add images"
            )
        contents = [
            (mark.hex(), [vars(turn) for turn in example.turns]) for mark, example in zip(marks, examples, strict=True)
        ]
        self.hash = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    @property
    def num_train_examples(self) -> int | None:
        return len(self.train_examples)

    @property
    def num_eval_examples(self) -> int | None:
        return len(self.held_out_examples)

    def train_example(self, number: int, seed: int) -> ImageText:
        epoch, place = divmod(number, len(self.train_examples))
        return self.train_examples[int(shuffle_indices(len(self.train_examples), seed, epoch)[place])]

    def eval_example(self, number: int) -> ImageText:
        return self.held_out_examples[number]

    def tokenizer_texts(self) -> list[str]:
        return [f"{turn.question} {turn.answer}" for example in self.train_examples for turn in example.turns]


class CaptionRow(NamedTuple):
    """An image's file and what is said of it. weight: how often it is seen in an epoch."""

    image: Path
    turns: tuple[QuestionAnswer, ...]
    weight: float


def read_caption_rows(records: Iterable[Record], drop_report: DropReport) -> list[CaptionRow]:
    """The image and the turns of every row; the report counts rows that are none."""
    return parse_rows(records, parse_caption_row, drop_report)


def parse_caption_row(record: Record) -> CaptionRow:
    """Parse one row: a path, relative to the file of rows, with a caption, a question or a conversation."""
    row, where = TrackedRow.wrap(record.row), record.where
    parsed = select_form(IMAGE_TEXT_FORMS, row, where).parse(row, where)
    image = text_field(row, "image", where)
    if not image or not all(text for turn in parsed for text in turn if text is not None):
        raise RowError(where, "an empty text", "'image', a caption, a question or an answer is empty")
    turns = tuple(
        QuestionAnswer("caption", CAPTION_PROMPT, answer)
        if question is None
        else QuestionAnswer("question", question, answer)
        for question, answer in parsed
    )
    file = Path(where.rpartition(":")[0]).parent / image
    if not is_file(file):
        raise RowError(where, "an image that is not there", f"there is no image {file}")
    return CaptionRow(file, turns, record.weight)


@dataclass(frozen=True)
class ImageTextBatch:
    """input_ids, targets (B,T) as in `TokenBatch`, padded on the right, where no token of a causal pass sees it;
    images (B,C,H,W), or B of (C,H,W) where they are of several sizes, one a row, whose placeholders are among the
    tokens."""

    input_ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    images: Float[Tensor, "B C H W"] | tuple[Float[Tensor, "C H W"], ...]
    token_count: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.token_count

    def to(self, device: torch.device | str) -> ImageTextBatch:
        """The same batch on another device."""
        tokens, targets = (t.to(device, non_blocking=True) for t in (self.input_ids, self.targets))
        if isinstance(self.images, tuple):
            images = tuple(image.to(device, non_blocking=True) for image in self.images)
            return ImageTextBatch(tokens, targets, images, self.token_count)
        return ImageTextBatch(tokens, targets, self.images.to(device, non_blocking=True), self.token_count)


@dataclass(frozen=True)
class ImageTextCollator:
    """Encodes turns. row_prefix: the ids that every row begins with: a start token and the image's (`ImageChat`); a row
    has at most `max_length` tokens. prefix_of: of an image of this height and width, where they are of several
    sizes."""

    tokenizer: Tokenizer
    row_prefix: tuple[int, ...]
    max_length: int
    prefix_of: Callable[[int, int], Sequence[int]] | None = None

    def encode_prefix(self, pixels: np.ndarray | None) -> Sequence[int]:
        """What stands before the first question about an image (C,H,W)."""
        return self.row_prefix if self.prefix_of is None or pixels is None else self.prefix_of(*pixels.shape[1:])

    def encode_prompt(self, question: str, pixels: np.ndarray | None = None) -> list[int]:
        """The ids of a row up to where the answer begins."""
        return [*self.encode_prefix(pixels), *self.tokenizer.encode(question, add_special_tokens=False)]

    def encode_row(
        self, turns: Sequence[QuestionAnswer], pixels: np.ndarray | None = None
    ) -> tuple[list[int], list[int]]:
        """Tokens and targets of a row. UsageError where the first turn does not fit; later turns that do not fit are
        left out."""
        tokens = list(self.encode_prefix(pixels))
        prefix_length = len(tokens)
        learned = [False] * prefix_length
        for turn in turns:
            question, answer = self.tokenizer.encode_pieces(turn.question, f" {turn.answer}")
            answer = [*answer, self.tokenizer.eos_token_id]
            if len(tokens) + len(question) + len(answer) > self.max_length + 1:
                break
            tokens, learned = tokens + question + answer, learned + [False] * len(question) + [True] * len(answer)
        if not any(learned):
            raise UsageError(
                f"the {prefix_length - 1} tokens of an image and {turns[0].answer[:40]!r} do not fit a row of "
                f"{self.max_length} tokens: "
                "set a larger sequence_length or a larger patch"
            )
        return tokens[:-1], [
            token if learn else IGNORE_INDEX for token, learn in zip(tokens[1:], learned[1:], strict=True)
        ]

    def collate(
        self, examples: Sequence[ImageText], orders: Sequence[np.ndarray], image_processor: ImageProcessor
    ) -> ImageTextBatch:
        """Rows of one length; the turns of each in its own order."""
        rows = [
            self.encode_row([example.turns[i] for i in order], example.pixels)
            for example, order in zip(examples, orders, strict=True)
        ]
        length = -(-max(len(tokens) for tokens, _ in rows) // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        tokens = torch.from_numpy(pad([row for row, _ in rows], self.tokenizer.eos_token_id, length))
        targets = torch.from_numpy(pad([targets for _, targets in rows], IGNORE_INDEX, length))
        images: Any = tuple(image_processor.normalize(example.pixels[None])[0] for example in examples)
        if len({image.shape for image in images}) == 1:
            images = torch.stack(images)
        return ImageTextBatch(tokens, targets, images, sum(len(row) for row, _ in rows))


class ImageTextRows:
    """A `RowSource` of images with turns: of each row, which image, and in which order its turns come.

    max_turns: so many of them at most; None: all that fit. caption_first_rows: in so many first rows the caption comes
    first, where there is one: it says everything, and captions are hardly learned among questions.

    Commonly got wrong: of several turns in a row the later ones can be copied from the earlier ("how many red circles"
    gives the color of the circles away), and the model learns to read, not to see."""

    def __init__(
        self,
        dataset: ImageTextDataset,
        collator: ImageTextCollator,
        image_processor: ImageProcessor,
        *,
        max_turns: int | None = None,
        caption_first_rows: int = 0,
    ):
        self.max_turns, self.caption_first_rows = max_turns, caption_first_rows
        self.dataset, self.collator, self.image_processor = dataset, collator, image_processor

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[ImageTextBatch]:
        return [self.collate(part, seed) for part in split_rows(rows, micro_batch_size)]

    def fingerprint(self) -> dict[str, Any]:
        options = {"max_turns": self.max_turns, "caption_first_rows": self.caption_first_rows}
        return {"loader": "images with text", "data": self.dataset.hash, **options}

    def collate(self, rows: range, seed: int) -> ImageTextBatch:
        """Rows by their number since the beginning of training."""
        examples = [self.dataset.train_example(number, seed) for number in rows]
        orders = [
            self.turn_order(example, number, seed)[: self.max_turns]
            for number, example in zip(rows, examples, strict=True)
        ]
        return self.collator.collate(examples, orders, self.image_processor)

    def turn_order(self, example: ImageText, number: int, seed: int) -> np.ndarray:
        """The order in which the turns of row `number` come."""
        order = shuffle_indices(len(example.turns), seed, number)
        if number >= self.caption_first_rows:
            return order
        return np.array(sorted(order, key=lambda turn: example.turns[turn].kind != "caption"))
