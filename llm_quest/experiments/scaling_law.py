"""Fits a scaling law to the losses of a ladder and predicts the loss of a larger model.

      L(N)    = E + A N^-a               runs with the same number of tokens per parameter, or of tokens
      L(N, D) = E + A N^-a + B D^-b      several of them (Hoffmann et al. 2022, arXiv:2203.15556)

For given exponents the other numbers are a linear least-squares problem with numbers >= 0, so the fit is a search over
the exponents alone, without initial values or local minima (variable projection, Golub and Pereyra 1973). N and D are
divided by their geometric means, which changes A and B and nothing else.

Intervals come from a parametric bootstrap: the law is fitted to means drawn with the standard deviation of a run,
pooled over all sizes, or that of the residuals where it is larger (a form that does not fit is an error too), and the
noise of the new run is added.
Commonly got wrong: drawing the seeds of each size again, of which there are three, gives intervals that cover 82 %
where 95 % are promised.

Where all sizes see the same tokens, runs with the same seed read the same batches, and their losses are high or low
together (common random numbers). A new run with one of these seeds is predicted with that seed's effect, and only what
is left of the noise counts: loss of size i and seed j = L(N_i) + b_j + e_ij."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llm_quest.errors import DataError

SMALLEST_EXPONENT, LARGEST_EXPONENT = 0.02, 3.0
GRID, REFINEMENTS = 24, 3
DRAWS = 400
DRAW_GRID = {3: 160, 5: 32}
"""How fine the grid of exponents is for drawn losses, by the numbers of the form."""


@dataclass(frozen=True)
class LadderPoint:
    """The losses of all seeds of a size: n parameters that multiply each token, d tokens."""

    n: float
    d: float
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


@dataclass(frozen=True)
class ScalingLaw:
    """E + A (N / n0)^-a + B (D / d0)^-b; B is 0 for one number of tokens per parameter."""

    floor: float
    n_factor: float
    n_exponent: float
    n0: float
    d_factor: float = 0.0
    d_exponent: float = 0.0
    d0: float = 1.0

    def predict(self, n: float, d: float) -> float:
        """The loss of a model of n parameters after d tokens."""
        loss = self.floor + self.n_factor * (n / self.n0) ** -self.n_exponent
        return loss + (self.d_factor * (d / self.d0) ** -self.d_exponent if self.d_factor else 0.0)

    @property
    def formula(self) -> str:
        text = f"{self.floor:.3f} + {self.n_factor:.3f} (N / {self.n0:,.0f})^-{self.n_exponent:.2f}"
        return text + (f" + {self.d_factor:.3f} (D / {self.d0:,.0f})^-{self.d_exponent:.2f}" if self.d_factor else "")


@dataclass(frozen=True)
class Prediction:
    """A loss with its 95 % interval for the mean of `runs` new runs."""

    loss: float
    low: float
    high: float
    runs: int = 1

    def covers(self, loss: float) -> bool:
        return self.low <= loss <= self.high


def numbers_of_form(points: Sequence[LadderPoint]) -> int:
    """The number of coefficients of the form that fits these points: 3, or 5 where neither the tokens per parameter
    nor the tokens are the same in all."""
    ratios = {round(math.log(point.d / point.n), 1) for point in points}
    return 5 if len(ratios) > 2 and not equal_tokens(points) else 3


def equal_tokens(points: Sequence[LadderPoint]) -> bool:
    """Whether all sizes saw the same tokens. Runs with the same seed then read the same batches in the same order."""
    return len({point.d for point in points}) == 1


def fit_scaling_law(points: Sequence[LadderPoint], form: int = 0) -> ScalingLaw:
    """The law through the means. form: how many numbers it has; 0: `numbers_of_form`. DataError where nothing is
    determined."""
    form = form or numbers_of_form(points)
    law = search_law(points, [point.mean for point in points], form)
    if law.n_factor < 1e-9:
        raise DataError(
            "no scaling law fits: the losses don't fall with the number of parameters; give each size more tokens or a "
            "better learning rate"
        )
    if law.n_exponent >= 0.98 * LARGEST_EXPONENT:
        raise DataError(
            "the fit does not converge: its exponent is above any bound, because only the smallest sizes differ; drop "
            "them (--smallest) or give all of them more tokens"
        )
    return law


def search_law(points: Sequence[LadderPoint], losses: Sequence[float], form: int) -> ScalingLaw:
    """Least squares over a grid of exponents that is refined around its best point."""
    sizes = relative_sizes(points, form)
    y = torch.tensor(losses, dtype=torch.float64)[:, None]
    low, high = math.log(SMALLEST_EXPONENT), math.log(LARGEST_EXPONENT)
    ranges = [(low, high)] * len(sizes.values)
    best: tuple[float, tuple[float, ...], list[float]] = (math.inf, (), [])
    for _ in range(1 + REFINEMENTS):
        exponents = exponent_grid(ranges)
        error, numbers = nonnegative_least_squares(law_columns(sizes.values, exponents), y)
        place = int(error[:, 0].argmin())
        if float(error[place, 0]) < best[0]:
            best = float(error[place, 0]), tuple(exponents[place].tolist()), numbers[place, :, 0].tolist()
        widths = [(b - a) / (GRID - 1) for a, b in ranges]
        ranges = [
            (max(low, math.log(x) - width), min(high, math.log(x) + width))
            for x, width in zip(best[1], widths, strict=True)
        ]
    _, exponents_found, numbers_found = best
    law = ScalingLaw(numbers_found[0], numbers_found[1], exponents_found[0], sizes.n0)
    if form == 3:
        return law
    return replace(law, d_factor=numbers_found[2], d_exponent=exponents_found[1], d0=sizes.d0)


class RelativeSizes(NamedTuple):
    """N (P) and, where the form has it, D (P), over their geometric means n0 and d0."""

    values: list[Tensor]
    n0: float
    d0: float


def relative_sizes(points: Sequence[LadderPoint], form: int) -> RelativeSizes:
    n = torch.tensor([point.n for point in points], dtype=torch.float64)
    d = torch.tensor([point.d for point in points], dtype=torch.float64)
    n0, d0 = float(n.log().mean().exp()), float(d.log().mean().exp())
    return RelativeSizes([n / n0, d / d0][: 1 if form == 3 else 2], n0, d0)


def exponent_grid(ranges: Sequence[tuple[float, float]], count: int = GRID) -> Tensor:
    """(G, exponents): all combinations of `count` values, even in their logarithm."""
    axes = [torch.linspace(a, b, count, dtype=torch.float64).exp() for a, b in ranges]
    return torch.cartesian_prod(*axes).view(-1, len(axes))


def law_columns(sizes: Sequence[Tensor], exponents: Tensor) -> Tensor:
    """(G, P, 1 + exponents): 1, N^-a and, where the form has it, D^-b."""
    columns = [torch.ones(len(exponents), len(sizes[0]), dtype=torch.float64)]
    columns += [base ** -exponents[:, i : i + 1] for i, base in enumerate(sizes)]
    return torch.stack(columns, dim=-1)


def predict_draws(points: Sequence[LadderPoint], drawn: Tensor, n: float, d: float, form: int) -> Tensor:
    """The predictions (S) at n and d of the laws that are fitted to drawn losses (P,S), on one grid of exponents."""
    sizes = relative_sizes(points, form)
    low, high = math.log(SMALLEST_EXPONENT), math.log(LARGEST_EXPONENT)
    exponents = exponent_grid([(low, high)] * len(sizes.values), DRAW_GRID[form])
    error, numbers = nonnegative_least_squares(law_columns(sizes.values, exponents), drawn)
    at = [torch.tensor([size], dtype=torch.float64) for size in (n / sizes.n0, d / sizes.d0)][: len(sizes.values)]
    predicted = (law_columns(at, exponents).mT * numbers).sum(1)  # (G,S)
    return predicted.gather(0, error.argmin(0)[None])[0]


def nonnegative_least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each of G problems x (G,P,K) c ~ y (P,S) with c >= 0: the squared errors (G,S) and c (G,K,S). K is at most 3,
    so every set of numbers that are not 0 is tried."""
    best = torch.full((len(x), y.shape[1]), math.inf, dtype=x.dtype)
    numbers = torch.zeros(len(x), x.shape[-1], y.shape[1], dtype=x.dtype)
    for size in range(1, x.shape[-1] + 1):
        for chosen in itertools.combinations(range(x.shape[-1]), size):
            part = x[..., list(chosen)]
            gram = part.mT @ part + 1e-12 * torch.eye(size, dtype=x.dtype)
            solution = torch.linalg.solve(gram, part.mT @ y)
            error = (part @ solution - y).square().sum(1)
            better = (solution >= 0).all(1) & (error < best)
            best = torch.where(better, error, best)
            full = torch.zeros_like(numbers)
            full[:, list(chosen)] = solution
            numbers = torch.where(better[:, None], full, numbers)
    return best, numbers


def seed_effects(points: Sequence[LadderPoint]) -> list[float]:
    """b_j: how far the losses of each seed are from the mean of their size, over all sizes."""
    deviations = [[loss - point.mean for loss in point.losses] for point in points]
    return [statistics.fmean(column) for column in zip(*deviations, strict=True)]


def has_paired_seeds(points: Sequence[LadderPoint]) -> bool:
    """Whether seed effects can be told from noise: two seeds or more, the same batches for all sizes."""
    counts = {len(point.losses) for point in points}
    return equal_tokens(points) and len(counts) == 1 and counts != {1}


def noise_of(points: Sequence[LadderPoint], law: ScalingLaw, form: int, *, paired: bool = False) -> tuple[float, int]:
    """The standard deviation of one run and its degrees of freedom: pooled over sizes, or that of the residuals.
    paired: without the effects of seeds."""
    effects = seed_effects(points) if paired else [0.0]
    freedom = sum(len(point.losses) - 1 for point in points) - (len(effects) - 1)
    within = sum((loss - point.mean) ** 2 for point in points for loss in point.losses)
    within = max(0.0, within - len(points) * sum(b * b for b in effects))
    rest = len(points) - form
    misfit = sum(len(point.losses) * (point.mean - law.predict(point.n, point.d)) ** 2 for point in points)
    pooled = math.sqrt(within / freedom) if freedom else 0.0
    residual = math.sqrt(misfit / rest) if rest > 0 else 0.0
    return (residual, rest) if residual > pooled else (pooled, max(1, freedom))


def predict_loss(
    points: Sequence[LadderPoint],
    n: float,
    d: float,
    *,
    runs: int = 1,
    seed: int = 0,
    form: int = 0,
    paired: bool = False,
) -> Prediction:
    """The loss of a size that is not among the points, with the 95 % interval of the mean of `runs` runs. paired: they
    have the first seeds of the points and read the same batches."""
    form = form or numbers_of_form(points)
    law = fit_scaling_law(points, form)
    sd, freedom = noise_of(points, law, form, paired=paired)
    shift = statistics.fmean(seed_effects(points)[:runs]) if paired else 0.0
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.tensor([law.predict(point.n, point.d) for point in points], dtype=torch.float64)
    roots = torch.tensor([math.sqrt(len(point.losses)) for point in points], dtype=torch.float64)
    noise = torch.randn(len(points) + 1, DRAWS, generator=generator, dtype=torch.float64)
    drawn = fitted[:, None] + sd * noise[:-1] / roots[:, None]
    of_shift = (1 / runs - 1 / len(points[0].losses)) / len(points) if paired else 0.0
    new = sd * noise[-1] * math.sqrt(1 / runs + of_shift) + shift
    draws = (predict_draws(points, drawn, n, d, form) + new).sort().values
    loss = law.predict(n, d) + shift
    wider = student_quantile(freedom) / 1.96
    low, high = (float(draws[round(share * (DRAWS - 1))]) for share in (0.025, 0.975))
    return Prediction(loss, loss - wider * max(0.0, loss - low), loss + wider * max(0.0, high - loss), runs)


def student_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    z = 1.959964
    return exact.get(freedom, z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2))


def leave_one_out(points: Sequence[LadderPoint]) -> list[Prediction]:
    """Each size predicted from all others."""
    form, paired = numbers_of_form(points), has_paired_seeds(points)
    return [
        predict_loss(
            [*points[:i], *points[i + 1 :]], point.n, point.d, runs=len(point.losses), form=form, paired=paired
        )
        for i, point in enumerate(points)
    ]
