"""Auxiliary-loss-free load balancing (Wang et al. 2024, arXiv:2408.15664) against no balancing and DeepSeek-V3's
sequence-wise loss. (The paper compares it with the Switch loss, over whole batches.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llm_quest.contracts import Callback
from llm_quest.models.build import preset
from llm_quest.objectives.next_token import NextToken
from llm_quest.papers.lab import LENGTH, VOCAB, fresh, held_out_loss, text, trained
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.techniques.expert_bias import BalanceExperts
from llm_quest.train.optimizers import adamw

STEPS, RATE, TAIL = 300, 2e-3, 10
VIOLATION = "max_violation"
COST = 0.02
"""Nats of held-out loss that count as a cost."""


def config() -> Any:
    """DeepSeek-V3's page, small: 16 experts of which a token uses 2, no groups, no lookahead modules."""
    tiny, plain = preset("deepseek-v3-tiny").config, {"expert_groups": 1, "top_groups": 1, "lookahead": 0}
    return replace(tiny, vocab=VOCAB, context=LENGTH, width=96, experts=16, top=2, expert_hidden=48, **plain)


def arm(callbacks: Callable[[], Sequence[Callback]], losses: dict[str, float]) -> Callable[[int], Measured]:
    def run(seed: int) -> Measured:
        model = fresh(config(), seed)
        objective = NextToken(model, router=losses)
        rides = list(callbacks())
        trace = trained(objective, text().feed(seed), adamw(model, lr=RATE), steps=STEPS, seed=seed, callbacks=rides)
        violations = [(row["step"], row[VIOLATION]) for row in trace.metrics]
        tail = sum(value for _, value in violations[-TAIL:]) / TAIL
        loss = held_out_loss(model, text().held_out())
        return Measured({"MaxVio": tail, "held-out loss": loss}, violations)

    return run


ARMS = {
    "no balancing": arm(lambda: (), {}),
    "bias": arm(lambda: (BalanceExperts(0.01),), {}),
    "auxiliary loss": arm(lambda: (), {"sequence_balancing": 0.01}),
}


def judge(results: Results) -> Verdict:
    balance = results.difference("bias", "no balancing", "MaxVio")
    cost = results.difference("bias", "no balancing", "held-out loss")
    words = f"the bias changes MaxVio by {balance} and the held-out loss by {cost} nats"
    if balance.negative and cost.mean < COST:
        return Verdict("confirmed", words)
    return Verdict("refuted" if balance.positive or cost.mean - cost.half > COST else "no effect seen", words)


PAPER = Paper(
    name="expert_bias",
    title="Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    arxiv="2408.15664",
    claim="A bias that only chooses experts, nudged after every step, balances the load at no cost in loss.",
    experiment="DeepSeek-V3's page with 16 small experts, of which a token uses 2, "
    f"{STEPS} steps of 2,048 tokens on Python's documentation; MaxVio is the mean over the last {TAIL} logged steps. "
    "The bias moves by 0.01 a step (the paper: 0.001, over far more steps). Control: no balancing; beside it "
    "DeepSeek-V3's sequence-wise auxiliary loss, times 0.01 (the paper compares with the Switch loss).",
    confirms="MaxVio falls (95 % interval of the paired difference below zero) and the held-out loss rises by less "
    f"than {COST} nats.",
    refutes=f"MaxVio rises, or the loss rises by more than {COST} beyond its interval.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "MaxVio (largest load over the mean, minus one)"),
    minutes=9,
)
