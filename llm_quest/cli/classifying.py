"""`quest classify MODEL TEXT`: what a classifier takes a text for, and how sure it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_quest.data.labelled import ids_of
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.last_outputs import last_outputs, padded
from llm_quest.report.words import aligned
from llm_quest.techniques.score_head import score_head
from llm_quest.train.parallel import pick_device


@dataclass(frozen=True)
class Verdict:
    """label: the likeliest. probabilities: of every label, the likeliest first. cut: tokens of the text not read."""

    label: str
    probabilities: dict[str, float]
    tokens: int
    cut: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        told = aligned([(name, f"{p:.4f}") for name, p in self.probabilities.items()], right=(1,))
        return told + ([f"(the last {self.cut} tokens of the text are beyond the context)"] if self.cut else [])


@torch.no_grad()
def classify(where: str, text: str, *, device: str = "auto") -> Verdict:
    """By a classifier that `quest train classify` made."""
    place = pick_device(device)
    model = load(where, device=place, dtype="float32")
    head = score_head(model) if isinstance(model, Decoder) else None
    if head is None or head.outputs < 2:
        raise UsageError(f"{where} is no classifier of texts; make one with quest train classify model.load={where}")
    tokenizer = load_tokenizer(where)
    whole = ids_of(tokenizer, text, 10**9)
    tokens, positions = padded([whole[: model.config.context]])
    p = last_outputs(model, tokens.to(place), positions.to(place))[0].softmax(dim=0).tolist()
    names = head.labels or tuple(f"LABEL_{i}" for i in range(head.outputs))
    ordered = dict(sorted(zip(names, p, strict=True), key=lambda pair: -pair[1]))
    return Verdict(next(iter(ordered)), ordered, tokens.shape[1], len(whole) - tokens.shape[1])
