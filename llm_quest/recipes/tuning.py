"""What the recipes have in common that go on from a model: it is opened with its tokenizer, conversations are read and
held apart, and the loop runs in a run folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from llm_quest.contracts import Callback, Feed, Probe, Watcher
from llm_quest.data.chat import Chat
from llm_quest.data.documents import Ledger
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.disk import replace_json
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.files import load, load_tokenizer, write_model_json
from llm_quest.models.build import count_parameters, page_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import (
    Outcome,
    ended,
    folder_of,
    loop_settings,
    optimizer,
    require_context,
    require_run,
    require_same_run,
    shown,
)
from llm_quest.recipes.parts import Course
from llm_quest.recipes.techniques import applied_all
from llm_quest.recipes.tuning_config import Said, Start
from llm_quest.train.loop import train
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.schedule import schedule

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a recipe has assembled. probes: made when the run folder is there. facts: what the report tells about the
    data. identity: name -> hash of what a run may not change. before: the work to be done while the model is whole;
    what it returns is called with the run folder, once that is there."""

    objective: nn.Module
    feed: Feed
    probes: Callable[[Run], Sequence[Probe]]
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    identity: Mapping[str, str]
    callbacks: Sequence[Callback] = field(default=())
    before: Callable[[], Callable[[Path], None]] = lambda: lambda folder: None
    watchers: Sequence[Watcher] = field(default=())

    @property
    def model(self) -> Any:
        return self.objective.model


def opened(part: Start) -> tuple[Decoder, Tokenizer]:
    """The model in float32, ready to be trained, and its tokenizer."""
    made = "quest quickstart" if part.load.endswith("quickstart") else f"quest train sft --out {part.load}"
    require_run(part.load, "model.load", made)
    model = load(part.load, dtype="float32", aligned=True)
    if not isinstance(model, Decoder):
        raise UsageError(f"model.load must name a language model; {part.load} is a {page_of(model.config).name}")
    tokenizer = load_tokenizer(part.load)
    if tokenizer.vocab_size > model.config.vocab:
        raise DataError(f"{part.load} knows {model.config.vocab} tokens and its tokenizer has {tokenizer.vocab_size}")
    return model, tokenizer


def template_of(part: Said) -> str | None:
    """The text of the template file, where one is named."""
    if part.template is None:
        return None
    try:
        return Path(part.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.template {part.template} cannot be read: {error}") from None


def require_room(length: int, model: Decoder) -> None:
    """Rows no longer than what the model can see."""
    require_context(length, model.config.context)


def remember_ends(model: Decoder, tokenizer: Tokenizer, ends: Iterable[int]) -> None:
    """The model's own files say what ends an answer: the tokens that did in training, and the tokenizer's ends."""
    known = {int(end) for end in ends} | set(tokenizer.eos_ids)
    model.generation = GenerationDefaults(bos=tokenizer.bos_id, eos=tuple(sorted(known)), pad=tokenizer.pad_id)


def told(part: Said, chat: Chat, ledger: Ledger, train: int, held: int, say: Say) -> dict[str, Any]:
    """What the report tells about the rows, and a line for the screen."""
    dropped = {reason: count for reason, (count, _) in sorted(ledger.dropped.items())}
    lost = "".join(f"; dropped, {reason}: {count:,}" for reason, count in dropped.items())
    say(f"rows: {train:,} to train on, {held:,} held out{lost}")
    for note in ledger.notes:
        say(note)
    facts = {"source": part.source, "train_rows": train, "held_out_rows": held, "dropped": dropped}
    facts |= {"notes": list(ledger.notes), "chat_template": chat.template, "tokenizer_sha256": chat.tokenizer.hash}
    return facts | ({"python": platform.python_version()} if part.source == "builtin" else {})


def carried_out(
    job: Job, config: Course, folder: Path, resume: str, env: Mapping[str, Any], quiet: bool, say: Say,
    parallel: Parallel,
) -> Outcome:  # fmt: skip
    """The loop over an assembled job, in a run folder."""
    chosen = precision(config.precision, parallel.device)
    config = config.model_copy(update={"precision": chosen.value, "compile": config.compile is True})
    parameters = count_parameters(job.model)
    say(f"model: {page_of(job.model.config).name}-style, {parameters:,} parameters, on {parallel.device}")
    say(f"precision: {chosen.value} ({chosen.why}); compiled: {'yes' if config.compile else 'no'}")
    require_same_run(config, folder)
    keep = job.before()
    parallel.place(job.objective, list(job.model.blocks))
    identity = {"tokenizer": job.tokenizer.hash, **job.identity}
    with folder_of(config, folder, parallel, identity, env, resume) as run:
        if parallel.leader:
            write_model_json(folder, job.model)
            job.tokenizer.save(folder / "tokenizer", model_max_length=job.model.config.context)
            replace_json(folder / "data.json", dict(job.facts))
            keep(folder)
        result = train(
            job.objective,
            job.feed,
            optimizer(config.optimizer, job.model),
            schedule(config.steps, **config.schedule.model_dump()),
            loop_settings(config),
            run,
            parallel=parallel,
            callbacks=job.callbacks,
            probes=job.probes(run),
            watchers=job.watchers,
            display=shown(config, folder, parallel, quiet),
        )
    return ended(config, folder, result, parameters, leader=parallel.leader)


def may_share(config: Course) -> bool:
    """May rows share a beginning? It is read into a cache, in which a checkpointed block must not file twice, and whose
    shapes a compiled step would follow with ever new graphs."""
    return config.compile is not True and all(one["name"] != "checkpointing" for one in config.techniques)


def edited(config: Course, model: Decoder, say: Say) -> list[Callback]:
    """The recipe's techniques, applied; those that ride along."""
    return applied_all(config.techniques, model, say)
