"""What is looked at while training: the loss on held-out text, and what the model writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quest.data.held_out import HeldOut, eval_batches
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import Tokens
from llm_quest.disk import replace_json
from llm_quest.generation.generate import generate
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextToken


class Evaluation:
    """loss in nats per token, bits per byte, over a part of the held-out tokens; after the last step over all of
    them."""

    name = "eval"

    def __init__(self, tokens: Tokens, *, every: int, limit: int, last: int, length: int, micro_rows: int):
        self.every, self.last = every, last
        self.part = eval_batches(tokens, length, micro_rows, limit)
        self.whole = eval_batches(tokens, length, micro_rows)

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        return held_out_loss(model, self.whole if step >= self.last else self.part)


@torch.no_grad()
def held_out_loss(model: Decoder, batches: HeldOut) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte of a model on held-out batches."""
    objective, device = NextToken(model, lookahead=0.0), next(model.parameters()).device
    nats = math.fsum(float(objective(batch.to(device)).total) for batch in batches)
    loss = nats / batches.num_targets
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": batches.bits_per_byte(nats)}


@dataclass
class Writing:
    """Texts from fixed prompts with fixed seeds, so that steps can be compared: samples/step-00000100.json."""

    tokenizer: Tokenizer
    folder: Path | None
    prompts: Sequence[str]
    every: int
    tokens: int
    temperature: float
    seed: int
    name: str = "samples"

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        """Every process writes (parts of the model may lie on each); only one with a folder keeps it."""
        starts = [[self.tokenizer.start_id, *self.tokenizer.encode(prompt, template=False)] for prompt in self.prompts]
        room = model.config.context - max(map(len, starts))
        done = generate(
            model,
            starts,
            max_new_tokens=max(1, min(self.tokens, room)),
            temperature=self.temperature,
            eos=self.tokenizer.eos_ids,
            seed=self.seed,
            tokenizer=self.tokenizer,
        )
        if self.folder is not None:
            told = [{"prompt": prompt, "text": one.text} for prompt, one in zip(self.prompts, done, strict=True)]
            keep_samples(self.folder, step, told)
        return {}


def keep_samples(folder: Path, step: int, told: Sequence[Mapping[str, Any]]) -> None:
    """What was written after `step` steps, for the report: prompt and text of each, and what was wanted, if that is
    known."""
    replace_json(folder / f"step-{step:08d}.json", {"step": step, "samples": list(told)})
