"""Auxiliary-loss-free load balancing (Wang et al. 2024, arXiv:2408.15664) against no balancing and DeepSeek-V3's
sequence-wise loss. (The paper compares it with the Switch loss, over whole batches.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llm_quest.contracts import Callback
from llm_quest.models.build import preset
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.papers.lab import (
    LAB_SEQUENCE_LENGTH,
    LAB_VOCAB_SIZE,
    held_out_loss,
    init_lab_model,
    lab_text,
    train_lab_model,
)
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.techniques.expert_bias import ExpertBiasBalancer
from llm_quest.train.optimizers import make_adamw

STEPS, LEARNING_RATE, LAST_ROWS = 300, 2e-3, 10
VIOLATION = "max_violation"
ALLOWED_COST = 0.02
"""An increase of held-out loss in nats that is accepted."""


def small_moe_config() -> Any:
    """A small DeepSeek-V3: 16 experts of which a token uses 2, without expert groups and multi-token modules."""
    tiny, plain = preset("deepseek-v3-tiny").config, {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
    return replace(
        tiny,
        vocab_size=LAB_VOCAB_SIZE,
        max_position_embeddings=LAB_SEQUENCE_LENGTH,
        hidden_size=96,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        **plain,
    )


def make_arm(callbacks: Callable[[], Sequence[Callback]], losses: dict[str, float]) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model = init_lab_model(small_moe_config(), seed)
        objective = NextTokenLoss(model, router_coefs=losses)
        trace = train_lab_model(
            objective,
            lab_text().loader(seed),
            make_adamw(model, lr=LEARNING_RATE),
            steps=STEPS,
            seed=seed,
            callbacks=callbacks(),
        )
        violations = [(row["step"], row[VIOLATION]) for row in trace.metrics]
        tail = sum(value for _, value in violations[-LAST_ROWS:]) / LAST_ROWS
        loss = held_out_loss(model, lab_text().held_out())
        return Measurement({"MaxVio": tail, "held-out loss": loss}, violations)

    return run_arm


ARMS = {
    "no balancing": make_arm(lambda: (), {}),
    "bias": make_arm(lambda: (ExpertBiasBalancer(0.01),), {}),
    "auxiliary loss": make_arm(lambda: (), {"sequence_balancing": 0.01}),
}


def verdict(results: ExperimentResults) -> Verdict:
    balance = results.difference("bias", "no balancing", "MaxVio")
    cost = results.difference("bias", "no balancing", "held-out loss")
    words = f"the bias changes MaxVio by {balance} and the held-out loss by {cost} nats"
    if balance.negative and cost.mean < ALLOWED_COST:
        return Verdict("confirmed", words)
    return Verdict(
        "refuted" if balance.positive or cost.mean - cost.half_width > ALLOWED_COST else "no effect seen", words
    )


PAPER = Paper(
    name="expert_bias",
    title="Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    arxiv="2408.15664",
    claim="A bias that affects only the choice of experts and is updated after every step balances the load without a "
    "cost in loss.",
    experiment=f"A DeepSeek-V3 with 16 small experts, of which a token uses 2, {STEPS} steps of 2,048 tokens on "
    f"Python's documentation; MaxVio is the mean over the last {LAST_ROWS} logged steps. The bias changes by 0.01 a "
    "step (the paper: 0.001, over far more steps). Control: no balancing; also DeepSeek-V3's sequence-wise "
    "auxiliary loss, times 0.01 (the paper compares with the Switch loss).",
    confirms="MaxVio falls (95 % interval of the paired difference below zero) and the held-out loss rises by less "
    f"than {ALLOWED_COST} nats.",
    refutes=f"MaxVio rises, or the loss rises by more than {ALLOWED_COST} beyond its interval.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "MaxVio (largest load over the mean, minus one)"),
    minutes=9,
)
