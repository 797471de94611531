"""`quest train sft`: conversations -> a model that answers. The loss is of the answers alone, each with its end; whole
conversations share rows and do not see one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quest.data.chat import Chat
from llm_quest.data.conversations import Conversation, conversations, held_apart
from llm_quest.data.documents import Ledger
from llm_quest.data.instructions import InstructionFeed, Rows, fitting
from llm_quest.data.questions import answers, rows
from llm_quest.generation.generate import generate
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import Beside, NextToken
from llm_quest.recipes.course import Outcome, company, micro_rows_of
from llm_quest.recipes.numbers import beside
from llm_quest.recipes.probes import keep_samples
from llm_quest.recipes.teaching import taught, teachers_hash
from llm_quest.recipes.tuning import (
    Job,
    Say,
    carried_out,
    edited,
    opened,
    remember_ends,
    require_room,
    template_of,
    told,
)
from llm_quest.recipes.tuning_config import Said, Sft
from llm_quest.recipes.yaml import Settings
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.state import derive_seed


def train_sft(
    config: Sft, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with company(config, config.batch.rows) as parallel:
        tell = say if parallel.leader else lambda text: None
        return carried_out(assembled(config, parallel, tell), config, out, resume, env or {}, quiet, tell, parallel)


def assembled(config: Sft, parallel: Parallel, say: Say) -> Job:
    """Model, conversations, objective and feed."""
    model, tokenizer = opened(config.model)
    require_room(config.batch.length, model)
    talk = prepared(config.data, Chat(tokenizer, template_of(config.data)), config.batch.length)
    remember_ends(model, tokenizer, (one.ids[one.last[1] - 1] for one in talk.train.examples))
    micro_rows = micro_rows_of(config.batch, parallel, config.batch.length)
    feed = InstructionFeed(
        talk.train,
        rows=config.batch.rows,
        micro_rows=micro_rows,
        seed=derive_seed(config.seed, "order"),
        share=parallel.share,
    )
    facts = told(config.data, talk.chat, talk.ledger, len(talk.train.examples), len(talk.held.examples), say)
    say(f"learned: {talk.train.num_targets:,} tokens of answers, in {len(talk.train):,} rows an epoch")

    lessons = taught(config, tokenizer, model.config.vocab, parallel, say)
    terms: list[Beside] = [*beside(config.number_token, tokenizer, model), *lessons]

    def probes(run: Run) -> list[Any]:
        asked = [Answering(talk, config.samples.number, config, run)] if config.samples.every else []
        return [AnswerLoss(talk.held, config.evaluate.every, micro_rows), *asked]

    return Job(
        NextToken(model, beside=terms), feed, probes, tokenizer, facts,
        {"data": talk.train.hash, **teachers_hash(lessons)}, edited(config, model, say),
    )  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """Conversations as rows of ids. questions: the held-out ones, as they were said."""

    chat: Chat
    train: Rows
    held: Rows
    questions: Sequence[Conversation]
    ledger: Ledger


def prepared(part: Said, chat: Chat, length: int) -> Talk:
    """From a source to rows; what is left out is in the ledger."""
    ledger = Ledger()
    said = conversations(rows(part.source, answers)[: part.limit], ledger)
    train, held = held_apart(said, part.held_out)
    learned, looked_at = (Rows(fitting(chat.examples(side), length, ledger), length) for side in (train, held))
    return Talk(chat, learned, looked_at, held, ledger)


class AnswerLoss:
    """loss in nats per token of held-out answers, and its perplexity."""

    name = "eval"

    def __init__(self, held: Rows, every: int, micro_rows: int):
        self.held, self.every, self.micro_rows = held, every, micro_rows

    @torch.no_grad()
    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        objective, device, nats = NextToken(model), next(model.parameters()).device, 0.0
        for first in range(0, len(self.held), self.micro_rows):
            batch = self.held.batch(range(first, min(first + self.micro_rows, len(self.held))))
            nats += float(objective(batch.to(device)).total)
        loss = nats / self.held.num_targets
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class Answering:
    """Answers to the first held-out questions: samples/step-00000100.json."""

    name = "samples"

    def __init__(self, talk: Talk, number: int, config: Sft, run: Run):
        self.every, self.part, self.tokenizer = config.samples.every, config.samples, talk.chat.tokenizer
        self.folder = run.samples if run.leader else None
        self.seed = derive_seed(config.seed, "sampling")
        self.questions = list(talk.questions[:number])
        self.prompts = talk.chat.prompts([one.prompt for one in self.questions])

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        """Every process answers (parts of the model may lie on each); only one with a folder keeps it."""
        room = model.config.context
        asked = [(one, ids) for one, ids in zip(self.questions, self.prompts, strict=True) if len(ids) < room]
        done = generate(
            model,
            [ids for _, ids in asked],
            max_new_tokens=self.part.tokens,
            temperature=self.part.temperature,
            seed=self.seed,
            tokenizer=self.tokenizer,
        )
        if self.folder is not None:
            told = [
                {"prompt": one.prompt[-1]["content"], "text": written.text, "wanted": one.answer}
                for (one, _), written in zip(asked, done, strict=True)
            ]
            keep_samples(self.folder, step, told)
        return {}
