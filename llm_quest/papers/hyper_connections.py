"""Hyper-connections (Zhu et al. 2024, arXiv:2409.19606) and their manifold-constrained form (mHC, arXiv:2512.24880)
against plain residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.papers.lab import held_out_loss, init_lab_model, lab_text, small_llama_config, train_lab_model
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict, verdict_from_interval
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.train.optimizers import make_adamw

STEPS, LEARNING_RATE, DEPTHS = 150, 2e-3, (3, 9)


def make_arm(depth: int, technique: HyperConnections | None) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model: Any = init_lab_model(small_llama_config(width=64, layers=depth), seed)
        model = model if technique is None else technique(model).train()
        trace = train_lab_model(
            NextTokenLoss(model), lab_text().loader(seed), make_adamw(model, lr=LEARNING_RATE), steps=STEPS, seed=seed
        )
        return Measurement({"held-out loss": held_out_loss(model, lab_text().held_out())}, trace.losses)

    return run_arm


KINDS = {"residual": None, "HC": HyperConnections(2, "dynamic"), "mHC": HyperConnections(2, "manifold")}
ARMS = {f"{name}, {depth} layers": make_arm(depth, kind) for depth in DEPTHS for name, kind in KINDS.items()}


def verdict(results: ExperimentResults) -> Verdict:
    deep = DEPTHS[-1]
    gains = {
        (name, depth): results.difference(f"{name}, {depth} layers", f"residual, {depth} layers", "held-out loss")
        for name in ("HC", "mHC")
        for depth in DEPTHS
    }
    gaps = "; ".join(f"{name} at {depth} layers {gain}" for (name, depth), gain in gains.items())
    return verdict_from_interval(
        gains["mHC", deep], f"change of the held-out loss against residuals, nats: {gaps}", wanted="negative"
    )


PAPER = Paper(
    name="hyper_connections",
    title="mHC: Manifold-Constrained Hyper-Connections",
    arxiv="2512.24880",
    claim="Several residual streams with learned, doubly stochastic mixing lower the loss, more so in deeper models.",
    experiment=f"Llamas of width 64 with {DEPTHS[0]} and {DEPTHS[1]} layers, two streams, {STEPS} steps of 2,048 "
    "tokens on Python's documentation, AdamW. Control: plain residuals at the same depth.",
    confirms=f"mHC's held-out loss at {DEPTHS[1]} layers lies below the plain model's (95 % interval).",
    refutes="it lies above, the interval above zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "training loss"),
    minutes=14,
)
