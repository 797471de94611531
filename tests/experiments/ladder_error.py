"""How far a ladder's law is from the largest rung and from the model, by noise and by what is counted as the size.

`python -m tests.experiments.ladder_error` draws losses around the law of docs/ladder.md and prints the root mean square
error at the model. `python -m tests.experiments.ladder_error ladders/NAME/result.json` predicts the largest rung from
the others, with N, N without the head, counted FLOPs and the hidden size as what the loss follows."""

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
from llm_quest.experiments.scaling_law import LadderPoint, ScalingLaw, fit_scaling_law

LAW = ScalingLaw(0.870, 2.004, 0.37, 90_050)
LARGEST, MODEL, RUNGS = 178_136, 567_944, 5


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
    given = parser.parse_args()
    if given.result is not None:
        for name, error in largest_errors(json.loads(given.result.read_text()), given.vocab_size).items():
            print(f"{name}: {error:+.2%}")
        return
    for span in (4.5, 9, 18):
        for sd in (0.018, 0.009):
            print(
                f"rungs over a factor of {span:g}, means with {sd:g}: {extrapolation_error(span, sd, given.draws):.3f}"
            )


if __name__ == "__main__":
    main()
