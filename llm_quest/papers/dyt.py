"""Dynamic Tanh (Zhu et al. 2025, arXiv:2503.10622) instead of RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.papers.lab import held_out_loss, init_lab_model, lab_text, small_llama_config, train_lab_model
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.train.optimizers import make_adamw

STEPS, LEARNING_RATE, MARGIN = 250, 2e-3, 0.03


def make_arm(technique: DyT | None) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model: Any = init_lab_model(small_llama_config(), seed)
        model = model if technique is None else technique(model).train()
        trace = train_lab_model(
            NextTokenLoss(model), lab_text().loader(seed), make_adamw(model, lr=LEARNING_RATE), steps=STEPS, seed=seed
        )
        return Measurement({"held-out loss": held_out_loss(model, lab_text().held_out())}, trace.losses)

    return run_arm


ARMS = {"RMSNorm": make_arm(None), "DyT": make_arm(DyT()), "DyT, LLaMA form": make_arm(DyT(form="llama"))}


def verdict(results: ExperimentResults) -> Verdict:
    plain, llama = (results.difference(name, "RMSNorm", "held-out loss") for name in ("DyT", "DyT, LLaMA form"))
    words = f"against RMSNorm the held-out loss changes by {plain} nats with DyT and by {llama} in its LLaMA form"
    if llama.mean + llama.half_width < MARGIN:
        return Verdict("confirmed", words)
    return Verdict("refuted" if llama.mean - llama.half_width > MARGIN else "no effect seen", words)


PAPER = Paper(
    name="dyt",
    title="Transformers without Normalization",
    arxiv="2503.10622",
    claim="tanh(alpha x) instead of every norm matches or exceeds the normalized model.",
    experiment=f"A 0.9M-parameter Llama, {STEPS} steps of 2,048 tokens on Python's manual, AdamW at "
    f"{LEARNING_RATE:g}, the same data order. Control: RMSNorm.",
    confirms=f"the LLaMA form's held-out loss is at most {MARGIN} nats above RMSNorm's (upper end).",
    refutes=f"it is more than {MARGIN} above (lower end).",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "training loss"),
    minutes=9,
    notes="A later study (arXiv:2604.23434) reports that DyT helps where data are scarce and hurts where they are "
    "not, that the benefit vanishes as the model grows, and that a Llama collapses with DyT because of its SwiGLU. "
    "This experiment, a Llama on scarce data, agrees with the last.",
)
