"""Pretraining, assembled: text -> tokenizer -> model -> next-token loss -> loop -> a run folder.

      run/  config.yaml  env.json  data.json  model.json  tokenizer/  metrics.jsonl  events.jsonl  samples/
checkpoints/  summary.json

The same command again goes on where the folder stands, and ends with the bits of a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_quest.contracts import Callback, Evaluator
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.packing import PackedDocuments
from llm_quest.errors import UsageError
from llm_quest.eval.baselines import compute_baselines
from llm_quest.files import atomic_write_json
from llm_quest.hub.load_save import load, write_model_json
from llm_quest.models.build import build, count_parameters, family_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation_config import GenerationConfig
from llm_quest.objectives.next_token import AuxiliaryLoss
from llm_quest.recipes.auto import resolve_compile, resolve_precision
from llm_quest.recipes.distillation import build_distillation_terms, teacher_hash
from llm_quest.recipes.evaluators import LossEvaluator, TextSampler
from llm_quest.recipes.model_config import build_model_config
from llm_quest.recipes.number_token_loss import number_token_terms
from llm_quest.recipes.pretrain_config import PretrainConfig
from llm_quest.recipes.run import (
    RunOutcome,
    build_lr_schedule,
    build_optimizer,
    finish_run,
    init_distributed,
    make_display,
    micro_batch_rows,
    open_run_dir,
    require_context,
    require_matching_run,
    train_settings,
)
from llm_quest.recipes.techniques import apply_techniques
from llm_quest.recipes.text_data import TextData, load_text_data
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.arguments import TrainResult
from llm_quest.train.logger import Logger
from llm_quest.train.loop import train
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state_dict import derive_seed

LogFn = Callable[[str], None]

MAX_BASELINE_BYTES = 20_000_000


def train_pretrain(
    config: PretrainConfig,
    settings: RawConfig,
    folder: Path,
    *,
    resume: str = "auto",
    env: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    log: LogFn = print,
) -> RunOutcome:
    """Run the recipe in a folder. settings: where each key was written, for messages. env: what machine this is.
    callbacks: of whoever assembles more than this (the tour interrupts itself). Every process of a torchrun calls
    this."""
    with init_distributed(config, config.batch_size) as parallel:
        return run_pretrain(
            config,
            settings,
            folder,
            parallel,
            resume=resume,
            env=dict(env or {}),
            callbacks=callbacks,
            display=make_display(config, folder, parallel, quiet),
            log=log if parallel.is_main_process else lambda text: None,
        )


def run_pretrain(
    config: PretrainConfig,
    settings: RawConfig,
    folder: Path,
    parallel: DistributedContext,
    *,
    resume: str,
    env: Mapping[str, Any],
    callbacks: Sequence[Callback],
    display: Logger,
    log: LogFn,
) -> RunOutcome:
    """The recipe itself."""
    text = load_text_data(config.data, config.tokenizer, parallel, log)
    model = init_pretrain_model(config, settings, text)
    technique_callbacks = apply_techniques(config.all_techniques, model, log)
    config = resolve_pretrain_config(config, model, parallel, log)
    require_matching_run(config, folder)
    distillation_terms = build_distillation_terms(config, text.tokenizer, model.config.vocab_size, parallel, log)
    terms: list[AuxiliaryLoss] = [
        *number_token_terms(config.number_token_loss, text.tokenizer, model),
        *distillation_terms,
    ]
    objective = parallel.parallelize(config.auxiliary_losses.build_objective(model, terms), list(model.blocks))
    micro_rows, loader = (
        micro_batch_rows(config.batch_size, config.micro_batch_size, parallel, config.sequence_length),
        pretrain_loader(config, text, parallel),
    )
    identity = {"tokenizer": text.tokenizer.hash, "data": text.tokens.train.hash, **teacher_hash(distillation_terms)}
    random_first = config.model.load is None and not distillation_terms
    with open_run_dir(config, folder, parallel, identity, env, resume) as run:
        if parallel.is_main_process:
            write_run_metadata(folder, model, text)
        result = train(
            objective,
            loader,
            build_optimizer(config, model),
            build_lr_schedule(config),
            train_settings(config, expected_loss=config.auxiliary_losses.initial_loss(model) if random_first else None),
            run,
            parallel=parallel,
            evaluators=list(build_evaluators(config, text, run, micro_rows)),
            callbacks=[*config.auxiliary_losses.build_callbacks(), *technique_callbacks, *callbacks],
            logger=display,
        )
        return finish_pretrain(config, folder, model, text, result, parallel, log)


def pretrain_loader(
    config: PretrainConfig, text: TextData, parallel: DistributedContext
) -> ShardedLoader[PackedDocuments]:
    """This process's rows."""
    return ShardedLoader(
        PackedDocuments(text.tokens.train, config.sequence_length),
        batch_size=config.batch_size,
        micro_batch_size=micro_batch_rows(config.batch_size, config.micro_batch_size, parallel, config.sequence_length),
        seed=derive_seed(config.seed, "order"),
        shard=parallel.data_shard,
    )


def init_pretrain_model(config: PretrainConfig, settings: RawConfig, text: TextData) -> Decoder:
    """The model before the first step: loaded, or built with first values from its own stream of chance."""
    if config.model.load is not None:
        model = load(config.model.load, dtype="float32", aligned=True)
        if model.config.vocab_size < text.tokenizer.vocab_size:
            raise UsageError(
                f"{config.model.load} knows {model.config.vocab_size} tokens, its tokenizer "
                f"{text.tokenizer.vocab_size}; set tokenizer.load={config.model.load}"
            )
    else:
        numbers = build_model_config(
            config.model, settings, vocab=text.tokenizer.vocab_size, context=config.sequence_length
        )
        model = build(numbers, seed=derive_seed(config.seed, "init"))
    require_context(config.sequence_length, model.config.max_position_embeddings)
    model.generation_config = GenerationConfig(
        bos_token_id=text.tokenizer.bos_token_id,
        eos_token_ids=tuple(text.tokenizer.eos_token_ids),
        pad_token_id=text.tokenizer.pad_token_id,
    )
    return model


def resolve_pretrain_config(
    config: PretrainConfig, model: Decoder, parallel: DistributedContext, log: LogFn
) -> PretrainConfig:
    """The config with what `auto` means here written out, and said why."""
    parameters = count_parameters(model)
    flops = 6.0 * parameters * config.batch_size * config.sequence_length * config.max_steps / parallel.world_size
    number = resolve_precision(config.precision, parallel.device)
    graph = resolve_compile(config.compile, parallel.device, flops)
    log(
        f"model: {family_of(model.config).name}-style, {parameters:,} parameters, on {parallel.device}"
        + describe_processes(parallel)
    )
    log(f"precision: {number.value} ({number.reason}); compiled: {'yes' if graph.value else 'no'} ({graph.reason})")
    parts = vars(config.auxiliary_losses.resolve(model))
    return config.model_copy(update={"precision": number.value, "compile": graph.value, **parts})


def describe_processes(parallel: DistributedContext) -> str:
    return f", {parallel.world_size} processes by {parallel.strategy}" if parallel.world_size > 1 else ""


def build_evaluators(config: PretrainConfig, text: TextData, run: RunDir, micro_rows: int) -> Iterator[Evaluator]:
    """Held-out loss and samples, as often as asked."""
    if text.tokens.val.num_documents:
        yield LossEvaluator(
            text.tokens.val,
            every=config.eval_steps,
            max_tokens=config.eval_tokens,
            last_step=config.max_steps,
            length=config.sequence_length,
            micro_rows=micro_rows,
        )
    if config.samples.every_steps and config.samples.prompts:
        part = config.samples
        keeps = run.samples if run.is_main_process else None
        yield TextSampler(
            text.tokenizer,
            keeps,
            part.prompts,
            part.every_steps,
            part.max_new_tokens,
            part.temperature,
            derive_seed(config.seed, "sampling"),
        )


def write_run_metadata(folder: Path, model: Decoder, text: TextData) -> None:
    """What generating, exporting and the report need beside the checkpoints."""
    write_model_json(folder, model)
    text.tokenizer.save(folder / "tokenizer", model_max_length=model.config.max_position_embeddings)
    atomic_write_json(folder / "data.json", text.facts)


def finish_pretrain(
    config: PretrainConfig,
    folder: Path,
    model: Decoder,
    text: TextData,
    result: TrainResult,
    parallel: DistributedContext,
    log: LogFn,
) -> RunOutcome:
    """The outcome; a finished run is set beside what counting and compressing reach on the same held-out bytes."""
    wanted = result.status == "finished" and parallel.is_main_process and config.eval_baselines
    others = baseline_bits_per_byte(text, log) if wanted else {}
    return finish_run(
        config, folder, result, count_parameters(model), leader=parallel.is_main_process, baselines=others
    )


def baseline_bits_per_byte(text: TextData, log: LogFn) -> dict[str, float]:
    """Bits per byte of the baselines, where the documents are at hand and few enough to count."""
    parts = text.split
    if parts is None or not parts.val or parts.corpus.nbytes > MAX_BASELINE_BYTES:
        return {}
    log("counting and compressing the same text, to compare")
    return {one.name: one.bits_per_byte for one in compute_baselines(parts.train, parts.val, tokenizer=text.tokenizer)}
