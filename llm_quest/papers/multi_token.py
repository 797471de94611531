"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): what the added module costs or brings the main
loss, and how often its guess is what the model says next."""

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
    """How often the module's likeliest token is the one the model itself finds likeliest a step later: what a greedy
    verifier would accept, on held-out text."""
    agreed = asked = 0
    model.eval()
    for batch in lab_text().held_out(tokens=10_000):
        scope = batch_scope(batch)
        h = model.hidden_states(batch.input_ids, scope)
        said = model.head(h).argmax(dim=-1)
        further = Scope(shift_position_ids(scope, 1), segment_ids=scope.segment_ids)
        guess = model.head(
            model.mtp_modules[0](h, model.embed(shift_left(batch.input_ids, 1, 0), further), further)
        ).argmax(dim=-1)
        there = (shift_left(batch.targets, 1, IGNORE_INDEX) != IGNORE_INDEX) & (further.position_ids >= 0)
        agreed += int(((guess == shift_left(said, 1, -1)) & there).sum())
        asked += int(there.sum())
    model.train()
    return agreed / asked


ARMS = {"next token": make_arm(0), "with one module": make_arm(1)}


def verdict(results: ExperimentResults) -> Verdict:
    cost = results.difference("with one module", "next token", "held-out loss")
    share = results.interval("with one module", "acceptance")
    words = f"the module changes the main held-out loss by {cost} nats, and {share} of its guesses are the model's own"
    if cost.mean + cost.half_width < MAX_LOSS_INCREASE and share.mean - share.half_width > REQUIRED_ACCEPTANCE:
        return Verdict("confirmed", words)
    refuted = cost.mean - cost.half_width > MAX_LOSS_INCREASE or share.mean + share.half_width < REQUIRED_ACCEPTANCE
    return Verdict("refuted" if refuted else "no effect seen", words)


PAPER = Paper(
    name="multi_token",
    title="DeepSeek-V3 Technical Report (multi-token prediction)",
    arxiv="2412.19437",
    claim="A module that predicts one token further does not hurt the main loss, and its guesses are good drafts (85 "
    "to 90 % accepted at their size).",
    experiment=f"A 0.9M-parameter Llama with one added module, lambda {WEIGHT:g}, {STEPS} steps of 2,048 tokens on "
    "Python's documentation. Control: next-token prediction alone, same data order and first values.",
    confirms=f"the main held-out loss rises by less than {MAX_LOSS_INCREASE} nats, and more than "
    f"{REQUIRED_ACCEPTANCE:.0%} of the guesses are what the model itself says next (a small model's drafts are worse "
    "than a large one's; chance is 0.1 %).",
    refutes="it costs more, or fewer are.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "training loss (with the module's)"),
    minutes=8,
)
