"""Shared parts of the pretraining experiments: a small text corpus (Python's documentation), a Llama of under a million
parameters, and runs of a few hundred steps with the training loop of the package."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from llm_quest.contracts import Callback, Loader
from llm_quest.data.corpus import load_corpus
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.packing import HeldOutLoader, PackedDocuments, eval_batches
from llm_quest.data.split import split_corpus
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import TokenFolder, default_cache_dir, prepare_token_folder
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import GuardStop
from llm_quest.files import replace_file
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.tensor_files import write_tensors
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_lr_schedule

LAB_VOCAB_SIZE, LAB_SEQUENCE_LENGTH, LAB_BATCH_SIZE = 1024, 128, 16


@dataclass(frozen=True)
class LabText:
    """A tokenized corpus with its tokenizer."""

    folder: TokenFolder
    tokenizer: Tokenizer

    def loader(
        self, seed: int, *, length: int = LAB_SEQUENCE_LENGTH, rows: int = LAB_BATCH_SIZE
    ) -> ShardedLoader[PackedDocuments]:
        return ShardedLoader(
            PackedDocuments(self.folder.train, length), batch_size=rows, micro_batch_size=rows, seed=seed
        )

    def held_out(self, *, length: int = LAB_SEQUENCE_LENGTH, tokens: int = 40_000) -> HeldOutLoader:
        return eval_batches(self.folder.val, length, LAB_BATCH_SIZE, tokens)


@functools.cache
def lab_text(source: str = "builtin:topics,docstrings") -> LabText:
    """Python's manual and docstrings, or another builtin source, tokenized with a vocabulary of 1,024 that is trained
    on the former."""
    parts = split_corpus(load_corpus(source), held_out=0.05)
    own = source == "builtin:topics,docstrings"
    tokenizer = train_bpe((document.text for document in parts.train), LAB_VOCAB_SIZE) if own else lab_text().tokenizer
    return LabText(prepare_token_folder(parts, tokenizer, default_cache_dir()), tokenizer)


def cached_model(name: str, seed: int, config: Any, train: Callable[[], Decoder]) -> Decoder:
    """The model that `train` returns. It is trained once for each name, seed and config and then loaded from the cache,
    so that the arms of an experiment start from the same weights."""
    folder = default_cache_dir().parent / "lab"
    file = folder / f"{name}-{seed}-{hashlib.sha256(repr(config).encode()).hexdigest()[:12]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            model = train()
            unfinished = file.with_suffix(".part")
            unfinished.unlink(missing_ok=True)
            write_tensors(unfinished, dict(model.named_parameters()))
            replace_file(unfinished, file)
    model = build(config)
    with torch.no_grad():
        for path, tensor in load_file(file).items():
            model.get_parameter(path).copy_(tensor)
    return model.train()


def small_llama_config(
    *, width: int = 128, layers: int = 4, context: int = LAB_SEQUENCE_LENGTH, vocab: int = LAB_VOCAB_SIZE
) -> llama.Config:
    """A Llama of 0.9 million parameters."""
    return llama.Config(
        vocab, width, layers, width // 32, width // 64, 32, 8 * width // 3, context, RotaryEmbedding(32, 1e4), True
    )


@dataclass
class MetricsRecorder:
    """A logger that prints nothing and keeps every row of metrics."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)

    def start(self, step: int, steps: int) -> None:
        """Nothing to do."""

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        self.losses.append((row["step"], row["loss"]))
        self.metrics.append(dict(row))

    def log_event(self, text: str) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def init_lab_model(config: Any, seed: int) -> Decoder:
    """A new model in training mode."""
    return build(config, seed=seed).train()


def train_lab_model(
    objective: nn.Module,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    seed: int,
    warmup: int = 20,
    clip: float | None = 1.0,
    log_every: int = 5,
    callbacks: Sequence[Callback] = (),
    shape: str = "cosine",
) -> MetricsRecorder:
    """Trains without a run folder. If a guard stops the run, its curve ends with a loss of NaN."""
    trace = MetricsRecorder()
    settings = TrainingArguments(steps=steps, max_grad_norm=clip, log_every=log_every, seed=seed)
    rate = make_lr_schedule(steps, warmup_steps=min(warmup, steps), shape=shape, min_lr_ratio=0.1)
    try:
        train(objective, loader, optimizer, rate, settings, callbacks=callbacks, logger=trace)
    except GuardStop:
        trace.losses.append((trace.losses[-1][0] + 1 if trace.losses else 1, math.nan))
    return trace


@torch.no_grad()
def held_out_loss(
    model: Decoder, held_out: HeldOutLoader, objective: Callable[[Any], nn.Module] = NextTokenLoss
) -> float:
    """Mean loss in nats per token; infinite if it is not finite."""
    training, loss = model.training, objective(model.eval())
    mean = math.fsum(float(loss(batch).total) for batch in held_out) / held_out.num_targets
    model.train(training)
    return mean if math.isfinite(mean) else math.inf


def steps_to_reach(curve: Sequence[tuple[float, float]], level: float, window: int = 5) -> float:
    """The first x at which the running mean of `window` points is at most `level`; the last x if there is none."""
    for place in range(window - 1, len(curve)):
        if sum(y for _, y in curve[place - window + 1 : place + 1]) / window <= level:
            return curve[place][0]
    return curve[-1][0]
