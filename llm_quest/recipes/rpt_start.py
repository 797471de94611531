"""The model that RPT begins with, and the proxy that says where it is worth thinking.

A fresh model first learns the documents by their next tokens (`base/`), then from a teacher's thoughts about a few of
them in which form to think (`warmup/`); the proxy is the model between the two."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from llm_quest.data.problems import spelled
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole import WholeFeed
from llm_quest.data.worked import ThinkingFeed, as_document, worked_tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.policy import Say, writer_of
from llm_quest.recipes.rpt_config import Rpt, Schooling
from llm_quest.recipes.rpt_text import problems_of
from llm_quest.recipes.tuning import opened
from llm_quest.recipes.tuning_config import Start
from llm_quest.recipes.warmup import PROBLEMS, SAMPLES, Pace, newborn, schooled
from llm_quest.recipes.yaml import Settings
from llm_quest.rollouts.foretelling import asking_of
from llm_quest.rollouts.prefix_match import PrefixMatch
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed


@dataclass(frozen=True)
class Begun:
    """On the device, in float32."""

    model: Decoder
    tokenizer: Tokenizer
    proxy: Decoder


def start_of(config: Rpt, out: Path) -> str:
    """Where `load` finds the model that the run in this folder began with."""
    return config.model.load or str(out / "warmup")


def begun(config: Rpt, settings: Settings, out: Path, parallel: Parallel, say: Say) -> Begun:
    """Loaded, or made; on the device."""
    if config.model.load is not None:
        model, tokenizer = opened(Start(load=config.model.load))
        proxy = model
    else:
        model, tokenizer, proxy = made(config, settings, out, parallel, say)
    if config.select.proxy is not None:
        proxy = load(config.select.proxy, dtype="float32", aligned=True)
        if load_tokenizer(config.select.proxy).hash != tokenizer.hash:
            raise UsageError(
                f"the proxy {config.select.proxy} has another tokenizer than the model: it reads other ids"
            )
    proxy = copy.deepcopy(proxy) if proxy is model else proxy
    return Begun(model.to(parallel.device), tokenizer, proxy.to(parallel.device).eval())


def made(
    config: Rpt, settings: Settings, out: Path, parallel: Parallel, say: Say
) -> tuple[Decoder, Tokenizer, Decoder]:
    """A fresh model that reads and thinks, its tokenizer, and a copy that only reads."""
    assert config.schooling is not None
    part = config.schooling
    tokenizer = worked_tokenizer(spelled(config.data.source))
    model = newborn(config.model, settings, tokenizer, config.seed)
    train, _ = problems_of(config.data, config.seed)
    documents = [as_document(problem, tokenizer) for problem in train]
    reading = WholeFeed(documents, rows=part.read.rows, seed=derive_seed(config.seed, "reading"))
    pace = Pace(part.read.steps, part.read.lr)
    schooled(config, model, tokenizer, reading, pace, out / "base", parallel, say)
    say(f"read: {part.read.steps} steps on {len(documents):,} documents")
    proxy = copy.deepcopy(model)
    thinks(config, part, model, tokenizer, out / "warmup", parallel, say)
    return model, tokenizer, proxy


def thinks(
    config: Rpt, part: Schooling, model: Decoder, tokenizer: Tokenizer, folder: Path, parallel: Parallel, say: Say
) -> None:
    """The model sees a teacher think, until that helps it now and then on held-out documents."""
    task, (train, held) = spelled(config.data.source), problems_of(config.data, config.seed)
    feed = ThinkingFeed(
        task, train, tokenizer, examples=part.think.examples, rows=part.think.rows,
        seed=derive_seed(config.seed, "demonstrations"),
    )  # fmt: skip
    some = [as_document(problem, tokenizer) for problem in held[:PROBLEMS]]
    ends = [len(ids) - 1 - len(problem.answer) for ids, problem in zip(some, held, strict=False)]
    asking = asking_of(tokenizer, some, before=config.ask.before, after=config.ask.after, ahead=config.ask.ahead)
    asked = [asking.question(ids, end) for ids, end in zip(some, ends, strict=True)]
    reward, writer = PrefixMatch(config.ask.opening), writer_of(config, model, tokenizer, parallel)

    def share() -> float:
        values = [value for group in writer(model, asked, SAMPLES, config.seed) for value in reward(group)]
        return sum(values) / len(values)

    pace = Pace(part.think.steps, part.think.lr, part.think.until, share)
    step, reached = schooled(config, model, tokenizer, feed, pace, folder, parallel, say)
    say(f"warm-up: {step} steps on {len(feed.problems)} thoughts; {reached:.0%} of sampled answers are right")
