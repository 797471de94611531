"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): the effect of the added module on the main loss,
and how often its prediction equals the next prediction of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.layers.multi_token_prediction import shift_left, shift_position_ids
from llm_quest.objectives.next_token import NextTokenLoss, batch_scope
from llm_quest.papers.lab import held_out_loss, init_lab_model, lab_text, small_llama_config, train_lab_model
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.scope import Scope
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from llm_quest.train.optimizers import make_adamw

STEPS, LEARNING_RATE, WEIGHT, MAX_LOSS_INCREASE, REQUIRED_ACCEPTANCE = 300, 2e-3, 0.3, 0.03, 0.3


def make_arm(depth: int) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model: Any = init_lab_model(small_llama_config(), seed)
        model = MultiTokenPrediction(depth)(model).train() if depth else model
        objective = NextTokenLoss(model, mtp_weight=WEIGHT if depth else 0.0)
        trace = train_lab_model(
            objective, lab_text().loader(seed), make_adamw(model, lr=LEARNING_RATE), steps=STEPS, seed=seed
        )
        numbers = {"held-out loss": held_out_loss(model, lab_text().held_out(), main_loss_only)}
        return Measurement(numbers | ({"acceptance": acceptance_rate(model)} if depth else {}), trace.losses)

    return run_arm


def main_loss_only(model: Any) -> NextTokenLoss:
    return NextTokenLoss(model, mtp_weight=0.0)


@torch.no_grad()
def acceptance_rate(model: Any) -> float:
    """How often the module's most likely token is the one that the model finds most likely a step later: the acceptance
    rate of greedy speculative decoding, on held-out text."""
    accepted = total = 0
    model.eval()
    for batch in lab_text().held_out(tokens=10_000):
        scope = batch_scope(batch)
        h = model.hidden_states(batch.input_ids, scope)
        predicted = model.head(h).argmax(dim=-1)
        shifted = Scope(shift_position_ids(scope, 1), segment_ids=scope.segment_ids)
        guess = model.head(
            model.mtp_modules[0](h, model.embed(shift_left(batch.input_ids, 1, 0), shifted), shifted)
        ).argmax(dim=-1)
        valid = (shift_left(batch.targets, 1, IGNORE_INDEX) != IGNORE_INDEX) & (shifted.position_ids >= 0)
        accepted += int(((guess == shift_left(predicted, 1, -1)) & valid).sum())
        total += int(valid.sum())
    model.train()
    return accepted / total


ARMS = {"next token": make_arm(0), "with one module": make_arm(1)}


def verdict(results: ExperimentResults) -> Verdict:
    cost = results.difference("with one module", "next token", "held-out loss")
    share = results.interval("with one module", "acceptance")
    words = (
        f"the module changes the main held-out loss by {cost} nats, and {share} of its predictions are the model's own"
    )
    if cost.mean + cost.half_width < MAX_LOSS_INCREASE and share.mean - share.half_width > REQUIRED_ACCEPTANCE:
        return Verdict("confirmed", words)
    refuted = cost.mean - cost.half_width > MAX_LOSS_INCREASE or share.mean + share.half_width < REQUIRED_ACCEPTANCE
    return Verdict("refuted" if refuted else "no effect seen", words)


PAPER = Paper(
    name="multi_token",
    title="DeepSeek-V3 Technical Report (multi-token prediction)",
    arxiv="2412.19437",
    claim="A module that predicts one token further does not hurt the main loss, and its predictions are good drafts "
    "(85 to 90 % accepted at their size).",
    experiment=f"A 0.9M-parameter Llama with one added module, lambda {WEIGHT:g}, {STEPS} steps of 2,048 tokens on "
    "Python's documentation. Control: next-token prediction alone, same data order and initial weights.",
    confirms=f"the main held-out loss rises by less than {MAX_LOSS_INCREASE} nats, and more than "
    f"{REQUIRED_ACCEPTANCE:.0%} of the predictions are what the model itself predicts next (a small model's drafts "
    "are worse than a large one's; chance is 0.1 %).",
    refutes="the loss rises by more, or fewer are.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "training loss (with the module's)"),
    minutes=8,
)
