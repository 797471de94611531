"""Preferences with some labels flipped: DPO (Rafailov et al. 2023), conservative DPO (Mitchell 2023) and
robust DPO (Chowdhury et al. 2024, arXiv:2403.00409)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.problems import Problem, SplitName, draw_problem
from llm_quest.data.problems.problem import make_rng
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import PreferenceLoss, sequence_log_probs
from llm_quest.objectives.preference_losses import DPO, make_preference_loss
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.papers.reverse import EXPERIMENT
from llm_quest.papers.rl_lab import base_policy, train_for_steps

PAIRS, ROWS, STEPS, EVERY, HELD_OUT = 512, 64, 80, 8, 500
LEARNING_RATE, BETA = 3e-4, 0.1
FLIP_RATES = (0.0, 0.1, 0.2, 0.3)
LOSS_TYPES = {"DPO": "dpo", "cDPO": "cdpo", "robust": "robust"}
HIGHEST_RATE = f"{FLIP_RATES[-1]:.0%}"


def make_pair(problem: Problem, *, flipped: bool) -> TokenizedPreference:
    """The reversed word against its letters in another order; flipped: with the wrong label."""
    tokenizer, letters = EXPERIMENT.tokenizer, list(problem.answer)
    wrong, shuffle = problem.answer, make_rng("pair", problem.key)
    while wrong == problem.answer:
        shuffle.shuffle(letters)
        wrong = "".join(letters)
    prompt = [tokenizer.start_token_id, *tokenizer.encode(problem.prompt, add_special_tokens=False)]
    answers = [
        np.array([*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id])
        for t in (problem.answer, wrong)
    ]
    return TokenizedPreference(np.array(prompt), tuple(reversed(answers)) if flipped else tuple(answers))


def make_pairs(part: SplitName, number: int, flips: float, seed: int) -> PreferenceDataset:
    """Pairs of words with more than one distinct letter."""
    drawn = (draw_problem(EXPERIMENT.task, part, index, seed) for index in range(10 * number))
    some = [problem for problem in drawn if len(set(problem.answer)) > 1][:number]
    return PreferenceDataset(
        [make_pair(p, flipped=make_rng("flip", seed, i).random() < flips) for i, p in enumerate(some)]
    )


def add_reference_log_probs(model: Decoder, pairs: PreferenceDataset) -> PreferenceDataset:
    """Adds the log-probabilities of the reference model."""
    with torch.no_grad():
        log_probs = sequence_log_probs(model, pairs.collate(range(len(pairs)))).numpy()
    pairs.reference_log_probs = list(log_probs.reshape(-1, 2))
    return pairs


@dataclass
class RepeatedPairsLoader:
    """The same pairs in every epoch, in a new order each time."""

    pairs: PreferenceDataset
    seed: int

    def batches(self, step: int) -> list[PreferenceBatch]:
        epoch, place = divmod(step * ROWS, len(self.pairs))
        order = list(range(len(self.pairs)))
        make_rng("order", self.seed, epoch).shuffle(order)
        return [self.pairs.collate(order[place : place + ROWS])]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: batches are a function of the step."""


@dataclass
class CleanPairsEvaluator:
    """The share of held-out pairs, all labelled correctly, in which the better answer has the higher reward."""

    pairs: PreferenceDataset
    interval: int = EVERY
    name: str = "eval"

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        metrics = PreferenceLoss(model, DPO(BETA))(self.pairs.collate(range(len(self.pairs)))).metrics
        return {
            key: float(metrics[f"rewards/{key}"][0] / metrics[f"rewards/{key}"][1]) for key in ("accuracy", "margin")
        }


def make_arm(loss: str, flips: float) -> Callable[[int], Measurement]:
    """An arm of preference training; the share of flipped labels is known to cDPO and robust DPO."""

    def run_arm(seed: int) -> Measurement:
        model = base_policy(EXPERIMENT, seed)
        train = add_reference_log_probs(model, make_pairs("train", PAIRS, flips, seed))
        held_out = add_reference_log_probs(model, make_pairs("test", HELD_OUT, 0.0, 0))
        smoothing = {"label_smoothing": flips} if loss != "dpo" else {}
        objective = PreferenceLoss(model, make_preference_loss(loss, beta=BETA, **smoothing))
        rows = train_for_steps(
            objective,
            RepeatedPairsLoader(train, seed),
            LEARNING_RATE,
            steps=STEPS,
            seed=seed,
            warmup=10,
            evaluators=[CleanPairsEvaluator(held_out)],
        )
        curve = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
        return Measurement({"accuracy": curve[-1][1], "margin": rows[-1]["eval/margin"]}, curve)

    return run_arm


ARMS = {
    f"{name}, {flips:.0%}": make_arm(loss, flips)
    for flips in FLIP_RATES
    for name, loss in LOSS_TYPES.items()
    if flips or loss == "dpo"  # without flips all three are DPO
}


def verdict(results: ExperimentResults) -> Verdict:
    gaps = {
        f"{name} at {flips:.0%}": results.difference(f"{name}, {flips:.0%}", f"DPO, {flips:.0%}", "accuracy")
        for flips in FLIP_RATES[1:]
        for name in ("robust", "cDPO")
    }
    words = "accuracy on clean held-out pairs, less DPO's: " + ", ".join(f"{name} {gap}" for name, gap in gaps.items())
    gain = gaps[f"robust at {HIGHEST_RATE}"]
    if gain.positive or gain.negative:
        return Verdict("confirmed" if gain.positive else "refuted", words)
    return Verdict("no effect seen", words)


PAPER = Paper(
    name="label_noise",
    title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    arxiv="2403.00409",
    claim="Where labels are flipped at random, the unbiased form of DPO's loss (robust DPO) prefers the better answer "
    "more often than DPO and cDPO do.",
    experiment=f"{PAIRS} pairs of a reversed word and its letters in another order, of which 0 to {HIGHEST_RATE} have "
    f"the wrong label; the base policy of `quest reproduce reverse`; {STEPS} steps of {ROWS} pairs "
    f"({STEPS * ROWS // PAIRS} epochs) at {LEARNING_RATE:g}, beta {BETA:g}; cDPO and robust DPO know the share of "
    f"flipped labels. Control: DPO. Held out: {HELD_OUT} pairs of other words, all labelled correctly; accuracy: how "
    "often the better answer has the higher reward; margin: by how much.",
    confirms=f"at {HIGHEST_RATE} robust DPO's accuracy is above DPO's, the 95 % interval of the paired difference "
    "above zero.",
    refutes="it is below, the interval below zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "accuracy on clean held-out pairs"),
    minutes=4,
)
