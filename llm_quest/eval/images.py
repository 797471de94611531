"""Evaluator of a vision-language model: exact match of its answers about images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.data.image_text import ImageTextCollator, ImageTextDataset
from llm_quest.data.images import ImageProcessor
from llm_quest.data.synthetic_shapes import QuestionAnswer, exact_match
from llm_quest.errors import UsageError
from llm_quest.eval.evaluators import save_samples
from llm_quest.generation.generate import generate
from llm_quest.generation.stopping import end_token_ids
from llm_quest.models.multimodal import VisionLanguageModel

QUESTION_BATCH_SIZE = 64


@dataclass(frozen=True)
class ImageQuestionEvaluator:
    """Exact match of greedy answers to questions about `number` held-out images (each once: all of them, where there
    are fewer), by kind of question. The answers about the first image are saved in `samples`, if it is given."""

    sights: ImageTextDataset
    writer: ImageTextCollator
    preprocess: ImageProcessor
    number: int
    interval: int
    samples: Path | None = None
    name: str = "eval"

    @property
    def num_images(self) -> int:
        """How many images are asked about."""
        held_out = self.sights.num_eval_examples
        return self.number if held_out is None else min(self.number, held_out)

    def evaluate(self, model: VisionLanguageModel, step: int) -> Mapping[str, float]:
        questions = [
            (sight, turn) for sight in map(self.sights.eval_example, range(self.num_images)) for turn in sight.turns
        ]
        parts = [
            questions[first : first + QUESTION_BATCH_SIZE] for first in range(0, len(questions), QUESTION_BATCH_SIZE)
        ]
        answers = [answer for part in parts for answer in self.generate_answers(model, part)]
        right: dict[str, list[float]] = defaultdict(list)
        for answer, (_, turn) in zip(answers, questions, strict=True):
            right[turn.kind].append(exact_match(answer, turn))
        if self.samples is not None:
            first = questions[: len(questions[0][0].turns)]
            sample_rows = [
                {"prompt": turn.question, "text": f" {answer}", "wanted": turn.answer}
                for (_, turn), answer in zip(first, answers[: len(first)], strict=True)
            ]
            save_samples(self.samples, step, sample_rows)
        return {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}

    def generate_answers(self, model: VisionLanguageModel, questions: list[tuple[Any, QuestionAnswer]]) -> list[str]:
        """Greedy answers."""
        prompts = [self.writer.encode_prompt(turn.question, sight.pixels) for sight, turn in questions]
        images = [self.preprocess.normalize(sight.pixels[None]) for sight, _ in questions]
        longest = max(len(self.writer.tokenizer.encode(turn.answer)) for _, turn in questions) + 4
        room = model.config.max_position_embeddings - max(map(len, prompts))
        if room < 1:
            raise UsageError(
                "a question fills the context, and its answer has no tokens left: set a larger sequence_length"
            )
        tokenizer = self.writer.tokenizer
        ends = end_token_ids(model, tokenizer)
        answers = generate(
            model.with_images(images),  # type: ignore[arg-type]
            prompts,
            max_new_tokens=min(longest, room),
            temperature=0.0,
            eos_token_id=ends,
        )
        return [
            tokenizer.decode_continuation(prompt, [token for token in answer.tokens if token not in ends])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
