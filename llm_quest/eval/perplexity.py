"""Evaluates a language model on text: perplexity and bits per byte, with n-gram and compressor baselines on the same
bytes.

      bits per byte = (sum of -ln p over every token and document end) / ln 2 / (bytes of the documents)

A document longer than a row is split into pieces that are scored independently of each other, so the number is
slightly pessimistic."""

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

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.document import Document
from llm_quest.data.packing import HeldOutLoader, eval_batches
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import DataError, UsageError
from llm_quest.eval.baselines import COMPRESSORS, compressor_bits_per_byte, compute_baselines
from llm_quest.formatting import align_columns
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import batch_scope

EVAL_TOKENS = 4096
LOGITS_PER_CHUNK = 2**22
Z_95 = 1.96


@dataclass(frozen=True)
class PerplexityReport:
    """The result of an evaluation on text. loss: nats per token. interval: the 95 % confidence interval of bits per
    byte over documents (None for a single document). baselines: name -> bits per byte on the same documents."""

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
        result = align_columns(facts)
        if self.baselines:
            rows = [("  baseline", "bits per byte", "to the model")]
            for name, bits in sorted(self.baselines.items(), key=lambda one: one[1]):
                rows.append((f"  {name}", f"{bits:.4f}", f"{bits - self.bits_per_byte:+.4f}"))
            result += ["", "on the same bytes", *align_columns(rows, right=(1, 2))]
        return result


def evaluate_documents(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    train: Sequence[Document] = (),
    source: str = "text",
    length: int | None = None,
    max_tokens: int | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> PerplexityReport:
    """Evaluate a model on documents. train: the documents that the model was trained on, to which the n-gram baselines
    are fitted; without them only compressors are compared. length: tokens in a row, by default the model's context (at
    most 4,096). max_tokens: use about so many tokens of the documents."""
    if not documents:
        raise DataError(f"{source} holds no document to evaluate on")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model knows {model.config.vocab_size:,}: "
            "load the tokenizer that the model was trained with"
        )
    held_out = make_eval_batches(model, tokenize_documents(tokenizer, documents), length=length, limit=max_tokens)
    evaluated = [documents[number] for number in held_out.documents]
    log(f"{len(evaluated):,} documents, {held_out.num_bytes:,} bytes")
    result = evaluate_perplexity(model, held_out, source=source)
    log("fitting n-gram and compressor baselines to the same text")
    return dataclasses.replace(result, baselines=evaluate_baselines(train, evaluated, tokenizer))


def evaluate_perplexity(
    model: Decoder,
    held_out: HeldOutLoader,
    *,
    source: str = "held-out text",
    baselines: Mapping[str, float] | None = None,
) -> PerplexityReport:
    """Evaluate a model on held-out rows (`data.packing.eval_batches`), in eval mode; its own mode is restored
    afterwards."""
    device, training = next(model.parameters()).device, model.training
    nats = torch.zeros(held_out.tokens.num_documents, dtype=torch.float64)
    began = time.perf_counter()
    model.eval()
    try:
        with torch.inference_mode():
            for number, batch in enumerate(held_out):
                each = token_losses(model, batch.to(device)).double().cpu()
                owners = held_out.document_ids(number).flatten()
                nats.index_add_(0, owners.clamp(min=0), torch.where(owners < 0, 0.0, each))
    finally:
        model.train(training)
    seconds = time.perf_counter() - began
    document_nats = nats[torch.from_numpy(held_out.documents)].numpy()
    loss = float(document_nats.sum()) / held_out.num_targets
    return PerplexityReport(
        source=source,
        documents=len(held_out.documents),
        bytes=held_out.num_bytes,
        tokens=held_out.num_targets,
        length=held_out.sequence_length,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=held_out.bits_per_byte(float(document_nats.sum())),
        interval=ratio_interval(document_nats / math.log(2), held_out.tokens.nbytes[held_out.documents]),
        tokens_per_second=held_out.num_targets / seconds,
        seconds=seconds,
        baselines=dict(baselines or {}),
    )


def token_losses(model: Decoder, batch: TokenBatch) -> Tensor:
    """-ln p of each target, (B*T,) float32; 0 where there is no target. Logits are computed for a few tokens at a
    time."""
    x = model.hidden_states(batch.input_ids, batch_scope(batch)).flatten(0, 1)
    targets = batch.targets.flatten()
    rows = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    parts = zip(x.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [F.cross_entropy(model.head(some).float(), t, ignore_index=IGNORE_INDEX, reduction="none") for some, t in parts]
    )


def ratio_interval(bits: np.ndarray, nbytes: np.ndarray) -> tuple[float, float] | None:
    """95 % confidence interval of sum(bits) / sum(bytes) over documents, by the linearized variance of a ratio,
    n/(n-1) sum (bits_i - R bytes_i)^2 / (sum bytes)^2 (Cochran 1977, section 6.4)."""
    n = len(bits)
    if n < 2:
        return None
    ratio = bits.sum() / nbytes.sum()
    deviation = math.sqrt(n / (n - 1) * float(((bits - ratio * nbytes) ** 2).sum())) / float(nbytes.sum())
    return float(ratio - Z_95 * deviation), float(ratio + Z_95 * deviation)


def make_eval_batches(
    model: Decoder, tokens: TokenizedDocuments, *, length: int | None = None, limit: int | None = None
) -> HeldOutLoader:
    """Rows as long as the model's context (at most 4,096 tokens), about 4,096 tokens to a batch."""
    context = int(model.config.max_position_embeddings)
    length = length or min(context, EVAL_TOKENS)
    if length > context:
        raise UsageError(f"rows of {length:,} tokens are longer than the model's context of {context:,}")
    return eval_batches(tokens, length, max(1, EVAL_TOKENS // length), limit)


def tokenize_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> TokenizedDocuments:
    """Tokenize documents; the byte count of each is kept."""
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    tokens = TokenizedDocuments.from_token_lists(
        encoded, vocab_size=tokenizer.vocab_size, start=tokenizer.start_token_id, end=tokenizer.eos_token_ids[0]
    )
    return dataclasses.replace(tokens, nbytes=np.array([document.nbytes for document in documents], dtype=np.int64))


def evaluate_baselines(train: Sequence[Document], val: Sequence[Document], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of the baselines by name: n-grams and compressors fitted to the training text, or, without one,
    compressors alone."""
    if train:
        return {
            baseline.name: baseline.bits_per_byte for baseline in compute_baselines(train, val, tokenizer=tokenizer)
        }
    return {
        f"{name}, without training text": compressor_bits_per_byte((), val, compress)
        for name, compress in COMPRESSORS.items()
    }
