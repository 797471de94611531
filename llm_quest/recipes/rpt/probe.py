"""What is looked at while a model learns to think before the next token, and while its control does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.eval.evaluators import save_samples
from llm_quest.files import atomic_write_json
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.rpt.evaluation import BucketTable, NextTokenReasoningEval, PositionResult, summarize_buckets

TABLES_FILE = "foretold.json"
MAX_SAMPLES = 12


@dataclass
class PositionEvaluator:
    """plain_hard, thought_hard and so on: the share of held-out places where the next token was foretold, read straight
    off and after thinking. file: where the tables before and after are kept (the leader's); the first answers go to
    samples/step-00000020.json."""

    evaluation: NextTokenReasoningEval
    model: Decoder
    interval: int
    file: Path | None
    samples: Path | None = None
    name: str = "eval"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        found = self.evaluation.evaluate_positions(model)
        table = summarize_buckets(found)
        if self.samples is not None:
            sample_rows = [self.sample_row(one) for one in found[:: max(1, len(found) // MAX_SAMPLES)]]
            save_samples(self.samples, step, sample_rows)
        accuracy = sum(one.reasoned_correct for one in found) / len(found)
        return {
            **table.metrics(),
            "accuracy": accuracy,
            "unread": sum(one.answer is None for one in found) / len(found),
        }

    def sample_row(self, one: PositionResult) -> dict[str, Any]:
        ids = self.evaluation.documents[one.position.document][1 : one.position.place]
        decode: Callable[..., str] = self.evaluation.sampler.tokenizer.decode
        return {"prompt": decode(ids), "text": one.text, "entropy": one.position.entropy, "right": one.reasoned_correct}

    def report_table(self, when: str, log: Callable[[str], None]) -> BucketTable:
        """The table of the model as it is, said, and kept under `when`."""
        table = self.evaluation.evaluate_buckets(self.model)
        if self.file is not None:
            kept = json.loads(self.file.read_text()) if self.file.is_file() else {}
            atomic_write_json(self.file, {**kept, when: table.as_json()})
        for line in table.lines():
            log(f"{when}: {line}")
        return table
