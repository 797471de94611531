"""YaRN (Peng et al. 2023, arXiv:2309.00071) and other context extensions, on a model trained at a quarter of the
length: perplexity and retrieval without further training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.papers.lab import (
    LAB_VOCAB_SIZE,
    cached_model,
    init_lab_model,
    lab_text,
    small_llama_config,
    train_lab_model,
)
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.techniques.context_extension import ContextExtension
from llm_quest.train.optimizers import make_adamw

TRAINED_LENGTH, FACTOR, STEPS, ROWS, LEARNING_RATE = 64, 4, 700, 32, 2e-3
EVAL_LENGTH = TRAINED_LENGTH * FACTOR
NUM_REPEATED_TOKENS = 64
"""Number of distinct tokens in the random texts to be repeated."""


class HalfCopiesLoader:
    """Half of the rows are text; the other half are a random text followed by itself, with a loss on the repetition
    only (it can be retrieved and not predicted otherwise)."""

    def __init__(self, seed: int):
        self.text, self.seed = lab_text().loader(seed, length=TRAINED_LENGTH, rows=ROWS // 2), seed

    def batches(self, step: int) -> list[TokenBatch]:
        return [*self.text.batches(step), texts_with_repeats(ROWS // 2, TRAINED_LENGTH, self.seed * 100_003 + step)]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: batches are a function of the step."""


def texts_with_repeats(rows: int, length: int, seed: int) -> TokenBatch:
    """Rows of `length` inputs: a random text of half that length, twice."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    half = torch.randint(LAB_VOCAB_SIZE - NUM_REPEATED_TOKENS, LAB_VOCAB_SIZE, (rows, length // 2), generator=generator)
    ids = torch.cat((half, half, half[:, :1]), dim=1)
    targets = ids[:, 1:].clone()
    targets[:, : length // 2] = IGNORE_INDEX
    return TokenBatch(ids[:, :-1], targets)


def yarn_base_model(seed: int) -> Decoder:
    """The model trained at 64 tokens."""

    def make() -> Decoder:
        model = init_lab_model(small_llama_config(layers=3, context=TRAINED_LENGTH), seed)
        train_lab_model(
            NextTokenLoss(model), HalfCopiesLoader(seed), make_adamw(model, lr=LEARNING_RATE), steps=STEPS, seed=seed
        )
        return model

    return cached_model("yarn-base", seed, small_llama_config(layers=3, context=TRAINED_LENGTH), make)


def make_arm(technique: ContextExtension | None) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model: Any = yarn_base_model(seed)
        model = (model if technique is None else technique(model)).eval()
        curve = loss_by_position(model)
        far = [loss for place, loss in curve if place >= EVAL_LENGTH - TRAINED_LENGTH]
        near = [loss for place, loss in curve if place < TRAINED_LENGTH]
        numbers = {"loss within 64": sum(near) / len(near), "loss at 192-256": sum(far) / len(far)}
        return Measurement(numbers | {"retrieved at 256": retrieval_accuracy(model, EVAL_LENGTH)}, curve)

    return run_arm


@torch.no_grad()
def loss_by_position(model: Decoder, step: int = 8) -> list[tuple[float, float]]:
    """Mean loss on held-out text by position, in documents that are long enough, one a row."""
    batch = long_documents()
    losses = -token_log_probs(model, batch).mean(dim=0)
    return [(place, float(losses[place : place + step].mean())) for place in range(0, EVAL_LENGTH, step)]


@functools.cache
def long_documents(rows: int = 48) -> TokenBatch:
    ids, offsets = lab_text().folder.val.ids, lab_text().folder.val.offsets
    starts = [begin for begin, end in itertools.pairwise(offsets) if end - begin > EVAL_LENGTH]
    found = torch.stack(
        [torch.from_numpy(ids[begin : begin + EVAL_LENGTH + 1].astype("int64")) for begin in starts[:rows]]
    )
    return TokenBatch(found[:, :-1], found[:, 1:])


@torch.no_grad()
def retrieval_accuracy(model: Decoder, length: int) -> float:
    """The share of a repeated random text that is predicted greedily, at a distance of half the length."""
    batch = texts_with_repeats(16, length, 5)
    predicted: Tensor = model(batch.input_ids).argmax(dim=-1)
    repeated = batch.targets != IGNORE_INDEX
    return float((predicted == batch.targets)[repeated].float().mean())


ARMS = {
    "plain": make_arm(None),
    "linear": make_arm(ContextExtension(FACTOR, "linear")),
    "NTK": make_arm(ContextExtension(FACTOR, "ntk")),
    "YaRN": make_arm(ContextExtension(FACTOR, "yarn", original=TRAINED_LENGTH)),
}


def verdict(results: ExperimentResults) -> Verdict:
    loss = results.difference("YaRN", "plain", "loss at 192-256")
    retrieved = results.difference("YaRN", "plain", "retrieved at 256")
    words = (
        f"at four times the trained length YaRN changes the loss by {loss} nats and the retrieved share by {retrieved}"
    )
    if loss.negative and retrieved.mean + retrieved.half_width > 0:
        return Verdict("confirmed", words)
    return Verdict("refuted" if loss.positive or retrieved.negative else "no effect seen", words)


PAPER = Paper(
    name="yarn",
    title="YaRN: Efficient Context Window Extension of Large Language Models",
    arxiv="2309.00071",
    claim="Interpolating slow rotations and leaving fast ones keeps perplexity and retrieval far beyond the trained "
    "length, where plain RoPE fails.",
    experiment=f"A 0.7M-parameter Llama trained at {TRAINED_LENGTH} tokens ({STEPS} steps, half text, half random "
    f"texts to be repeated) is evaluated at {EVAL_LENGTH} without further training. Control: no extension; also linear "
    "and NTK-aware.",
    confirms="the loss at positions 192 to 256 falls (95 % interval of the paired difference below zero) and no less "
    "is retrieved.",
    refutes="the loss rises, or less is retrieved.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("position", "held-out loss"),
    minutes=12,
)
