"""Preferences with some labels the wrong way round: DPO (Rafailov et al. 2023), conservative DPO (Mitchell 2023) and
robust DPO (Chowdhury et al. 2024, arXiv:2403.00409)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_quest.data.pairs import AnswerBatch, Pairs
from llm_quest.data.preferences import Rated
from llm_quest.data.problems import Part, Problem, draw
from llm_quest.data.problems.problem import chance
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import PreferenceLoss, answer_log_probs
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.papers.reverse import SCHOOL
from llm_quest.papers.school import beginner, run

PAIRS, ROWS, STEPS, EVERY, HELD_OUT = 512, 64, 80, 8, 500
RATE, BETA = 3e-4, 0.1
FLIPS = (0.0, 0.1, 0.2, 0.3)
LOSSES = {"DPO": "dpo", "cDPO": "cdpo", "robust": "robust"}
WORST = f"{FLIPS[-1]:.0%}"


def pair(problem: Problem, *, flipped: bool) -> Rated:
    """The word reversed beside its letters in another order; flipped: with the wrong label."""
    tokenizer, letters = SCHOOL.tokenizer, list(problem.answer)
    wrong, shuffle = problem.answer, chance("pair", problem.key)
    while wrong == problem.answer:
        shuffle.shuffle(letters)
        wrong = "".join(letters)
    prompt = [tokenizer.start_id, *tokenizer.encode(problem.prompt, template=False)]
    answers = [np.array([*tokenizer.encode(t, template=False), tokenizer.end_id]) for t in (problem.answer, wrong)]
    return Rated(np.array(prompt), tuple(reversed(answers)) if flipped else tuple(answers))


def pairs(part: Part, number: int, flips: float, seed: int) -> Pairs:
    """Of words with more than one letter in them."""
    drawn = (draw(SCHOOL.task, part, index, seed) for index in range(10 * number))
    some = [problem for problem in drawn if len(set(problem.answer)) > 1][:number]
    return Pairs([pair(p, flipped=chance("flip", seed, i).random() < flips) for i, p in enumerate(some)])


def known(model: Decoder, made: Pairs) -> Pairs:
    """With the reference's log-probabilities."""
    with torch.no_grad():
        found = answer_log_probs(model, made.batch(range(len(made)))).numpy()
    made.reference = list(found.reshape(-1, 2))
    return made


@dataclass
class Feed:
    """The same pairs again and again, in a new order every time."""

    made: Pairs
    seed: int

    def at(self, step: int) -> list[AnswerBatch]:
        epoch, place = divmod(step * ROWS, len(self.made))
        order = list(range(len(self.made)))
        chance("order", self.seed, epoch).shuffle(order)
        return [self.made.batch(order[place : place + ROWS])]

    def bookmark(self) -> dict[str, Any]:
        return {}

    def resume(self, bookmark: dict[str, Any]) -> None:
        """There is nothing to go on from."""


@dataclass
class Clean:
    """A probe: how many held-out pairs, all labelled rightly, have the better answer's reward above the other's."""

    made: Pairs
    every: int = EVERY
    name: str = "exam"

    @torch.no_grad()
    def measure(self, model: Any, step: int) -> Mapping[str, float]:
        told = PreferenceLoss(model, beta=BETA)(self.made.batch(range(len(self.made)))).metrics
        return {key: float(told[f"rewards/{key}"][0] / told[f"rewards/{key}"][1]) for key in ("accuracy", "margin")}


def arm(loss: str, flips: float) -> Callable[[int], Measured]:
    def measured(seed: int) -> Measured:
        model = beginner(SCHOOL, seed)
        learned = known(model, pairs("train", PAIRS, flips, seed))
        held = known(model, pairs("test", HELD_OUT, 0.0, 0))
        believed = flips if loss != "dpo" else 0.0
        objective = PreferenceLoss(model, loss=loss, beta=BETA, flips=believed)
        rows = run(objective, Feed(learned, seed), RATE, steps=STEPS, seed=seed, warmup=10, probes=[Clean(held)])
        curve = [(row["step"], row["exam/accuracy"]) for row in rows if "exam/accuracy" in row]
        return Measured({"accuracy": curve[-1][1], "margin": rows[-1]["exam/margin"]}, curve)

    return measured


ARMS = {
    f"{name}, {flips:.0%}": arm(loss, flips)
    for flips in FLIPS
    for name, loss in LOSSES.items()
    if flips or loss == "dpo"  # without flips all three are DPO
}


def judge(results: Results) -> Verdict:
    gaps = {
        f"{name} at {flips:.0%}": results.difference(f"{name}, {flips:.0%}", f"DPO, {flips:.0%}", "accuracy")
        for flips in FLIPS[1:]
        for name in ("robust", "cDPO")
    }
    words = "accuracy on clean held-out pairs, less DPO's: " + ", ".join(f"{name} {gap}" for name, gap in gaps.items())
    gain = gaps[f"robust at {WORST}"]
    if gain.positive or gain.negative:
        return Verdict("confirmed" if gain.positive else "refuted", words)
    return Verdict("no effect seen", words)


PAPER = Paper(
    name="label_noise",
    title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    arxiv="2403.00409",
    claim="Where labels are flipped at random, DPO's loss made unbiased (robust DPO) prefers rightly more often "
    "than DPO and than cDPO.",
    experiment=f"{PAIRS} pairs of a word reversed and its letters in another order, of which 0 to {WORST} have the "
    f"wrong label; the beginner of `quest reproduce reverse`; {STEPS} steps of {ROWS} pairs ({STEPS * ROWS // PAIRS} "
    f"epochs) at {RATE:g}, beta {BETA:g}, the flips known to cDPO and robust DPO. Control: DPO. Held out: {HELD_OUT} "
    "pairs of other words, all rightly labelled; accuracy: how often the better answer's reward is higher; margin: "
    "by how much.",
    confirms=f"at {WORST} robust DPO's accuracy is above DPO's, the 95 % interval of the paired difference above zero.",
    refutes="it is below, likewise.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "accuracy on clean held-out pairs"),
    minutes=4,
)
