"""LoRA and its kin (arXiv:2106.09685, 2405.17604 and others): how much of full fine-tuning do how few numbers buy?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_quest.contracts import Technique
from llm_quest.models.build import count_parameters
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextToken
from llm_quest.papers.lab import fresh, held_out_loss, remembered, small_llama, text, trained
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.techniques.lora import LoRA, TinyLoRA
from llm_quest.train.optimizers import adamw

BASE_STEPS, STEPS, WANTED = 300, 120, 0.75
SOURCE = "builtin:source"


def base(seed: int) -> Decoder:
    """A model that has read documentation, and no code."""

    def make() -> Decoder:
        model = fresh(small_llama(), seed)
        trained(NextToken(model), text().feed(seed), adamw(model, lr=2e-3), steps=BASE_STEPS, seed=seed)
        return model

    return remembered("lora-base", seed, small_llama(), make)


def arm(technique: Technique | None, rate: float) -> Callable[[int], Measured]:
    def run(seed: int) -> Measured:
        model: Any = base(seed)
        before = held_out_loss(model, text(SOURCE).held_out())
        model = model if technique is None else technique(model).train()
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trace = trained(NextToken(model), text(SOURCE).feed(seed), adamw(model, lr=rate), steps=STEPS, seed=seed)
        after = held_out_loss(model, text(SOURCE).held_out())
        share = learned / count_parameters(base(seed))
        return Measured({"trained share": share, "held-out loss": after, "gain": before - after}, trace.losses)

    return run


ARMS = {
    "full": arm(None, 2e-3),
    "LoRA, rank 8": arm(LoRA(rank=8), 5e-3),
    "LoRA, rank 1": arm(LoRA(rank=1), 5e-3),
    "TinyLoRA": arm(TinyLoRA(), 2e-2),
}


def judge(results: Results) -> Verdict:
    parts = []
    shares = {}
    for name in list(ARMS)[1:]:
        pairs = zip(results.values(name, "gain"), results.values("full", "gain"), strict=True)
        ratios = [gain / full for gain, full in pairs]
        shares[name] = sum(ratios) / len(ratios)
        parts.append(f"{name} {shares[name]:.0%} with {results.span(name, 'trained share').mean:.2%} of the parameters")
    words = f"of the gain of full fine-tuning: {'; '.join(parts)}"
    return Verdict("confirmed" if shares["LoRA, rank 8"] >= WANTED else "refuted", words)


PAPER = Paper(
    name="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    arxiv="2106.09685",
    claim="Low-rank updates of few parameters do what fine-tuning all of them does (the paper: on a par, with 0.01 % "
    "of GPT-3's). Asked here of a small model, with bounds of our own: a few per cent buy most of it.",
    experiment=f"A 0.9M-parameter Llama that has read Python's manual ({BASE_STEPS} steps) learns its source code "
    f"({STEPS} steps of 2,048 tokens), each form at a rate of its own. Control: all parameters.",
    confirms=f"rank 8 reaches at least {WANTED:.0%} of the gain in held-out loss.",
    refutes="it reaches less.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "training loss on source code"),
    minutes=12,
)
