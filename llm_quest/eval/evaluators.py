"""Evaluators that run during training: the loss on held-out text, samples from fixed prompts, held-out preference
pairs, and the range of a policy's importance ratios. `eval/policy.py` has the one of a policy's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_quest.data.loader import length_grouped_indices
from llm_quest.data.packing import HeldOutLoader, eval_batches
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.eval.perplexity import evaluate_perplexity
from llm_quest.eval.statistics import wilson_confidence_interval
from llm_quest.files import atomic_write_json
from llm_quest.generation.generate import generate
from llm_quest.generation.stopping import end_token_ids
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.policy_gradient import PolicyGradientLoss


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

    def bits_per_byte_interval(self, model: Decoder) -> tuple[float, float] | None:
        """The 95 % confidence interval over all held-out documents; None where there is one document."""
        return evaluate_perplexity(model, self.whole).interval


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
            eos_token_id=end_token_ids(model, self.tokenizer),
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


SIMILAR_LENGTH_TOLERANCE = 0.1


class PairsEvaluator:
    """Held-out pairs: accuracy, margin, accuracy where both answers are of like length (so that length cannot be the
    reason), and how the reward goes with length.

    rewards(model, batch) -> the reward of each row. loss: -log sigma of the margin."""

    name = "eval"

    def __init__(
        self,
        pairs: Sequence[TokenizedPreference],
        every: int,
        rewards: Callable[[Any, PreferenceBatch], Tensor],
        batch_size: int = 16,
    ):
        self.pairs, self.interval, self.rewards, self.at_once = PreferenceDataset(pairs), every, rewards, batch_size

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        device = next(model.parameters()).device
        scored: list[tuple[float, float, int, int]] = []
        for numbers in length_grouped_indices(self.pairs, self.at_once):
            batch = self.pairs.collate(numbers)
            r = self.rewards(model, batch.to(device)).double().cpu().numpy()
            sizes = [len(answer) for n in numbers for answer in self.pairs.preferences[n].answers]
            scored += [
                (r[b], r[w], sizes[b], sizes[w])
                for b, w in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)
            ]
        return preference_metrics(np.array(scored))


def preference_metrics(scored: np.ndarray) -> dict[str, float]:
    """From rows (reward of the better, of the worse, length of the better, of the worse)."""
    better, worse, long, short = scored.T
    alike = np.abs(long - short) <= SIMILAR_LENGTH_TOLERANCE * np.maximum(long, short)
    metrics = {"loss": float(np.logaddexp(0, worse - better).mean()), "accuracy": float((better > worse).mean())}
    metrics["margin"] = float((better - worse).mean())
    if alike.any():
        metrics["accuracy_same_length"] = float((better > worse)[alike].mean())
    lengths, rewards = np.concatenate([long, short]), np.concatenate([better, worse])
    if lengths.std() > 0 and rewards.std() > 0:
        metrics["reward_length_correlation"] = float(np.corrcoef(lengths, rewards)[0, 1])
    around = wilson_confidence_interval(int((better > worse).sum()), len(scored))
    metrics["interval"] = (around.high - around.low) / 2
    return metrics


@dataclass
class RatioRangeEvaluator:
    """The smallest and largest importance ratio, before clipping, since the last row of metrics. all_gather: the values
    of all processes, each of which has seen its own rows."""

    objective: PolicyGradientLoss
    interval: int
    all_gather: Callable[[Any], list[Any]] = lambda value: [value]
    name: str = "ratio"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        ranges = self.all_gather(self.objective.ratio_range.tolist())
        self.objective.ratio_range = torch.ones(2)
        return {"min": min(low for low, _ in ranges), "max": max(high for _, high in ranges)}
