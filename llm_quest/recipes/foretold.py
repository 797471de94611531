"""What is looked at while a model learns to think before the next token, and while its control does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.disk import replace_json
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.probes import keep_samples
from llm_quest.rollouts.buckets import Foretelling, Foretold, Table, tabled

TABLES = "foretold.json"
SHOWN = 12


@dataclass
class ByBucket:
    """plain_hard, thought_hard and so on: the share of held-out places where the next token was foretold, read straight
    off and after thinking. file: where the tables before and after are kept (the leader's); the first answers go to
    samples/step-00000020.json."""

    foretelling: Foretelling
    model: Decoder
    every: int
    file: Path | None
    samples: Path | None = None
    name: str = "eval"

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        found = self.foretelling.of(model)
        table = tabled(found)
        if self.samples is not None:
            told = [self.shown(one) for one in found[:: max(1, len(found) // SHOWN)]]
            keep_samples(self.samples, step, told)
        thought = sum(one.thought for one in found) / len(found)
        return {**table.numbers(), "accuracy": thought, "unread": sum(one.said is None for one in found) / len(found)}

    def shown(self, one: Foretold) -> dict[str, Any]:
        ids = self.foretelling.documents[one.position.document][1 : one.position.place]
        decode: Callable[..., str] = self.foretelling.writer.tokenizer.decode
        return {"prompt": decode(ids), "text": one.text, "entropy": one.position.entropy, "right": one.thought}

    def show(self, when: str, say: Callable[[str], None]) -> Table:
        """The table of the model as it is, said, and kept under `when`."""
        table = self.foretelling.table(self.model)
        if self.file is not None:
            kept = json.loads(self.file.read_text()) if self.file.is_file() else {}
            replace_json(self.file, {**kept, when: table.as_json()})
        for line in table.lines():
            say(f"{when}: {line}")
        return table
