"""Pretraining, assembled: text -> tokenizer -> model -> next-token loss -> loop -> a run folder.

      run/  config.yaml  env.json  data.json  model.json  tokenizer/  metrics.jsonl  events.jsonl  samples/
checkpoints/  summary.json

The same command again goes on where the folder stands, and ends with the bits of a run that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm_quest.contracts import Callback, Probe
from llm_quest.data.baselines import baselines
from llm_quest.data.packing import PackedFeed
from llm_quest.disk import replace_json
from llm_quest.errors import BusyError, UsageError
from llm_quest.hub.files import load, write_model_json
from llm_quest.models.build import build, count_parameters, page_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.objectives.next_token import NextToken
from llm_quest.recipes import seeds
from llm_quest.recipes.choices import compiling, precision
from llm_quest.recipes.config import as_yaml, differences, gather, resolve
from llm_quest.recipes.parts import Optimizer as OptimizerPart
from llm_quest.recipes.pretrain_config import FREE, PRECISIONS, Pretrain
from llm_quest.recipes.probes import Evaluation, Writing
from llm_quest.recipes.sizes import model_config
from llm_quest.recipes.text import Text, ready
from llm_quest.recipes.yaml import Settings
from llm_quest.train.checkpoint import listed
from llm_quest.train.log import Board, Display, display
from llm_quest.train.loop import train
from llm_quest.train.optimizers import adamw, muon
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run, finite
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Result
from llm_quest.train.settings import Settings as LoopSettings

Say = Callable[[str], None]

AT_ONCE = 8192
BASELINES_UP_TO = 20_000_000


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what it reached."""

    run: str
    status: str
    step: int
    steps: int
    exit_code: int
    parameters: int
    seconds: float
    tokens_per_second: float
    metrics: Mapping[str, Any]
    baselines: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For the screen."""
        told = [f"{self.status} at step {self.step} of {self.steps}, {self.parameters:,} parameters: {self.run}"]
        reached = self.metrics.get("eval/bits_per_byte")
        if reached is not None:
            told.append(
                f"held-out bits per byte: {reached:.3f}"
                + "".join(f"; {name} {bpb:.3f}" for name, bpb in self.baselines.items())
            )
        if self.status != "finished":
            told.append(f"go on with: quest train {self.run}")
        return told


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
    if config.threads:
        torch.set_num_threads(config.threads)
    parallel = Parallel.from_environment(config.device, config.parallel)
    try:
        told = say if parallel.leader else lambda text: None
        screen = shown(config, folder, parallel, quiet)
        return run_it(
            config,
            settings,
            folder,
            parallel,
            resume=resume,
            env=dict(env or {}),
            callbacks=callbacks,
            screen=screen,
            say=told,
        )
    finally:
        parallel.close()


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
    require_share(config, parallel)
    text = ready(config.data, config.tokenizer, parallel, say)
    model = first_model(config, settings, text)
    config = decided(config, model, parallel, say)
    require_same_run(config, folder)
    if config.activation_checkpointing:
        recompute(model)
    objective = parallel.place(NextToken(model), list(model.blocks))
    micro_rows = at_once(config, parallel)
    feed = PackedFeed(
        text.folder.train,
        length=config.batch.length,
        rows=config.batch.rows,
        micro_rows=micro_rows,
        seed=seeds.stream(config.seed, "order"),
        share=parallel.share,
    )
    identity = {"tokenizer": text.tokenizer.hash, "data": text.folder.train.hash}
    with Run(
        folder,
        config=as_yaml(config),
        env={**env, "hashes": identity},
        identity=identity,
        resume=resume,
        leader=parallel.leader,
    ) as run:
        if parallel.leader:
            describe(folder, model, text)
        result = train(
            objective,
            feed,
            optimizer(config.optimizer, objective, model),
            schedule(config.steps, **config.schedule.model_dump()),
            loop_settings(config, model),
            run,
            parallel=parallel,
            probes=list(probes(config, text, run, micro_rows)),
            callbacks=callbacks,
            display=screen,
        )
        return concluded(config, folder, model, text, result, parallel, say)


def require_share(config: Pretrain, parallel: Parallel) -> None:
    if config.batch.rows % parallel.world:
        raise UsageError(
            f"batch.rows {config.batch.rows} can't be shared by {parallel.world} processes; make it a multiple"
        )


def first_model(config: Pretrain, settings: Settings, text: Text) -> Decoder:
    """The model before the first step: loaded, or built with first values from its own stream of chance."""
    if config.model.load is not None:
        model = load(config.model.load, dtype="float32")
        if model.config.vocab < text.tokenizer.vocab_size:
            raise UsageError(
                f"{config.model.load} knows {model.config.vocab} tokens, its tokenizer {text.tokenizer.vocab_size}; "
                f"set tokenizer.load={config.model.load}"
            )
    else:
        numbers = model_config(config.model, settings, vocab=text.tokenizer.vocab_size, context=config.batch.length)
        model = build(numbers, seed=seeds.stream(config.seed, "init"))
    if config.batch.length > model.config.context:
        raise UsageError(
            f"batch.length {config.batch.length} is longer than the model's context of {model.config.context}"
        )
    model.generation = GenerationDefaults(
        bos=text.tokenizer.bos_id, eos=tuple(text.tokenizer.eos_ids), pad=text.tokenizer.pad_id
    )
    return model


def decided(config: Pretrain, model: Decoder, parallel: Parallel, say: Say) -> Pretrain:
    """The config with what `auto` means here written out, and said why."""
    parameters = count_parameters(model)
    flops = 6.0 * parameters * config.batch.rows * config.batch.length * config.steps / parallel.world
    number = precision(PRECISIONS.get(config.precision, config.precision), parallel.device)
    graph = compiling(config.compile, parallel.device, flops)
    say(f"model: {page_of(model.config).name}-style, {parameters:,} parameters, on {parallel.device}" + ranks(parallel))
    say(f"precision: {number.value} ({number.why}); compiled: {'yes' if graph.value else 'no'} ({graph.why})")
    return config.model_copy(update={"precision": number.value, "compile": graph.value})


def ranks(parallel: Parallel) -> str:
    return f", {parallel.world} processes by {parallel.kind}" if parallel.world > 1 else ""


def require_same_run(config: Pretrain, folder: Path) -> None:
    """A folder that holds something else, or a run of other settings, is left alone."""
    old = folder / "config.yaml"
    if not old.is_file():
        if folder.is_dir() and any(entry.name != "run.lock" for entry in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and no run; choose another --out")
    elif listed(folder / "checkpoints"):
        changed = differences(resolve(Pretrain, gather(str(old))), config, FREE)
        if changed:
            listing = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise BusyError(
                f"{folder} holds a run of other settings ({listing}).\n"
                f"Go on with its own (quest train {folder}) or choose another --out"
            )


def recompute(model: Decoder) -> None:
    """Activation checkpointing: each block's inside is forgotten and computed again on the way back. No name
    changes."""
    for block in model.blocks:
        block.forward = again(block.forward)


def again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)

    return recomputed


def at_once(config: Pretrain, parallel: Parallel) -> int:
    """Rows of a micro-batch: what was asked for, else the largest equal part of this process's rows within AT_ONCE
    tokens."""
    mine = config.batch.rows // parallel.world
    if config.batch.micro_rows is not None:
        return min(config.batch.micro_rows, mine)
    most = max(1, min(mine, AT_ONCE // config.batch.length))
    return max(number for number in range(1, most + 1) if mine % number == 0)


def optimizer(part: OptimizerPart, objective: nn.Module, model: Decoder) -> torch.optim.Optimizer:
    """AdamW or Muon; Muon is told which rows of the fused projections are matrices of their own."""
    lr, betas, eps, decay = part.lr, part.betas, part.eps, part.weight_decay
    if part.name == "adamw":
        return adamw(model, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    splits = model.row_splits()
    return muon(model, lr=lr, betas=betas, eps=eps, weight_decay=decay, momentum=part.momentum, splits=splits)


def loop_settings(config: Pretrain, model: Decoder) -> LoopSettings:
    """The engine's view of the config."""
    return LoopSettings(
        steps=config.steps,
        clip=config.clip,
        log_every=config.log_every,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        precision=config.precision,
        compile=bool(config.compile),
        max_time=config.seconds,
        seed=seeds.stream(config.seed, "dropout"),
        expected_loss=math.log(model.config.vocab) if config.model.load is None else None,
    )


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
            seeds.stream(config.seed, "sampling"),
        )


def shown(config: Pretrain, folder: Path, parallel: Parallel, quiet: bool) -> Display:
    """The progress display, TensorBoard beside it if asked for."""
    screen = display(parallel.rank, quiet=quiet)
    return Board(folder / "tensorboard", screen) if config.tensorboard and parallel.leader else screen


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
    outcome = Outcome(
        run=str(folder),
        status=result.status,
        step=result.step,
        steps=config.steps,
        exit_code=result.exit_code,
        parameters=count_parameters(model),
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        metrics=dict(result.metrics),
        baselines=compared(text, say) if wanted else {},
    )
    if parallel.leader:
        replace_json(folder / "summary.json", finite(outcome.as_json()))
    return outcome


def compared(text: Text, say: Say) -> dict[str, float]:
    """Bits per byte of the baselines, where the documents are at hand and few enough to count."""
    parts = text.parts
    if parts is None or not parts.val or parts.corpus.nbytes > BASELINES_UP_TO:
        return {}
    say("counting and compressing the same text, to compare")
    return {one.name: one.bits_per_byte for one in baselines(parts.train, parts.val, tokenizer=text.tokenizer)}
