"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): what the added module costs or brings the main
loss, and how often its guess is what the model says next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_quest.data.batch import IGNORE
from llm_quest.layers.multi_token import ahead, positions_ahead
from llm_quest.objectives.next_token import NextToken, scope_of
from llm_quest.papers.lab import fresh, held_out_loss, small_llama, text, trained
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.scope import Scope
from llm_quest.techniques.multi_token import MultiToken
from llm_quest.train.optimizers import adamw

STEPS, RATE, WEIGHT, COST, WANTED = 300, 2e-3, 0.3, 0.03, 0.3


def arm(depth: int) -> Callable[[int], Measured]:
    def run(seed: int) -> Measured:
        model: Any = fresh(small_llama(), seed)
        model = MultiToken(depth)(model).train() if depth else model
        objective = NextToken(model, lookahead=WEIGHT if depth else 0.0)
        trace = trained(objective, text().feed(seed), adamw(model, lr=RATE), steps=STEPS, seed=seed)
        numbers = {"held-out loss": held_out_loss(model, text().held_out(), main_only)}
        return Measured(numbers | ({"acceptance": acceptance(model)} if depth else {}), trace.losses)

    return run


def main_only(model: Any) -> NextToken:
    return NextToken(model, lookahead=0.0)


@torch.no_grad()
def acceptance(model: Any) -> float:
    """How often the module's likeliest token is the one the model itself finds likeliest a step later: what a greedy
    verifier would accept, on held-out text."""
    agreed = asked = 0
    model.eval()
    for batch in text().held_out(tokens=10_000):
        scope = scope_of(batch)
        h = model.hidden(batch.tokens, scope)
        said = model.head(h).argmax(dim=-1)
        further = Scope(positions_ahead(scope, 1), segments=scope.segments)
        guess = model.head(model.lookahead[0](h, model.embed(ahead(batch.tokens, 1, 0), further), further)).argmax(
            dim=-1
        )
        there = (ahead(batch.targets, 1, IGNORE) != IGNORE) & (further.positions >= 0)
        agreed += int(((guess == ahead(said, 1, -1)) & there).sum())
        asked += int(there.sum())
    model.train()
    return agreed / asked


ARMS = {"next token": arm(0), "with one module": arm(1)}


def judge(results: Results) -> Verdict:
    cost = results.difference("with one module", "next token", "held-out loss")
    share = results.span("with one module", "acceptance")
    words = f"the module changes the main held-out loss by {cost} nats, and {share} of its guesses are the model's own"
    if cost.mean + cost.half < COST and share.mean - share.half > WANTED:
        return Verdict("confirmed", words)
    refuted = cost.mean - cost.half > COST or share.mean + share.half < WANTED
    return Verdict("refuted" if refuted else "no effect seen", words)


PAPER = Paper(
    name="multi_token",
    title="DeepSeek-V3 Technical Report (multi-token prediction)",
    arxiv="2412.19437",
    claim="A module that predicts one token further does not hurt the main loss, and its guesses are good drafts (85 "
    "to 90 % accepted at their size).",
    experiment=f"A 0.9M-parameter Llama with one added module, lambda {WEIGHT:g}, {STEPS} steps of 2,048 tokens on "
    "Python's documentation. Control: next-token prediction alone, same data order and first values.",
    confirms=f"the main held-out loss rises by less than {COST} nats, and more than {WANTED:.0%} of the guesses are "
    "what the model itself says next (a small model's drafts are worse than a large one's; chance is 0.1 %).",
    refutes="it costs more, or fewer are.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "training loss (with the module's)"),
    minutes=8,
)
