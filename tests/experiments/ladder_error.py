"""How far a ladder's law is from the largest rung and from the model, by noise and by what is counted as the size.

`python -m tests.experiments.ladder_error` draws losses around the law of docs/ladder.md and prints the root mean square
error at the model. `python -m tests.experiments.ladder_error ladders/NAME/result.json` predicts the largest rung from
the others, with N, N without the head, counted FLOPs and the hidden size as what the loss follows.
`python -m tests.experiments.ladder_error --coverage 60` draws ladders of equal tokens, whose runs share an effect of
their seed, and prints how many intervals hold the model and the sizes that are left out."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from llm_quest.errors import DataError
from llm_quest.experiments.scaling_law import (
    LadderPoint,
    ScalingLaw,
    fit_scaling_law,
    leave_one_out,
    predict_loss,
)

LAW = ScalingLaw(0.870, 2.004, 0.37, 90_050)
LARGEST, MODEL, RUNGS = 178_136, 567_944, 5
EQUAL_LAW, EQUAL_LARGEST, EQUAL_MODEL = ScalingLaw(3.662, 0.173, 0.46, 942_171), 3_440_640, 11_880_960
"""The law of equal tokens of docs/ladder.md, and its sizes."""


def extrapolation_error(span: float, sd: float, draws: int, seed: int = 0) -> float:
    """Root mean square error at MODEL of laws through RUNGS sizes from LARGEST / span, whose means have noise sd."""
    rng, errors = random.Random(seed), []
    sizes = [LARGEST / span ** (1 - place / (RUNGS - 1)) for place in range(RUNGS)]
    for _ in range(draws):
        points = [LadderPoint(n, 20 * n, (LAW.predict(n, 20 * n) + rng.gauss(0, sd),)) for n in sizes]
        try:
            errors.append(fit_scaling_law(points, 3).predict(MODEL, 0) - LAW.predict(MODEL, 0))
        except DataError:  # no law goes through these losses
            continue
    return math.sqrt(fmean(error**2 for error in errors))


def interval_coverage(sd: float, seed_sd: float, worlds: int, *, paired: bool, seeds: int = 2) -> str:
    """How often intervals hold a model of 3.5 times the largest of five sizes over a factor of 14, and left-out sizes.
    sd: of a run; seed_sd: of the effect that runs with the same seed share."""
    rng, inside, left_out, errors, widths = random.Random(0), 0, [], [], []
    sizes = [EQUAL_LARGEST / 14 ** (1 - place / (RUNGS - 1)) for place in range(RUNGS)]
    for world in range(worlds):
        effects = [rng.gauss(0, seed_sd) for _ in range(seeds)]
        points = [
            LadderPoint(n, 1, tuple(EQUAL_LAW.predict(n, 1) + b + rng.gauss(0, sd) for b in effects)) for n in sizes
        ]
        measured = EQUAL_LAW.predict(EQUAL_MODEL, 1) + effects[0] + rng.gauss(0, sd)
        found = predict_loss(points, EQUAL_MODEL, 1, seed=world, paired=paired)
        inside += found.covers(measured)
        errors.append(found.loss / measured - 1)
        widths.append(found.high - found.low)
        left_out += [one.covers(point.mean) for one, point in zip(leave_one_out(points), points, strict=True)]
    within = fmean(abs(error) < 0.01 for error in errors)
    return (
        f"runs {sd:g}, seeds {seed_sd:g}, {'paired' if paired else 'unpaired'}: model {inside / worlds:.0%}, left out "
        f"{fmean(left_out):.0%}, within 1 % {within:.0%}, error {math.sqrt(fmean(e**2 for e in errors)):.2%}, width "
        f"{fmean(widths):.3f}"
    )


def largest_errors(result: Mapping[str, Any], vocab_size: int) -> dict[str, float]:
    """What is counted as the size -> how far the largest rung is predicted from the others."""
    widths = [
        int(pair.partition("=")[2])
        for rung in result["rungs"]
        for pair in rung["settings"]
        if pair.startswith("model.config.hidden_size=")
    ]
    whole = [float(rung["multiplying"]) for rung in result["rungs"]]
    losses = [fmean(rung["losses"]) for rung in result["rungs"]]
    sizes = {
        "N": whole, "N without the head": [n - vocab_size * width for n, width in zip(whole, widths, strict=True)],
        "FLOPs": [rung["flops"] for rung in result["rungs"]], "hidden size": [float(width) for width in widths],
    }  # fmt: skip
    found = {}
    for name, values in sizes.items():
        points = [LadderPoint(x, x, (loss,)) for x, loss in zip(values, losses, strict=True)]
        found[name] = fit_scaling_law(points[:-1], 3).predict(values[-1], 0) / losses[-1] - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--coverage", type=int, default=0)
    given = parser.parse_args()
    if given.result is not None:
        for name, error in largest_errors(json.loads(given.result.read_text()), given.vocab_size).items():
            print(f"{name}: {error:+.2%}")
        return
    if given.coverage:
        for sd, seed_sd in ((0.014, 0.03), (0.014, 0.0)):
            for paired in (True, False):
                print(interval_coverage(sd, seed_sd, given.coverage, paired=paired), flush=True)
        return
    for span in (4.5, 9, 18):
        for sd in (0.018, 0.009):
            print(
                f"rungs over a factor of {span:g}, means with {sd:g}: {extrapolation_error(span, sd, given.draws):.3f}"
            )


if __name__ == "__main__":
    main()
