"""Accuracy of the next token, directly and after reasoning, by the entropy of a proxy (RPT, arXiv:2506.08007, table 1).
The paper's sets are nested (easy: above 0.5 nat); here there are disjoint buckets as well.

After reasoning an answer is right if its reward is 1: one true token or several, to the byte. So an answer of two
tokens is wrong if its second one is, which makes it the harder measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quest.data.whole_documents import collate_documents
from llm_quest.eval.evaluators import save_samples
from llm_quest.eval.statistics import ConfidenceInterval, wilson_confidence_interval
from llm_quest.files import atomic_write_json, load_json
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.rpt.documents import ENTROPY_THRESHOLDS
from llm_quest.recipes.rpt.positions import BUCKET_NAMES, entropy_bucket
from llm_quest.recipes.rpt.prompts import Position, PrefixMatchReward, PromptBuilder, prefix_match
from llm_quest.rollouts.sampler import ContextFactory, Sample, Sampler, eval_mode

EVAL_BATCH_SIZE = 256
TABLES_FILE = "foretold.json"
MAX_SAMPLES = 12


@dataclass(frozen=True)
class PositionResult:
    """The result at one place: whether the most likely next token and the answer after reasoning are right.

    answer: the answer, None if there is none; num_tokens: of the completion; multi_token: whether it predicts more than
    one true token."""

    position: Position
    direct_correct: bool
    reasoned_correct: bool
    answer: str | None
    text: str
    num_tokens: int
    multi_token: bool


@dataclass(frozen=True)
class BucketAccuracy:
    """Accuracy at the places of one bucket. Intervals are Wilson's, 95 %."""

    name: str
    count: int
    direct_accuracy: ConfidenceInterval
    reasoned_accuracy: ConfidenceInterval
    no_answer_rate: float
    multi_token_rate: float
    mean_tokens: float

    def line(self) -> str:
        return (
            f"{self.name:<8}{self.count:>6,}   plain {self.direct_accuracy}   thought {self.reasoned_accuracy}   "
            f"no answer {self.no_answer_rate:.1%}, {self.mean_tokens:.1f} tokens"
        )


@dataclass(frozen=True)
class BucketTable:
    """Accuracy by bucket of difficulty. buckets: disjoint; nested_buckets: the paper's sets, each holding the harder
    ones."""

    buckets: tuple[BucketAccuracy, ...]
    nested_buckets: tuple[BucketAccuracy, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        return [bucket.line() for bucket in self.buckets]

    @property
    def accuracy(self) -> float:
        """The accuracy after reasoning over all places."""
        right = sum(round(bucket.reasoned_accuracy.share * bucket.count) for bucket in self.buckets)
        return right / sum(bucket.count for bucket in self.buckets)

    def metrics(self) -> dict[str, float]:
        """Metrics: the accuracy after reasoning, and both accuracies of each bucket."""
        metrics: dict[str, float] = {"accuracy": self.accuracy}
        for bucket in self.buckets:
            metrics |= {
                f"plain_{bucket.name}": bucket.direct_accuracy.share,
                f"thought_{bucket.name}": bucket.reasoned_accuracy.share,
            }
        return metrics


@dataclass(frozen=True)
class NextTokenReasoningEval:
    """Evaluates next-token reasoning at held-out places. documents, positions: the held-out places. prompt_builder: of
    their prompts. sampler: its tokenizer, end tokens, budget and precision; the answers are greedy. whole_model: a
    context that gathers a sharded model."""

    documents: Sequence[Sequence[int]]
    positions: Sequence[Position]
    prompt_builder: PromptBuilder
    sampler: Sampler
    reward_fn: PrefixMatchReward
    whole_model: ContextFactory = nullcontext

    def evaluate_buckets(self, model: Decoder) -> BucketTable:
        return summarize_buckets(self.evaluate_positions(model))

    def evaluate_positions(self, model: Decoder) -> list[PositionResult]:
        with self.whole_model(), eval_mode(model), torch.no_grad():
            plain = self.direct_predictions(model)
            samples = self.sample_reasoning(model)
        return [self.score_position(*one) for one in zip(self.positions, plain, samples, strict=True)]

    def score_position(self, position: Position, plain: bool, sample: Sample) -> PositionResult:
        prediction, truth = self.reward_fn.extract_prediction(sample), sample.problem.target_tokens
        right = prediction is not None and prefix_match(prediction.encode(), truth) == 1
        several = prediction is not None and len(prediction.encode()) > len(truth[0])
        return PositionResult(position, plain, right, prediction, sample.text, len(sample.completion_ids), several)

    def direct_predictions(self, model: Decoder) -> list[bool]:
        """Whether the most likely next token is the true one, in one pass for all places of a document."""
        device = next(model.parameters()).device
        places: dict[int, list[int]] = {}
        for one in self.positions:
            places.setdefault(one.document, []).append(one.place)
        right: dict[tuple[int, int], bool] = {}
        numbers = sorted(places, key=lambda number: -len(self.documents[number]))
        for start in range(0, len(numbers), EVAL_BATCH_SIZE):
            some = numbers[start : start + EVAL_BATCH_SIZE]
            batch = collate_documents([self.documents[number] for number in some]).to(device)
            with self.sampler.autocast_context():
                likeliest = model(batch.input_ids).argmax(dim=-1)
            hits = (likeliest == batch.targets).cpu()
            for row, number in enumerate(some):
                right |= {(number, place): bool(hits[row, place - 1]) for place in places[number]}
        return [right[position.document, position.place] for position in self.positions]

    def sample_reasoning(self, model: Decoder) -> list[Sample]:
        """Sample a greedy answer for each place."""
        until = StoppingCriteria(max_new_tokens=self.sampler.max_new_tokens, eos_token_ids=self.sampler.eos_token_ids)
        samples: list[Sample] = []
        for start in range(0, len(self.positions), EVAL_BATCH_SIZE):
            some = self.positions[start : start + EVAL_BATCH_SIZE]
            prompts = [self.prompt_builder.build_prompt(self.documents[one.document], one.place) for one in some]
            with self.sampler.autocast_context():
                completions = generate_completions(
                    model, [each.prompt_ids for each in prompts], SamplingParams(temperature=0.0), until
                )
            samples += [
                self.sampler.make_sample(question, completion)
                for question, completion in zip(prompts, completions, strict=True)
            ]
        return samples


def summarize_buckets(
    results: Sequence[PositionResult], thresholds: Sequence[float] = ENTROPY_THRESHOLDS
) -> BucketTable:
    """Summarize disjoint buckets and the paper's nested sets, without empty ones."""
    placed = [(entropy_bucket(result.position.entropy, thresholds), result) for result in results]
    apart = [(name, [one for at, one in placed if at == number]) for number, name in enumerate(BUCKET_NAMES)]
    above = [
        (f"H > {limit:g}", [one for at, one in placed if at >= number]) for number, limit in enumerate(thresholds, 1)
    ]
    return BucketTable(
        *(tuple(summarize_bucket(name, some) for name, some in parts if some) for parts in (apart, above))
    )


def summarize_bucket(name: str, some: Sequence[PositionResult]) -> BucketAccuracy:
    count = len(some)
    return BucketAccuracy(
        name,
        count,
        wilson_confidence_interval(sum(one.direct_correct for one in some), count),
        wilson_confidence_interval(sum(one.reasoned_correct for one in some), count),
        sum(one.answer is None for one in some) / count,
        sum(one.multi_token for one in some) / count,
        sum(one.num_tokens for one in some) / count,
    )


@dataclass
class PositionEvaluator:
    """Evaluates held-out places: plain_hard, thought_hard and so on are the accuracies of the next token, directly and
    after reasoning. file: of the tables before and after; None on other processes than the main one. The first answers
    go to samples/step-00000020.json."""

    evaluation: NextTokenReasoningEval
    model: Decoder
    interval: int
    file: Path | None
    samples: Path | None = None
    name: str = "eval"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        results = self.evaluation.evaluate_positions(model)
        table = summarize_buckets(results)
        if self.samples is not None:
            sample_rows = [self.sample_row(result) for result in results[:: max(1, len(results) // MAX_SAMPLES)]]
            save_samples(self.samples, step, sample_rows)
        return {**table.metrics(), "unread": sum(result.answer is None for result in results) / len(results)}

    def sample_row(self, one: PositionResult) -> dict[str, Any]:
        ids = self.evaluation.documents[one.position.document][1 : one.position.place]
        prompt = self.evaluation.sampler.tokenizer.decode_continuation((), ids)
        return {"prompt": prompt, "text": one.text, "entropy": one.position.entropy, "right": one.reasoned_correct}

    def report_table(self, when: str, log: Callable[[str], None]) -> BucketTable:
        """Log the table of the present model, and save it in the file under `when`."""
        table = self.evaluation.evaluate_buckets(self.model)
        if self.file is not None:
            kept = load_json(self.file, remedy="remove it") if self.file.is_file() else {}
            atomic_write_json(self.file, {**kept, when: table.as_json()})
        for line in table.lines():
            log(f"{when}: {line}")
        return table
