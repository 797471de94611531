"""How well a model predicts a text, in units that compare: bits per byte, beside what counting and compressing reach
on the same bytes.

      bits per byte = (sum of -ln p over every token and document end) / ln 2 / (bytes of the documents)

A document longer than a row is cut and its pieces know nothing of each other, so the number is honest but not
flattering."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_quest.data.baselines import COMPRESSORS, baselines, compressor_bits_per_byte
from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.documents import Document
from llm_quest.data.held_out import HeldOut, eval_batches
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import Tokens
from llm_quest.errors import DataError, UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import scope_of
from llm_quest.report.words import aligned

AT_ONCE = 4096
LOGITS = 2**22
NORMAL = 1.96


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. interval: where bits per byte lie with 95 % confidence if other documents of this kind had
    been drawn (None: one document tells nothing of others). baselines: name -> bits per byte on the same documents."""

    source: str
    documents: int
    bytes: int
    tokens: int
    length: int
    loss: float
    perplexity: float
    bits_per_byte: float
    interval: tuple[float, float] | None
    tokens_per_second: float
    seconds: float
    baselines: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        between = "" if self.interval is None else f"  (95 %: {self.interval[0]:.4f} to {self.interval[1]:.4f})"
        text = f"{self.documents:,} documents, {self.bytes:,} bytes, {self.tokens:,} tokens in rows of {self.length:,}"
        facts = [
            ("text", f"{self.source}: {text}"),
            ("bits per byte", f"{self.bits_per_byte:.4f}{between}"),
            ("loss", f"{self.loss:.4f} nats per token"),
            ("perplexity", f"{self.perplexity:,.2f} per token"),
            ("speed", f"{self.tokens_per_second:,.0f} tokens/s"),
        ]
        told = aligned(facts)
        if self.baselines:
            rows = [("  baseline", "bits per byte", "to the model")]
            for name, bits in sorted(self.baselines.items(), key=lambda one: one[1]):
                rows.append((f"  {name}", f"{bits:.4f}", f"{bits - self.bits_per_byte:+.4f}"))
            told += ["", "on the same bytes", *aligned(rows, right=(1, 2))]
        return told


def evaluate_documents(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    train: Sequence[Document] = (),
    source: str = "text",
    length: int | None = None,
    limit: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """On documents. train: what the model and the n-gram baselines learned from; without it only compressors are
    compared. length: tokens in a row, by default the model's context (at most 4,096); limit: look at so many tokens'
    worth of documents."""
    if not documents:
        raise DataError(f"{source} holds no document to evaluate on")
    if tokenizer.vocab_size > model.config.vocab:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model knows {model.config.vocab:,}: "
            "they do not belong together"
        )
    held_out = rows_of(model, numbered(tokenizer, documents), length=length, limit=limit)
    looked_at = [documents[number] for number in held_out.documents]
    say(f"{len(looked_at):,} documents, {held_out.num_bytes:,} bytes")
    found = evaluate(model, held_out, source=source)
    say("counting and compressing the same text, to compare")
    return dataclasses.replace(found, baselines=compared(train, looked_at, tokenizer))


def evaluate(
    model: Decoder, held_out: HeldOut, *, source: str = "held-out text", baselines: Mapping[str, float] | None = None
) -> Evaluation:
    """On held-out rows (`data.held_out.eval_batches`). The model is in eval mode meanwhile, and as it was
    afterwards."""
    device, training = next(model.parameters()).device, model.training
    nats = torch.zeros(held_out.tokens.num_documents, dtype=torch.float64)
    began = time.perf_counter()
    model.eval()
    try:
        with torch.inference_mode():
            for number, batch in enumerate(held_out):
                each = token_nats(model, batch.to(device)).double().cpu()
                owners = held_out.owners(number).flatten()
                nats.index_add_(0, owners.clamp(min=0), torch.where(owners < 0, 0.0, each))
    finally:
        model.train(training)
    seconds = time.perf_counter() - began
    mine = nats[torch.from_numpy(held_out.documents)].numpy()
    loss = float(mine.sum()) / held_out.num_targets
    return Evaluation(
        source=source,
        documents=len(held_out.documents),
        bytes=held_out.num_bytes,
        tokens=held_out.num_targets,
        length=held_out.length,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=held_out.bits_per_byte(float(mine.sum())),
        interval=interval(mine / math.log(2), held_out.tokens.nbytes[held_out.documents]),
        tokens_per_second=held_out.num_targets / seconds,
        seconds=seconds,
        baselines=dict(baselines or {}),
    )


def token_nats(model: Decoder, batch: TokenBatch) -> Tensor:
    """-ln p of each target, (B*T,) float32; 0 where nothing is predicted. Logits are made for a few tokens at a
    time."""
    x = model.hidden(batch.tokens, scope_of(batch)).flatten(0, 1)
    targets = batch.targets.flatten()
    rows = max(1, LOGITS // model.config.vocab)
    parts = zip(x.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [F.cross_entropy(model.head(some).float(), t, ignore_index=IGNORE, reduction="none") for some, t in parts]
    )


def interval(bits: np.ndarray, nbytes: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the ratio sum(bits) / sum(bytes) over documents as drawn: the linearised variance of a ratio,
    n/(n-1) sum (bits_i - R bytes_i)^2 / (sum bytes)^2 (Cochran 1977, section 6.4)."""
    n = len(bits)
    if n < 2:
        return None
    ratio = bits.sum() / nbytes.sum()
    deviation = math.sqrt(n / (n - 1) * float(((bits - ratio * nbytes) ** 2).sum())) / float(nbytes.sum())
    return float(ratio - NORMAL * deviation), float(ratio + NORMAL * deviation)


def rows_of(model: Decoder, tokens: Tokens, *, length: int | None = None, limit: int | None = None) -> HeldOut:
    """Rows as long as the model's context, as many at once as make a fair-sized pass."""
    context = int(model.config.context)
    length = length or min(context, AT_ONCE)
    if length > context:
        raise UsageError(f"rows of {length:,} tokens are longer than the model's context of {context:,}")
    return eval_batches(tokens, length, max(1, AT_ONCE // length), limit)


def numbered(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tokens:
    """Documents as tokens, with their bytes."""
    encoded = tokenizer.encode_batch([document.text for document in documents], template=False)
    tokens = Tokens.of(encoded, vocab_size=tokenizer.vocab_size, start=tokenizer.start_id, end=tokenizer.eos_ids[0])
    return dataclasses.replace(tokens, nbytes=np.array([document.nbytes for document in documents], dtype=np.int64))


def compared(train: Sequence[Document], val: Sequence[Document], tokenizer: Tokenizer) -> dict[str, float]:
    """Baselines by name: n-grams and compressors that have read the training text; or compressors that have read
    nothing."""
    if train:
        return {one.name: one.bits_per_byte for one in baselines(train, val, tokenizer=tokenizer)}
    return {
        f"{name}, nothing read before": compressor_bits_per_byte((), val, compress)
        for name, compress in COMPRESSORS.items()
    }
