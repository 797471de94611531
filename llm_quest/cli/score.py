"""`quest score MODEL`: scores conversations with a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_quest.data.chat import ChatTemplate, end_template_at_answer
from llm_quest.data.conversations import Conversation, parse_conversation
from llm_quest.data.messages import Message
from llm_quest.data.preference_forms import PREFERENCE_FORMS
from llm_quest.data.preferences import parse_preference
from llm_quest.data.records import Record, read_records
from llm_quest.errors import DataError, UsageError
from llm_quest.formatting import align_columns
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.locate import locate_model
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import score_rows
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.parallel import resolve_device


@dataclass(frozen=True)
class ConversationScore:
    """A conversation with its score. score: the reward model's number. answer: the last message. where: file and line,
    or the option."""

    score: float
    answer: str
    where: str


@dataclass(frozen=True)
class ScoreReport:
    """The score of each conversation, in the order in which they were given. accuracy: the share of rows of preferences
    whose best answer has the highest score; None without such rows."""

    model: str
    scores: tuple[ConversationScore, ...]
    accuracy: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        rows = [(f"{line.score:+.4f}", line.where, " ".join(line.answer.split())[:60]) for line in self.scores]
        pairs = [] if self.accuracy is None else ["", f"the best answer has the highest score: {self.accuracy:.1%}"]
        return [*align_columns(rows, right=(0,)), *pairs]


def score_conversations(
    name_or_path: str, file: str | None, prompt: str | None, answers: Sequence[str], *, device: str = "auto"
) -> ScoreReport:
    """Score the conversations or the preferences of a file, or answers to one prompt, with a run of `quest train
    reward` or a published ...ForSequenceClassification of one output."""
    groups = read_score_groups(file, prompt, answers)
    conversations = [one for group in groups for one in group]
    model = load_reward_model(name_or_path, resolve_device(device))
    tokenizer = load_tokenizer(name_or_path)
    if locate_model(name_or_path).run_dir is not None:
        tokenizer.chat_template = end_template_at_answer(tokenizer)
    rows = ChatTemplate(tokenizer).encode_whole(conversations)
    context = model.config.max_position_embeddings
    for row, one in zip(rows, conversations, strict=True):
        if len(row) > context:
            raise DataError(f"{one.where}: {len(row):,} tokens, the model reads {context:,}; shorten the conversation")
    scores = score_rows(model, rows).tolist()
    scored = zip(scores, conversations, strict=True)
    results = tuple(ConversationScore(score, one.answer, one.where) for score, one in scored)
    return ScoreReport(name_or_path, results, ranking_accuracy(scores, groups))


def load_reward_model(name_or_path: str, device: torch.device) -> Decoder:
    """A model with a score head of one output. UsageError for another."""
    model = load(name_or_path, device=device, dtype="float32")
    head = find_score_head(model) if isinstance(model, Decoder) else None
    if head is None or head.outputs != 1:
        raise UsageError(
            f"{name_or_path} is not a reward model; train one with quest train reward model.load={name_or_path}"
        )
    return model


def ranking_accuracy(scores: Sequence[float], groups: Sequence[Sequence[Conversation]]) -> float | None:
    """The share of groups of several answers whose first has the highest score; None without such a group."""
    rest = iter(scores)
    ranked = [[next(rest) for _ in group] for group in groups]
    right = [first > max(others) for first, *others in ranked if others]
    return sum(right) / len(right) if right else None


def read_score_groups(file: str | None, prompt: str | None, answers: Sequence[str]) -> list[list[Conversation]]:
    """The conversations to score, in groups: the answers of a row of preferences together, the best first. UsageError
    unless a file is given, or a prompt with answers."""
    if file is not None and prompt is None and not answers:
        return [read_conversations_of_row(record) for record in read_records(file)]
    if file is not None or prompt is None or not answers:
        raise UsageError("give a FILE of conversations or preferences, or --prompt with one --answer or more")
    return [
        [Conversation((Message("user", prompt), Message("assistant", answer)), f"--answer {i}")]
        for i, answer in enumerate(answers, 1)
    ]


def read_conversations_of_row(record: Record) -> list[Conversation]:
    """A conversation, or those that a row of preferences makes with each of its answers."""
    if not any(set(form.keys) <= set(record.row) for form in PREFERENCE_FORMS):
        return [parse_conversation(record)]
    row = parse_preference(record)
    return [
        Conversation((*row.question, Message("assistant", answer)), f"{row.where}, answer {number}", tools=row.tools)
        for number, answer in enumerate(row.answers, 1)
    ]
