"""`quest classify MODEL_FILE TEXT`: what a classifier takes a text for, and how sure it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_quest.data.text_classification import encode_truncated
from llm_quest.errors import UsageError
from llm_quest.formatting import align_columns
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.last_token import last_token_outputs, pad_rows
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.parallel import resolve_device


@dataclass(frozen=True)
class TextPrediction:
    """label: the likeliest. probabilities: of every label, the likeliest first. cut: tokens of the text not read."""

    label: str
    probabilities: dict[str, float]
    tokens: int
    cut: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        result = align_columns([(name, f"{p:.4f}") for name, p in self.probabilities.items()], right=(1,))
        return result + ([f"(the last {self.cut} tokens of the text are beyond the context)"] if self.cut else [])


@torch.no_grad()
def classify_text(name_or_path: str, text: str, *, device: str = "auto") -> TextPrediction:
    """By a classifier that `quest train classify` made."""
    torch_device = resolve_device(device)
    model = load(name_or_path, device=torch_device, dtype="float32")
    head = find_score_head(model) if isinstance(model, Decoder) else None
    if head is None or head.outputs < 2:
        raise UsageError(
            f"{name_or_path} is no classifier of texts; make one with quest train classify model.load={name_or_path}"
        )
    tokenizer = load_tokenizer(name_or_path)
    whole = encode_truncated(tokenizer, text, 10**9)
    tokens, positions = pad_rows([whole[: model.config.max_position_embeddings]])
    probabilities = (
        last_token_outputs(model, tokens.to(torch_device), positions.to(torch_device))[0].softmax(dim=0).tolist()
    )
    names = head.labels or tuple(f"LABEL_{i}" for i in range(head.outputs))
    ordered = dict(sorted(zip(names, probabilities, strict=True), key=lambda pair: -pair[1]))
    return TextPrediction(next(iter(ordered)), ordered, tokens.shape[1], len(whole) - tokens.shape[1])
