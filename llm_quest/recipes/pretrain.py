"""Pretraining, assembled: text -> tokenizer -> model -> next-token loss -> loop -> a run folder.

      run/  config.yaml  env.json  data.json  model.json  tokenizer/  metrics.jsonl  events.jsonl  samples/
checkpoints/  summary.json

The same command again goes on where the folder stands, and ends with the bits of a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_quest.contracts import Callback, Probe
from llm_quest.data.baselines import baselines
from llm_quest.data.packing import PackedFeed
from llm_quest.disk import replace_json
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, write_model_json
from llm_quest.models.build import build, count_parameters, page_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.objectives.next_token import Beside
from llm_quest.recipes.choices import compiling, precision
from llm_quest.recipes.course import (
    Outcome,
    company,
    ended,
    folder_of,
    loop_settings,
    micro_rows_of,
    optimizer,
    require_context,
    require_same_run,
    shown,
)
from llm_quest.recipes.numbers import beside
from llm_quest.recipes.pretrain_config import Pretrain
from llm_quest.recipes.probes import Evaluation, Writing
from llm_quest.recipes.sizes import model_config
from llm_quest.recipes.teaching import taught, teachers_hash
from llm_quest.recipes.techniques import applied_all
from llm_quest.recipes.text import Text, ready
from llm_quest.recipes.yaml import Settings
from llm_quest.techniques.checkpointing import Checkpointing
from llm_quest.train.log import Display
from llm_quest.train.loop import train
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Result
from llm_quest.train.state import derive_seed

Say = Callable[[str], None]

BASELINES_UP_TO = 20_000_000


def pretrain(
    config: Pretrain,
    settings: Settings,
    folder: Path,
    *,
    resume: str = "auto",
    env: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    say: Say = print,
) -> Outcome:
    """Run the recipe in a folder. settings: where each key was written, for messages. env: what machine this is.
    callbacks: of whoever assembles more than this (the tour interrupts itself). Every process of a torchrun calls
    this."""
    with company(config, config.batch.rows) as parallel:
        return run_it(
            config,
            settings,
            folder,
            parallel,
            resume=resume,
            env=dict(env or {}),
            callbacks=callbacks,
            screen=shown(config, folder, parallel, quiet),
            say=say if parallel.leader else lambda text: None,
        )


def run_it(
    config: Pretrain,
    settings: Settings,
    folder: Path,
    parallel: Parallel,
    *,
    resume: str,
    env: Mapping[str, Any],
    callbacks: Sequence[Callback],
    screen: Display,
    say: Say,
) -> Outcome:
    """The recipe itself."""
    text = ready(config.data, config.tokenizer, parallel, say)
    model = first_model(config, settings, text)
    riding = applied_all(config.techniques, model, say)
    config = decided(config, model, parallel, say)
    require_same_run(config, folder)
    if config.activation_checkpointing:
        model = Checkpointing()(model)
    lessons = taught(config, text.tokenizer, model.config.vocab, parallel, say)
    terms: list[Beside] = [*beside(config.number_token, text.tokenizer, model), *lessons]
    objective = parallel.place(config.parts.objective(model, terms), list(model.blocks))
    micro_rows, feed = micro_rows_of(config.batch, parallel, config.batch.length), feed_of(config, text, parallel)
    identity = {"tokenizer": text.tokenizer.hash, "data": text.folder.train.hash, **teachers_hash(lessons)}
    random_first = config.model.load is None and not lessons
    with folder_of(config, folder, parallel, identity, env, resume) as run:
        if parallel.leader:
            describe(folder, model, text)
        result = train(
            objective,
            feed,
            optimizer(config.optimizer, model),
            schedule(config.steps, **config.schedule.model_dump()),
            loop_settings(config, expected_loss=config.parts.first_loss(model) if random_first else None),
            run,
            parallel=parallel,
            probes=list(probes(config, text, run, micro_rows)),
            callbacks=[*config.parts.callbacks(), *riding, *callbacks],
            display=screen,
        )
        return concluded(config, folder, model, text, result, parallel, say)


def feed_of(config: Pretrain, text: Text, parallel: Parallel) -> PackedFeed:
    """This process's rows."""
    return PackedFeed(
        text.folder.train,
        length=config.batch.length,
        rows=config.batch.rows,
        micro_rows=micro_rows_of(config.batch, parallel, config.batch.length),
        seed=derive_seed(config.seed, "order"),
        share=parallel.share,
    )


def first_model(config: Pretrain, settings: Settings, text: Text) -> Decoder:
    """The model before the first step: loaded, or built with first values from its own stream of chance."""
    if config.model.load is not None:
        model = load(config.model.load, dtype="float32", aligned=True)
        if model.config.vocab < text.tokenizer.vocab_size:
            raise UsageError(
                f"{config.model.load} knows {model.config.vocab} tokens, its tokenizer {text.tokenizer.vocab_size}; "
                f"set tokenizer.load={config.model.load}"
            )
    else:
        numbers = model_config(config.model, settings, vocab=text.tokenizer.vocab_size, context=config.batch.length)
        model = build(numbers, seed=derive_seed(config.seed, "init"))
    require_context(config.batch.length, model.config.context)
    model.generation = GenerationDefaults(
        bos=text.tokenizer.bos_id, eos=tuple(text.tokenizer.eos_ids), pad=text.tokenizer.pad_id
    )
    return model


def decided(config: Pretrain, model: Decoder, parallel: Parallel, say: Say) -> Pretrain:
    """The config with what `auto` means here written out, and said why."""
    parameters = count_parameters(model)
    flops = 6.0 * parameters * config.batch.rows * config.batch.length * config.steps / parallel.world
    number = precision(config.precision, parallel.device)
    graph = compiling(config.compile, parallel.device, flops)
    say(f"model: {page_of(model.config).name}-style, {parameters:,} parameters, on {parallel.device}" + ranks(parallel))
    say(f"precision: {number.value} ({number.why}); compiled: {'yes' if graph.value else 'no'} ({graph.why})")
    parts = vars(config.parts.decided(model))
    return config.model_copy(update={"precision": number.value, "compile": graph.value, **parts})


def ranks(parallel: Parallel) -> str:
    return f", {parallel.world} processes by {parallel.kind}" if parallel.world > 1 else ""


def probes(config: Pretrain, text: Text, run: Run, micro_rows: int) -> Iterator[Probe]:
    """Held-out loss and samples, as often as asked."""
    if text.folder.val.num_documents:
        yield Evaluation(
            text.folder.val,
            every=config.evaluate.every,
            limit=config.evaluate.tokens,
            last=config.steps,
            length=config.batch.length,
            micro_rows=micro_rows,
        )
    if config.samples.every and config.samples.prompts:
        part = config.samples
        keeps = run.samples if run.leader else None
        yield Writing(
            text.tokenizer,
            keeps,
            part.prompts,
            part.every,
            part.tokens,
            part.temperature,
            derive_seed(config.seed, "sampling"),
        )


def describe(folder: Path, model: Decoder, text: Text) -> None:
    """What generating, exporting and the report need beside the checkpoints."""
    write_model_json(folder, model)
    text.tokenizer.save(folder / "tokenizer", model_max_length=model.config.context)
    replace_json(folder / "data.json", text.facts)


def concluded(
    config: Pretrain, folder: Path, model: Decoder, text: Text, result: Result, parallel: Parallel, say: Say
) -> Outcome:
    """The outcome; a finished run is set beside what counting and compressing reach on the same held-out bytes."""
    wanted = result.status == "finished" and parallel.leader and config.evaluate.baselines
    others = compared(text, say) if wanted else {}
    return ended(config, folder, result, count_parameters(model), leader=parallel.leader, baselines=others)


def compared(text: Text, say: Say) -> dict[str, float]:
    """Bits per byte of the baselines, where the documents are at hand and few enough to count."""
    parts = text.parts
    if parts is None or not parts.val or parts.corpus.nbytes > BASELINES_UP_TO:
        return {}
    say("counting and compressing the same text, to compare")
    return {one.name: one.bits_per_byte for one in baselines(parts.train, parts.val, tokenizer=text.tokenizer)}
