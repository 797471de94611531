"""LoRA and TinyLoRA (arXiv:2106.09685, 2405.17604 and others): how much of the gain of full fine-tuning do few
parameters reach?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_quest.contracts import Technique
from llm_quest.models.build import count_parameters
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.papers.lab import (
    cached_model,
    held_out_loss,
    init_lab_model,
    lab_text,
    small_llama_config,
    train_lab_model,
)
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.techniques.lora import LoRA, TinyLoRA
from llm_quest.train.optimizers import make_adamw

BASE_STEPS, STEPS, REQUIRED_SHARE = 300, 120, 0.75
SOURCE = "builtin:source"


def lora_base_model(seed: int) -> Decoder:
    """A model trained on documentation and not on code."""

    def make() -> Decoder:
        model = init_lab_model(small_llama_config(), seed)
        train_lab_model(
            NextTokenLoss(model), lab_text().loader(seed), make_adamw(model, lr=2e-3), steps=BASE_STEPS, seed=seed
        )
        return model

    return cached_model("lora-base", seed, small_llama_config(), make)


def make_arm(technique: Technique | None, rate: float) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model: Any = lora_base_model(seed)
        before = held_out_loss(model, lab_text(SOURCE).held_out())
        model = model if technique is None else technique(model).train()
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trace = train_lab_model(
            NextTokenLoss(model), lab_text(SOURCE).loader(seed), make_adamw(model, lr=rate), steps=STEPS, seed=seed
        )
        after = held_out_loss(model, lab_text(SOURCE).held_out())
        share = num_trained / count_parameters(lora_base_model(seed))
        return Measurement({"trained share": share, "held-out loss": after, "gain": before - after}, trace.losses)

    return run_arm


ARMS = {
    "full": make_arm(None, 2e-3),
    "LoRA, rank 8": make_arm(LoRA(rank=8), 5e-3),
    "LoRA, rank 1": make_arm(LoRA(rank=1), 5e-3),
    "TinyLoRA": make_arm(TinyLoRA(), 2e-2),
}


def verdict(results: ExperimentResults) -> Verdict:
    parts = []
    shares = {}
    for name in list(ARMS)[1:]:
        pairs = zip(results.values(name, "gain"), results.values("full", "gain"), strict=True)
        ratios = [gain / full for gain, full in pairs]
        shares[name] = sum(ratios) / len(ratios)
        parts.append(
            f"{name} {shares[name]:.0%} with {results.interval(name, 'trained share').mean:.2%} of the parameters"
        )
    words = f"of the gain of full fine-tuning: {'; '.join(parts)}"
    return Verdict("confirmed" if shares["LoRA, rank 8"] >= REQUIRED_SHARE else "refuted", words)


PAPER = Paper(
    name="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    arxiv="2106.09685",
    claim="Low-rank updates of few parameters do what fine-tuning all of them does (the paper: on a par, with 0.01 % "
    "of GPT-3's). Tested here on a small model with bounds of our own: a few per cent of the parameters reach most of "
    "it.",
    experiment=f"A 0.9M-parameter Llama trained on Python's manual ({BASE_STEPS} steps) is fine-tuned on its source "
    f"code ({STEPS} steps of 2,048 tokens), each form at a learning rate of its own. Control: all parameters.",
    confirms=f"rank 8 reaches at least {REQUIRED_SHARE:.0%} of the gain in held-out loss.",
    refutes="it reaches less.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "training loss on source code"),
    minutes=12,
)
