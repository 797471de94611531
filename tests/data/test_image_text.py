"""Images with words: what a row holds, what is learned of it, and what a JSONL file may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm_quest.contracts import DataShard
from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.data.document import DropReport
from llm_quest.data.image_text import CaptionDataset, ImageTextCollator, ImageTextRows, SceneDataset, read_caption_rows
from llm_quest.data.images import ImageProcessor
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.records import read_records
from llm_quest.data.sources import DataSource, load_rows
from llm_quest.data.synthetic_shapes import QuestionAnswer
from llm_quest.data.tokenizer import SPECIAL_TOKENS
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.eval.images import ImageQuestionEvaluator

SCENES = SceneDataset(24)
TOKENIZER = train_bpe(SCENES.tokenizer_texts()[:300], 400, (*SPECIAL_TOKENS, "<image>"))
IMAGE = TOKENIZER.token_to_id("<image>")
PREFIX = (TOKENIZER.start_token_id, *[IMAGE] * 4)
WRITER = ImageTextCollator(TOKENIZER, PREFIX, 120)
PREPROCESS = ImageProcessor(24)


def feed(*, max_turns: int | None = None, caption_first_rows: int = 0, **changes) -> ShardedLoader[ImageTextRows]:
    source = ImageTextRows(SCENES, WRITER, PREPROCESS, max_turns=max_turns, caption_first_rows=caption_first_rows)
    return ShardedLoader(source, **({"batch_size": 6, "micro_batch_size": 6, "seed": 1} | changes))


def test_a_row_is_image_question_answer_and_only_the_answer_and_its_end_are_learned():
    tokens, targets = WRITER.encode_row(
        [
            QuestionAnswer("count", "how many red circles?", "two"),
            QuestionAnswer("color", "what colour are the squares?", "blue"),
        ]
    )
    assert tokens[:5] == [TOKENIZER.start_token_id, IMAGE, IMAGE, IMAGE, IMAGE]
    assert TOKENIZER.decode(tokens) == "how many red circles? twowhat colour are the squares? blue"
    assert (
        TOKENIZER.decode([token for token in targets if token != IGNORE_INDEX], keep_special_tokens=True)
        == " two<|endoftext|> blue<|endoftext|>"
    )
    for here, target in zip(tokens[1:], targets, strict=False):
        assert target in (IGNORE_INDEX, here)


def test_a_prompt_is_the_row_up_to_its_answer():
    turn = QuestionAnswer("count", "how many red circles?", "two")
    tokens, targets = WRITER.encode_row([turn])
    prompt = WRITER.encode_prompt(turn.question)
    assert tokens[: len(prompt)] == prompt
    assert targets[len(prompt) - 1] != IGNORE_INDEX == targets[len(prompt) - 2]


def test_a_steps_rows_are_the_same_for_any_micro_batch_and_any_number_of_processes():
    (whole,) = feed().batches(4)
    shared = [batch for rank in range(2) for batch in feed(micro_batch_size=2, shard=DataShard(rank, 2)).batches(4)]
    assert torch.equal(torch.cat([batch.images for batch in shared]), whole.images)
    assert sum(batch.num_tokens for batch in shared) == whole.num_tokens
    first = shared[0]
    assert torch.equal(first.input_ids[0, :60], whole.input_ids[0, :60])


def test_every_row_has_a_placeholder_for_every_vector_of_its_image():
    (batch,) = feed().batches(0)
    assert ((batch.input_ids == IMAGE).sum(dim=1) == 4).all()
    assert batch.images.shape == (6, 3, 24, 24)
    assert batch.input_ids.shape[1] % 8 == 0


def test_turns_beyond_the_room_are_left_out_but_not_the_first():
    short = ImageTextCollator(TOKENIZER, PREFIX, 12)
    tokens, _ = short.encode_row([QuestionAnswer("count", "how many red circles?", "two")] * 5)
    assert len(tokens) <= 12
    with pytest.raises(UsageError, match="the 4 tokens of an image and 'two' do not fit a row of 6 tokens"):
        ImageTextCollator(TOKENIZER, PREFIX, 6).encode_row([QuestionAnswer("count", "how many red circles?", "two")])


def write(tmp_path: Path, rows: list[object], images: int = 12) -> Path:
    random = np.random.default_rng(0)
    for i in range(images):
        Image.fromarray(random.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def caption_dataset(file: Path, *, strict: bool = False) -> CaptionDataset:
    rows = load_rows([DataSource(str(file))], read_caption_rows, DropReport(), strict=strict)
    return CaptionDataset(rows, PREPROCESS, 0.3, str(file))


def test_a_file_of_captions_and_questions_is_read_and_lines_of_an_image_stay_together(tmp_path: Path):
    rows = [{"image": f"{i}.png", "caption": f"image {i}"} for i in range(12)]
    rows += [{"image": f"{i}.png", "question": "which?", "answer": str(i)} for i in range(12)]
    sights = caption_dataset(write(tmp_path, rows))
    assert len(sights.train_examples) + len(sights.held_out_examples) == 12
    assert all(
        [turn.question for turn in sight.turns] == ["describe:", "which?"]
        for sight in (*sights.train_examples, *sights.held_out_examples)
    )
    held = {turn.answer for sight in sights.held_out_examples for turn in sight.turns}
    assert not held & {turn.answer for number in range(30) for turn in sights.train_example(number, 0).turns}
    assert not any(
        answer in text
        for answer in held
        if len(answer) > 3
        for text in sights.tokenizer_texts()
        if text.endswith(answer)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"captions\.jsonl:2: is not JSON"),
        ({"image": "0.png"}, r"captions\.jsonl:2: has the keys image; expected those of one form: image, caption;"),
        ({"image": "0.png", "caption": 3}, r"captions\.jsonl:2: 'caption' is a int, expected text"),
        ({"image": "0.png", "caption": ""}, r"captions\.jsonl:2: .*is empty"),
        ([1], r"captions\.jsonl:2: holds a list, expected an object"),
        ({"image": "absent.png", "caption": "x"}, r"captions\.jsonl:2: there is no image .*absent\.png"),
        (
            {"image": "0.png", "conversations": [{"from": "gpt", "value": "x"}]},
            r"captions\.jsonl:2: the roles are assistant",
        ),
    ],
)
def test_a_bad_line_is_named_and_left_out(tmp_path: Path, line: object, message: str):
    file = write(tmp_path, [*({"image": f"{i}.png", "caption": "x"} for i in range(12)), line][::-1])
    file.write_text("\n".join(file.read_text().split("\n")[i] for i in (1, 0, *range(2, 13))))
    with pytest.raises(DataError, match=message):
        caption_dataset(file, strict=True)
    dataset = caption_dataset(file)
    assert len(dataset.train_examples) + len(dataset.held_out_examples) == 12


def test_llavas_conversations_are_questions_and_answers(tmp_path: Path):
    turns = [("human", "<image>\nHow many?"), ("gpt", "two"), ("human", "Which?"), ("gpt", "red")]
    row = {"image": "0.png", "id": "7", "conversations": [{"from": who, "value": text} for who, text in turns]}
    report = DropReport()
    [found] = read_caption_rows(read_records(write(tmp_path, [row])), report)
    assert [(turn.question, turn.answer) for turn in found.turns] == [("How many?", "two"), ("Which?", "red")]
    assert report.unused_keys == {"id": 1}


def test_an_absent_or_empty_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        caption_dataset(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="it holds no rows"):
        caption_dataset(write(tmp_path, []))


def test_one_turn_a_row_leaves_nothing_to_copy_from():
    (batch,) = feed(max_turns=1).batches(2)
    assert ((batch.targets == TOKENIZER.eos_token_id).sum(dim=1) == 1).all()
    (several,) = feed().batches(2)
    assert (several.targets == TOKENIZER.eos_token_id).sum() > 6


def test_captions_come_first_in_so_many_steps_and_questions_after_them():
    learning, question = (
        feed(max_turns=1, caption_first_rows=12),
        TOKENIZER.encode("describe:", add_special_tokens=False),
    )
    start = len(WRITER.row_prefix)
    asked = [
        [row[start : start + len(question)].tolist() == question for row in batch.input_ids]
        for step in range(8)
        for batch in learning.batches(step)
    ]
    assert all(all(rows) for rows in asked[:2])
    assert not all(all(rows) for rows in asked[2:])


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_a_line_ends_at_its_line_end_alone(tmp_path: Path, mark: str):
    rows = [{"image": "0.png", "caption": f"one{mark}two"}, {"image": "1.png", "caption": "three"}]
    file = write(tmp_path, [])
    file.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    rows = read_caption_rows(read_records(file), DropReport())
    assert [turn.answer for row in rows for turn in row.turns] == [f"one{mark}two", "three"]


def test_every_held_out_image_is_asked_about_once(tmp_path: Path):
    rows = [{"image": f"{i % 10}.png", "question": f"{i}?", "answer": str(i)} for i in range(10)]
    dataset = caption_dataset(write(tmp_path, rows))
    held_out = dataset.num_eval_examples
    assert held_out is not None
    asked: list[str] = []

    class Recording(ImageQuestionEvaluator):
        def generate_answers(self, model: Any, questions: list[tuple[Any, QuestionAnswer]]) -> list[str]:
            asked.extend(turn.question for _, turn in questions)
            return [turn.answer for _, turn in questions]

    for wanted in (1, held_out, held_out + 2, 20 * held_out):
        asked.clear()
        evaluator = Recording(dataset, WRITER, PREPROCESS, wanted, 0)
        assert evaluator.evaluate(None, 0) == {"question": 1.0}
        assert len(asked) == len(set(asked)) == evaluator.num_images == min(wanted, held_out)
    assert Recording(SCENES, WRITER, PREPROCESS, 300, 0).num_images == 300
