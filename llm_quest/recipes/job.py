"""What the recipes have in common that go on from a model: it is opened with its tokenizer, conversations are read and
held apart, and the loop runs in a run folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from llm_quest.contracts import Callback, Evaluator, Loader, MetricsCallback
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.documents import DropReport
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError
from llm_quest.files import atomic_write_json
from llm_quest.hub.load_save import load, load_tokenizer, write_model_json
from llm_quest.models.build import count_parameters, family_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation_config import GenerationConfig
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.run import (
    RunOutcome,
    build_lr_schedule,
    build_optimizer,
    finish_run,
    make_display,
    open_run_dir,
    require_matching_run,
    require_run_exists,
    train_settings,
)
from llm_quest.recipes.techniques import apply_techniques
from llm_quest.recipes.tuning_config import ConversationDataConfig, StartModelConfig
from llm_quest.train.loop import train
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class TrainingJob:
    """What a recipe has assembled. make_evaluators: made when the run folder is there. facts: what the report tells
    about the data. identity: name -> hash of what a run may not change. prepare_whole_model: the work to be done while
    the model is whole; what it returns is called with the run folder, once that is there."""

    objective: nn.Module
    loader: Loader
    make_evaluators: Callable[[RunDir], Sequence[Evaluator]]
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    identity: Mapping[str, str]
    callbacks: Sequence[Callback] = field(default=())
    prepare_whole_model: Callable[[], Callable[[Path], None]] = lambda: lambda folder: None
    watchers: Sequence[MetricsCallback] = field(default=())

    @property
    def model(self) -> Any:
        return self.objective.model


def load_for_finetuning(config: StartModelConfig) -> tuple[Decoder, Tokenizer]:
    """The model in float32, ready to be trained, and its tokenizer."""
    made = "quest quickstart" if config.load.endswith("quickstart") else f"quest train sft --out {config.load}"
    require_run_exists(config.load, "model.load", made)
    model = load(config.load, dtype="float32", aligned=True)
    if not isinstance(model, Decoder):
        raise UsageError(f"model.load must name a language model; {config.load} is a {family_of(model.config).name}")
    tokenizer = load_tokenizer(config.load)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{config.load} knows {model.config.vocab_size} tokens and its tokenizer has {tokenizer.vocab_size}"
        )
    return model, tokenizer


def read_chat_template(config: ConversationDataConfig) -> str | None:
    """The text of the template file, where one is named."""
    if config.chat_template_path is None:
        return None
    try:
        return Path(config.chat_template_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.chat_template_path {config.chat_template_path} cannot be read: {error}") from None


def set_generation_eos(model: Decoder, tokenizer: Tokenizer, ends: Iterable[int]) -> None:
    """The model's own files say what ends an answer: the tokens that did in training, and the tokenizer's ends."""
    known = {int(end) for end in ends} | set(tokenizer.eos_token_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_ids=tuple(sorted(known)), pad_token_id=tokenizer.pad_token_id
    )


def data_facts(
    config: ConversationDataConfig, chat: ChatTemplate, drop_report: DropReport, train: int, held_out: int, log: LogFn
) -> dict[str, Any]:
    """What the report tells about the rows, and a line for the screen."""
    dropped = {reason: count for reason, (count, _) in sorted(drop_report.dropped.items())}
    lost = "".join(f"; dropped, {reason}: {count:,}" for reason, count in dropped.items())
    log(f"rows: {train:,} to train on, {held_out:,} held out{lost}")
    for note in drop_report.notes:
        log(note)
    facts = {"source": config.source, "train_rows": train, "held_out_rows": held_out, "dropped": dropped}
    facts |= {"notes": list(drop_report.notes), "chat_template": chat.template, "tokenizer_sha256": chat.tokenizer.hash}
    return facts | ({"python": platform.python_version()} if config.source == "builtin" else {})


def run_job(
    job: TrainingJob, config: RunConfig, folder: Path, resume: str, env: Mapping[str, Any], quiet: bool, log: LogFn,
    parallel: DistributedContext,
) -> RunOutcome:  # fmt: skip
    """The loop over an assembled job, in a run folder."""
    chosen = resolve_precision(config.precision, parallel.device)
    config = config.model_copy(update={"precision": chosen.value, "compile": config.compile is True})
    parameters = count_parameters(job.model)
    log(f"model: {family_of(job.model.config).name}-style, {parameters:,} parameters, on {parallel.device}")
    log(f"precision: {chosen.value} ({chosen.reason}); compiled: {'yes' if config.compile else 'no'}")
    require_matching_run(config, folder)
    keep = job.prepare_whole_model()
    parallel.parallelize(job.objective, list(job.model.blocks))
    identity = {"tokenizer": job.tokenizer.hash, **job.identity}
    with open_run_dir(config, folder, parallel, identity, env, resume) as run:
        if parallel.is_main_process:
            write_model_json(folder, job.model)
            job.tokenizer.save(folder / "tokenizer", model_max_length=job.model.config.max_position_embeddings)
            atomic_write_json(folder / "data.json", dict(job.facts))
            keep(folder)
        result = train(
            job.objective,
            job.loader,
            build_optimizer(config, job.model),
            build_lr_schedule(config),
            train_settings(config),
            run,
            parallel=parallel,
            callbacks=job.callbacks,
            evaluators=job.make_evaluators(run),
            watchers=job.watchers,
            logger=make_display(config, folder, parallel, quiet),
        )
    return finish_run(config, folder, result, parameters, leader=parallel.is_main_process)


def can_share_prompts(config: RunConfig) -> bool:
    """May rows share a beginning? It is read into a cache, in which a checkpointed block must not file twice, and whose
    shapes a compiled step would follow with ever new graphs."""
    return config.compile is not True and all(one["name"] != "checkpointing" for one in config.all_techniques)


def apply_config_techniques(config: RunConfig, model: Decoder, log: LogFn) -> list[Callback]:
    """The recipe's techniques, applied; those that ride along."""
    return apply_techniques(config.all_techniques, model, log)
