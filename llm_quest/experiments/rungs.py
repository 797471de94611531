"""The rungs of a ladder: smaller models of the recipe's family, each trained on the same budget of tokens.

N, the size of a rung, is the number of parameters that multiply each token: all matrices and the output, of experts
those that a token meets, without the embedding. It is counted, not estimated (`cost/flops.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quest.cost.flops import ModelCost
from llm_quest.errors import UsageError
from llm_quest.experiments.budgets import TOLERANCE
from llm_quest.formatting import format_quantity
from llm_quest.models.build import build_meta_model, count_parameters
from llm_quest.models.resize import PATTERNS, differing_sizes, replace_sizes, resize_config
from llm_quest.recipes.pretrain import resolve_model_config
from llm_quest.recipes.recipe import load_recipe

FEWEST_RUNGS = 4
SCALES = {
    "width": "all rungs have the layers of the model, and fewer heads",
    "both": "fewer heads and layers, in the model's ratio as far as whole layers allow",
}
"""How rungs are smaller than the model."""
SHAPE_WEIGHT = 0.5
"""How much a rung of another shape (depth over width) counts against one of another size."""


@dataclass(frozen=True)
class TokenBudget:
    """The tokens that each size trains on: `amount` for each parameter that multiplies a token, or `amount` in all."""

    amount: float
    per_parameter: bool = True

    def tokens(self, n: float) -> float:
        """The tokens of a size of n parameters."""
        return self.amount * n if self.per_parameter else self.amount

    @property
    def option(self) -> str:
        return "--tokens-per-parameter" if self.per_parameter else "--tokens"

    @property
    def label(self) -> str:
        """The part of a rung's name: 20, or 500k."""
        return f"{self.amount:g}" if self.per_parameter else f"{self.amount / 1000:g}k"

    @property
    def words(self) -> str:
        return f"{self.amount:.3g} tokens per parameter" if self.per_parameter else f"{self.amount:,.0f} tokens"


@dataclass(frozen=True)
class Rung:
    """A size. n: parameters that multiply each token. pairs: its settings."""

    name: str
    config: Any
    parameters: int
    n: int
    budget: TokenBudget
    steps: int
    tokens: int
    flops: float
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """The training settings of every rung. tokens_per_step: of one optimizer step. warmup: its share of the steps."""

    sequence_length: int
    tokens_per_step: int
    warmup: float
    kind: str
    base: Mapping[str, Any]


def count_multiplying(config: Any, length: int) -> tuple[int, int]:
    """(parameters that multiply each token, FLOPs of training on a row of `length` tokens)."""
    cost = ModelCost.from_config(config)
    return cost.count_pass(length)[0] // (2 * length), cost.training(length)


def candidate_shapes(config: Any, scale: str) -> Iterator[tuple[Any, int, float]]:
    """(config, parameters, how far its shape is from the model's) of smaller models. scale: of SCALES."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    period = layer_period(config)
    for count in range(1, heads + 1):
        wanted = layers if scale == "width" else layers * count / heads
        near = {layers} if scale == "width" else {max(1, round(wanted / period) + n) * period for n in (-1, 0, 1)}
        for depth in sorted(depth for depth in near if depth <= layers):
            small = resize_config(config, heads=count, layers=depth)
            yield small, count_parameters(build_meta_model(small)), abs(math.log(depth / wanted))


def layer_period(config: Any) -> int:
    """After how many layers the kinds of layers repeat; all of them where they do not."""
    patterns = [tuple(getattr(config, name)) for name in PATTERNS if getattr(config, name, ())]
    layers: int = config.num_hidden_layers
    for period in range(1, layers):
        if all(pattern == (pattern[:period] * layers)[:layers] for pattern in patterns):
            return period
    return layers if patterns else 1


def choose_shapes(config: Any, count: int, smallest: float, largest: float, scale: str) -> list[tuple[Any, int]]:
    """`count` smaller configs with their parameters, from `smallest` to `largest` in equal ratios. UsageError where
    the family has too few sizes there."""
    if count < FEWEST_RUNGS:
        raise UsageError(
            f"--rungs {count}: a law has at least three numbers (floor, factor, exponent), so it needs at least "
            f"{FEWEST_RUNGS} sizes"
        )
    found: list[tuple[Any, int]] = []
    candidates = list(candidate_shapes(config, scale))
    whole = count_parameters(build_meta_model(config))
    if not 0 < smallest < largest < whole:
        raise UsageError(
            f"rungs from {smallest:,.0f} to {largest:,.0f} parameters are no ladder to a model of {whole:,}: give "
            "--smallest below --largest, and both below it"
        )
    for step in range(count):
        wanted = smallest * (largest / smallest) ** (step / (count - 1))
        free = [
            candidate
            for candidate in candidates
            if candidate[1] not in [size for _, size in found] and candidate[1] < whole
        ]
        if not free:
            break
        best = min(free, key=lambda one: abs(math.log(one[1] / wanted)) + SHAPE_WEIGHT * one[2])
        found.append(best[:2])
    found.sort(key=lambda one: one[1])
    if len(found) < count or found[-1][1] / found[0][1] < 2:
        raise UsageError(
            f"{len(found)} sizes from {smallest:,.0f} to {largest:,.0f} parameters can be made of this model, whose "
            "widths are whole numbers of heads: give the recipe's model more and narrower heads "
            "(model.config.num_attention_heads), or fewer --rungs"
        )
    return found


def make_rung(
    config: Any, parameters: int, whole: Any, budget: TokenBudget, course: Course, n: int, row_flops: int
) -> Rung:
    """The rung of a config. whole: the recipe's own, whose fields the rung changes."""
    wanted = budget.tokens(n) / course.tokens_per_step
    steps = max(1, round(wanted))
    if abs(steps / wanted - 1) > TOLERANCE:
        enough = budget.amount * 0.5 / TOLERANCE / wanted
        raise UsageError(
            f"{format_quantity(parameters)} parameters and {budget.words} are {wanted:.1f} steps, so budgets can't be "
            f"equal: give more tokens ({budget.option} {enough:.2g}) or a smaller batch_size"
        )
    sizes = differing_sizes(whole, config)
    base = differing_sizes(config, replace_sizes(whole, course.base)) if course.base else {}
    base = base or {"hidden_size": config.hidden_size}  # the base itself
    pairs = [*size_pairs("model.config", sizes), f"max_steps={steps}", f"warmup_steps={round(course.warmup * steps)}"]
    if course.kind != "standard":
        pairs += [f"parametrization.name={course.kind}", *size_pairs("parametrization.base", base)]
    tokens = steps * course.tokens_per_step
    flops = float(row_flops) * tokens / course.sequence_length
    name = f"{format_quantity(parameters).replace(' ', '')}-{budget.label}".replace(",", "")
    return Rung(name, config, parameters, n, budget, steps, tokens, flops, tuple(pairs))


def size_pairs(key: str, sizes: Mapping[str, Any]) -> Iterator[str]:
    """Fields as settings: key.field=value, groups dotted."""
    for name, value in sizes.items():
        if isinstance(value, Mapping):
            yield from size_pairs(f"{key}.{name}", value)
        else:
            yield f"{key}.{name}={json.dumps(value)}"


def make_rungs(
    recipe: str,
    pairs: Sequence[str],
    *,
    count: int,
    smallest: float,
    largest: float,
    budgets: Sequence[TokenBudget],
    kind: str,
    scale: str,
) -> tuple[list[Rung], Rung]:
    """(the rungs of each budget, the recipe's own model as the target at the largest). smallest, largest: parameters;
    0: a 64th and a 4th of the model's. budgets: empty for the recipe's own tokens per parameter. scale: of SCALES."""
    found, config, settings = load_recipe(recipe, pairs)
    if found.name != "pretrain" or config.model.load is not None:
        raise UsageError(
            f"quest ladder scales a model that pretrain builds; {recipe} is of the kind {found.name}"
            if found.name != "pretrain"
            else "quest ladder scales a model that the recipe builds: leave model.load out"
        )
    if config.parametrization.base:
        raise UsageError("quest ladder chooses parametrization.base itself, its smallest rung: leave it out")
    whole = resolve_model_config(config, settings)
    total, length = count_parameters(build_meta_model(whole)), config.sequence_length
    shapes = choose_shapes(whole, count, smallest or total / 64, largest or total / 4, scale)
    counts = [count_multiplying(one, length) for one, _ in shapes]
    target_n, target_flops = count_multiplying(whole, length)
    tokens_per_step = config.batch_size * length
    warmup = config.warmup_steps / config.max_steps
    base = differing_sizes(whole, shapes[0][0]) if kind != "standard" else {}
    course = Course(length, tokens_per_step, warmup, kind, base)
    own = TokenBudget(config.max_steps * tokens_per_step / target_n)
    used = sorted(budgets, key=lambda budget: budget.amount) or [own]
    rungs = [
        make_rung(one, parameters, whole, budget, course, n, flops)
        for budget in used
        for (one, parameters), (n, flops) in zip(shapes, counts, strict=True)
    ]
    return rungs, make_rung(whole, total, whole, used[-1], course, target_n, target_flops)
