"""Evaluators that run during training: the loss on held-out text, and samples from fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quest.data.held_out import HeldOutLoader, eval_batches
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.files import atomic_write_json
from llm_quest.generation.generate import generate
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss


class LossEvaluator:
    """Loss in nats per token and bits per byte on max_tokens of the held-out text, and on all of it after the last
    step."""

    name = "eval"

    def __init__(
        self, tokens: TokenizedDocuments, *, every: int, max_tokens: int, last_step: int, length: int, micro_rows: int
    ):
        self.interval, self.last = every, last_step
        self.part = eval_batches(tokens, length, micro_rows, max_tokens)
        self.whole = eval_batches(tokens, length, micro_rows)

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        return language_model_loss(model, self.whole if step >= self.last else self.part)


@torch.no_grad()
def language_model_loss(model: Decoder, batches: HeldOutLoader) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte of a model on held-out batches."""
    objective, device = NextTokenLoss(model, mtp_weight=0.0), next(model.parameters()).device
    nats = math.fsum(float(objective(batch.to(device)).total) for batch in batches)
    loss = nats / batches.num_targets
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": batches.bits_per_byte(nats)}


@dataclass
class TextSampler:
    """Samples from fixed prompts with fixed seeds, written to samples/step-00000100.json."""

    tokenizer: Tokenizer
    samples_dir: Path | None
    prompts: Sequence[str]
    interval: int
    max_new_tokens: int
    temperature: float
    seed: int
    name: str = "samples"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        """Every process generates, because each may hold a shard of the model; the one with a samples_dir saves."""
        starts = [
            [self.tokenizer.start_token_id, *self.tokenizer.encode(prompt, add_special_tokens=False)]
            for prompt in self.prompts
        ]
        room = model.config.max_position_embeddings - max(map(len, starts))
        done = generate(
            model,
            starts,
            max_new_tokens=max(1, min(self.max_new_tokens, room)),
            temperature=self.temperature,
            eos_token_id=self.tokenizer.eos_token_ids,
            seed=self.seed,
            tokenizer=self.tokenizer,
        )
        if self.samples_dir is not None:
            sample_rows = [{"prompt": prompt, "text": one.text} for prompt, one in zip(self.prompts, done, strict=True)]
            save_samples(self.samples_dir, step, sample_rows)
        return {}


def save_samples(folder: Path, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write the samples of a step for the report: prompt, text, and the wanted text where it is known."""
    atomic_write_json(folder / f"step-{step:08d}.json", {"step": step, "samples": list(samples)})
