"""QK-Clip (Kimi K2, arXiv:2507.20534) and soft-capping (Gemma 2, arXiv:2408.00118): attention logits stay bounded at a
learning rate at which those of the plain model do not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.papers.lab import held_out_loss, init_lab_model, lab_text, small_llama_config, train_lab_model
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.softcap import SoftCap
from llm_quest.train.optimizers import make_muon

STEPS, LEARNING_RATE, TAU = 200, 0.05, 20.0
NO_CLIP = 1e9


def make_arm(qk_clip: QKClip, cap: float | None = None) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        model: Any = init_lab_model(small_llama_config(), seed)
        if cap is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = SoftCap(attention=cap, final=None)(model)
        model = qk_clip(model)
        optimizer = make_muon(model, lr=LEARNING_RATE, row_splits=model.row_splits(), weight_decay=0.0)
        trace = train_lab_model(
            NextTokenLoss(model),
            lab_text().loader(seed),
            optimizer,
            steps=STEPS,
            seed=seed,
            callbacks=[qk_clip],
            shape="constant",
        )
        logits = [(row["step"], capped_logit(row["max_logit"], cap)) for row in trace.metrics]
        largest = max(value for _, value in logits[len(logits) // 2 :])
        return Measurement(
            {"largest logit": largest, "held-out loss": held_out_loss(model, lab_text().held_out())}, logits
        )

    return run_arm


def capped_logit(logit: float, cap: float | None) -> float:
    """The logit that enters the softmax: QK-Clip measures it before the cap."""
    return logit if cap is None else cap * math.tanh(logit / cap)


ARMS = {
    "plain": make_arm(QKClip(tau=NO_CLIP, magnitude=True)),
    "QK-Clip": make_arm(QKClip(tau=TAU, magnitude=True)),
    "soft cap": make_arm(QKClip(tau=NO_CLIP, magnitude=True), cap=TAU),
}


def verdict(results: ExperimentResults) -> Verdict:
    plain, clipped = results.interval("plain", "largest logit"), results.interval("QK-Clip", "largest logit")
    gap = results.difference("QK-Clip", "plain", "held-out loss")
    words = (
        f"in the second half of training the plain model's largest logit is {plain}, with QK-Clip {clipped} and with "
        f"the cap {results.interval('soft cap', 'largest logit')}; QK-Clip changes the held-out loss by {gap} nats"
    )
    if plain.mean - plain.half_width <= 2 * TAU:
        return Verdict("no effect seen", words + "; the plain model's logits did not grow")
    held = clipped.mean < 2 * TAU and not gap.positive
    return Verdict("confirmed" if held else "refuted", words)


PAPER = Paper(
    name="qk_clip",
    title="Kimi K2: Open Agentic Intelligence (QK-Clip), with Gemma 2's soft-capping",
    arxiv="2507.20534",
    claim="Rescaling query and key weights after the step keeps attention logits near tau, without a cost in loss, "
    "where they grow under Muon alone.",
    experiment=f"A 0.9M-parameter Llama under Muon at a constant rate of {LEARNING_RATE} without weight decay, "
    f"{STEPS} steps, tau and cap {TAU:g}. Control: the plain model, measured the same way. Logit: the largest "
    "magnitude over all heads.",
    confirms=f"the plain model's logits pass {2 * TAU:g}, those under QK-Clip do not (they may pass tau for one step, "
    "before the clip), and its held-out loss is not higher.",
    refutes="QK-Clip's logits grow too, or it costs loss.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "largest attention logit", log=True),
    minutes=8,
)
