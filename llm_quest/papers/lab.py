"""The bench on which small experiments are made: the interpreter's own text, a model of under a million parameters, a
few hundred steps, and the house's own loop."""

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

from llm_quest.contracts import Callback, Feed
from llm_quest.data.corpus import gather
from llm_quest.data.held_out import HeldOut, eval_batches
from llm_quest.data.packing import PackedFeed
from llm_quest.data.split import split
from llm_quest.data.tokenizer import Tokenizer, train_bpe
from llm_quest.data.tokens import TokenFolder, default_cache, prepare
from llm_quest.errors import GuardStop
from llm_quest.layers.rotary import Rotary
from llm_quest.models import llama
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextToken
from llm_quest.tensor_files import write_tensors
from llm_quest.train.loop import train
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Settings

VOCAB, LENGTH, ROWS = 1024, 128, 16


@dataclass(frozen=True)
class Text:
    """Prepared tokens, with their tokenizer."""

    folder: TokenFolder
    tokenizer: Tokenizer

    def feed(self, seed: int, *, length: int = LENGTH, rows: int = ROWS) -> PackedFeed:
        return PackedFeed(self.folder.train, length=length, rows=rows, micro_rows=rows, seed=seed)

    def held_out(self, *, length: int = LENGTH, tokens: int = 40_000) -> HeldOut:
        return eval_batches(self.folder.val, length, ROWS, tokens)


@functools.cache
def text(source: str = "builtin:topics,docstrings") -> Text:
    """Python's manual and docstrings (or another part of what it brings), in the manual's 1,024 tokens."""
    parts = split(gather(source), held_out=0.05)
    own = source == "builtin:topics,docstrings"
    tokenizer = train_bpe((document.text for document in parts.train), VOCAB) if own else text().tokenizer
    return Text(prepare(parts, tokenizer, default_cache()), tokenizer)


def remembered(name: str, seed: int, config: Any, make: Callable[[], Decoder]) -> Decoder:
    """The model that `make` trains: once for each name, seed and config, for arms that begin at the same one."""
    folder = default_cache().parent / "lab"
    file = folder / f"{name}-{seed}-{hashlib.sha256(repr(config).encode()).hexdigest()[:12]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            made = make()
            unfinished = file.with_suffix(".part")
            unfinished.unlink(missing_ok=True)
            write_tensors(unfinished, dict(made.named_parameters()))
            unfinished.replace(file)
    model = build(config)
    with torch.no_grad():
        for path, tensor in load_file(file).items():
            model.get_parameter(path).copy_(tensor)
    return model.train()


def small_llama(*, width: int = 128, layers: int = 4, context: int = LENGTH, vocab: int = VOCAB) -> llama.Config:
    """Llama's page at 0.9 million parameters."""
    return llama.Config(
        vocab, width, layers, width // 32, width // 64, 32, 8 * width // 3, context, Rotary(32, 1e4), True
    )


@dataclass
class Trace:
    """A display that shows nothing and remembers every row."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)

    def start(self, step: int, steps: int) -> None:
        """A display is told where a run begins."""

    def row(self, row: Mapping[str, Any]) -> None:
        self.losses.append((row["step"], row["loss"]))
        self.metrics.append(dict(row))

    def event(self, text: str) -> None:
        """Nothing is said."""

    def close(self) -> None:
        """Nothing to close."""


def fresh(config: Any, seed: int) -> Decoder:
    """A model in training mode."""
    return build(config, seed=seed).train()


def trained(
    objective: nn.Module,
    feed: Feed,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    seed: int,
    warmup: int = 20,
    clip: float | None = 1.0,
    log_every: int = 5,
    callbacks: Sequence[Callback] = (),
    shape: str = "cosine",
) -> Trace:
    """A run without a folder. One that a guard stops keeps its curve, with a last loss that is not finite."""
    trace = Trace()
    settings = Settings(steps=steps, clip=clip, log_every=log_every, seed=seed)
    rate = schedule(steps, warmup=min(warmup, steps), shape=shape, floor=0.1)
    try:
        train(objective, feed, optimizer, rate, settings, callbacks=callbacks, display=trace)
    except GuardStop:
        trace.losses.append((trace.losses[-1][0] + 1 if trace.losses else 1, math.nan))
    return trace


@torch.no_grad()
def held_out_loss(model: Decoder, held_out: HeldOut, objective: Callable[[Any], nn.Module] = NextToken) -> float:
    """Nats per token; infinite where the model's numbers are not finite."""
    was, _ = model.training, model.eval()
    scored = objective(model)
    total = math.fsum(float(scored(batch).total) for batch in held_out) / held_out.num_targets
    model.train(was)
    return total if math.isfinite(total) else math.inf


def steps_to(curve: Sequence[tuple[float, float]], level: float, window: int = 5) -> float:
    """The first x from which the running mean of `window` points is at most `level`; the last x if it never is."""
    for place in range(window - 1, len(curve)):
        if sum(y for _, y in curve[place - window + 1 : place + 1]) / window <= level:
            return curve[place][0]
    return curve[-1][0]
