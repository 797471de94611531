"""QK-Clip (Kimi K2, arXiv:2507.20534) and soft-capping (Gemma 2, arXiv:2408.00118): attention logits stay bounded at a
learning rate at which those of the plain model do not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from llm_quest.objectives.next_token import NextToken
from llm_quest.papers.lab import fresh, held_out_loss, small_llama, text, trained
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.softcap import SoftCap
from llm_quest.train.optimizers import muon

STEPS, RATE, TAU = 200, 0.05, 20.0
NEVER = 1e9


def arm(watch: QKClip, cap: float | None = None) -> Callable[[int], Measured]:
    def run(seed: int) -> Measured:
        model: Any = fresh(small_llama(), seed)
        if cap is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = SoftCap(attention=cap, final=None)(model)
        model = watch(model)
        optimizer = muon(model, lr=RATE, splits=model.row_splits(), weight_decay=0.0)
        trace = trained(
            NextToken(model), text().feed(seed), optimizer, steps=STEPS, seed=seed, callbacks=[watch], shape="constant"
        )
        seen = [(row["step"], bounded(row["max_logit"], cap)) for row in trace.metrics]
        largest = max(value for _, value in seen[len(seen) // 2 :])
        return Measured({"largest logit": largest, "held-out loss": held_out_loss(model, text().held_out())}, seen)

    return run


def bounded(logit: float, cap: float | None) -> float:
    """What the softmax sees: QK-Clip's watch measures before the cap."""
    return logit if cap is None else cap * math.tanh(logit / cap)


ARMS = {
    "plain": arm(QKClip(tau=NEVER, magnitude=True)),
    "QK-Clip": arm(QKClip(tau=TAU, magnitude=True)),
    "soft cap": arm(QKClip(tau=NEVER, magnitude=True), cap=TAU),
}


def judge(results: Results) -> Verdict:
    plain, clipped = results.span("plain", "largest logit"), results.span("QK-Clip", "largest logit")
    gap = results.difference("QK-Clip", "plain", "held-out loss")
    words = (
        f"in the second half of training the plain model's largest logit is {plain}, with QK-Clip {clipped} and with "
        f"the cap {results.span('soft cap', 'largest logit')}; QK-Clip changes the held-out loss by {gap} nats"
    )
    if plain.mean - plain.half <= 2 * TAU:
        return Verdict("no effect seen", words + "; the plain model's logits did not grow")
    held = clipped.mean < 2 * TAU and not gap.positive
    return Verdict("confirmed" if held else "refuted", words)


PAPER = Paper(
    name="qk_clip",
    title="Kimi K2: Open Agentic Intelligence (QK-Clip), beside Gemma 2's soft-capping",
    arxiv="2507.20534",
    claim="Rescaling query and key weights after the step keeps attention logits near tau, at no cost in loss, where "
    "Muon alone lets them grow.",
    experiment=f"A 0.9M-parameter Llama under Muon at a constant rate of {RATE} without weight decay, {STEPS} steps, "
    f"tau and cap {TAU:g}. Control: the plain model, measured alike. A logit: the largest magnitude over all heads.",
    confirms=f"the plain model's logits pass {2 * TAU:g}, those under QK-Clip do not (they may pass tau for one step, "
    "before the clip), and its held-out loss is not higher.",
    refutes="QK-Clip's logits grow too, or it costs loss.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "largest attention logit", log=True),
    minutes=8,
)
