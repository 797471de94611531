"""`quest score MODEL`: the numbers that a reward model gives to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_quest.data.chat import ChatTemplate, end_template_at_answer
from llm_quest.data.conversations import Conversation, parse_conversation
from llm_quest.data.messages import Message
from llm_quest.data.records import read_records
from llm_quest.errors import DataError, UsageError
from llm_quest.formatting import align_columns
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.hub.locate import locate_model
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.classification import pad_rows
from llm_quest.objectives.readouts import read_rewards
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.parallel import resolve_device

SCORE_BATCH_SIZE = 16


@dataclass(frozen=True)
class ConversationScore:
    """score: the reward model's number. answer: the last message. where: file and line, or the option."""

    score: float
    answer: str
    where: str


@dataclass(frozen=True)
class ScoreReport:
    """A number for each conversation, in the order in which they were given."""

    model: str
    scores: tuple[ConversationScore, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        rows = [(f"{one.score:+.4f}", one.where, " ".join(one.answer.split())[:60]) for one in self.scores]
        return align_columns(rows, right=(0,))


def score_conversations(
    name_or_path: str, file: str | None, prompt: str | None, answers: Sequence[str], *, device: str = "auto"
) -> ScoreReport:
    """Score the conversations of a file, or answers to one prompt, with a run of `quest train reward` or a published
    ...ForSequenceClassification of one output."""
    conversations = read_scored(file, prompt, answers)
    torch_device = resolve_device(device)
    model = load(name_or_path, device=torch_device, dtype="float32")
    head = find_score_head(model) if isinstance(model, Decoder) else None
    if head is None or head.outputs != 1:
        raise UsageError(
            f"{name_or_path} is not a reward model; train one with quest train reward model.load={name_or_path}"
        )
    tokenizer = load_tokenizer(name_or_path)
    if locate_model(name_or_path).run_dir is not None:
        tokenizer.chat_template = end_template_at_answer(tokenizer)
    rows = ChatTemplate(tokenizer).encode_whole(conversations)
    context = model.config.max_position_embeddings
    for row, one in zip(rows, conversations, strict=True):
        if len(row) > context:
            raise DataError(f"{one.where}: {len(row):,} tokens, the model reads {context:,}; shorten the conversation")
    scores = score_rows(model, rows, torch_device)
    found = zip(scores, conversations, strict=True)
    return ScoreReport(name_or_path, tuple(ConversationScore(score, one.answer, one.where) for score, one in found))


def read_scored(file: str | None, prompt: str | None, answers: Sequence[str]) -> list[Conversation]:
    """What is to be scored. UsageError unless it is a file, or a prompt with answers."""
    if file is not None and prompt is None and not answers:
        return [parse_conversation(record) for record in read_records(file)]
    if file is not None or prompt is None or not answers:
        raise UsageError("give a FILE of conversations, or --prompt with one --answer or more")
    return [
        Conversation((Message("user", prompt), Message("assistant", one)), f"--answer {i}")
        for i, one in enumerate(answers, 1)
    ]


@torch.no_grad()
def score_rows(model: Decoder, rows: Sequence[Sequence[int]], device: torch.device) -> list[float]:
    """The number of every row of ids, read at its last token."""
    found: list[float] = []
    for first in range(0, len(rows), SCORE_BATCH_SIZE):
        tokens, positions = pad_rows(rows[first : first + SCORE_BATCH_SIZE])
        found += read_rewards(model, tokens.to(device), positions.to(device)).tolist()
    return found
