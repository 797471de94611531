"""Rate transfer: whether the best learning rate of a narrow model is the best one of a wide model too.

`python -m tests.train.rate_transfer --out DIR` trains a Llama on a Markov chain to the end of its schedule (linear
decay to 0) at rates in octaves: the base, and 16 times its width under `standard` and `mup`. It ends with 1 if the best
rate moves by more than one octave under mup, or by no more than one under standard. The same command goes on after an
interruption: finished runs are kept, each under a name that follows from its settings, code and data."""

from __future__ import annotations

import argparse
import random
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.measurements import Measurements, RunRequest, hash_inputs, read_metric
from llm_quest.experiments.tuning import LARGEST_RATE, parabola_vertex
from tests.experiments.forked_pool import make_forked_pool

VOCAB, STEPS, MOST_OCTAVES = 300, 150, 1
BASE = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
COMMON = (
    "data.separator='\\n\\n'", "data.held_out=0.03", f"tokenizer.vocab_size={VOCAB}", "sequence_length=64",
    "batch_size=4", f"max_steps={STEPS}", f"warmup_steps={STEPS // 10}", "lr_scheduler_type=linear", "min_lr_ratio=0",
    "model.config.num_hidden_layers=2", "precision=fp32", "eval_steps=0", "eval_baselines=false",
)  # fmt: skip
MARGIN = 2
"""Rates that are measured on each side of the best one."""
SYMBOLS = string.ascii_letters + string.digits + "+/"


def write_markov_text(file: Path, documents: int = 1_000, length: int = 400) -> Path:
    """Documents of a Markov chain over 64 symbols, each with three successors: 1.1 nats a symbol, without them 4.1."""
    rng = random.Random(0)
    following = {symbol: rng.choices(SYMBOLS, k=3) for symbol in SYMBOLS}
    texts = []
    for _ in range(documents):
        text = [rng.choice(SYMBOLS)]
        while len(text) < length:
            text.append(rng.choice(following[text[-1]]))
        texts.append("".join(text))
    file.write_text("\n\n".join(texts))
    return file


@dataclass
class RateGrid:
    """losses: k -> held-out losses of seeds 1, 2, ... at the rate 2^k; infinite where a run diverged."""

    losses: dict[int, list[float]] = field(default_factory=dict)

    def mean(self, octave: int, seeds: int) -> float:
        return fmean(self.losses[octave][:seeds])

    def best(self, seeds: int) -> int:
        """The lowest mean, among the rates that have so many seeds."""
        whole = [octave for octave, found in self.losses.items() if len(found) >= seeds]
        return min(whole, key=lambda octave: (self.mean(octave, seeds), octave))

    @property
    def seeds(self) -> int:
        return max(len(found) for found in self.losses.values())

    def vertex(self) -> float:
        """The minimum of the parabola through the best rate and its neighbors, as a power of 2."""
        best = self.best(self.seeds)
        around = [best - 1, best, best + 1]
        if not all(len(self.losses.get(octave, ())) >= self.seeds for octave in around):
            return float(best)  # beside the largest rate that a recipe takes
        return parabola_vertex(around, [self.mean(octave, self.seeds) for octave in around])


def search_rates(measure: Callable[[int, int], float], center: int, seeds: int) -> RateGrid:
    """Five rates around 2^center with one seed, more until there are MARGIN on both sides of the best (a flat curve has
    several minima), and then all seeds for the best and its neighbors. measure: (octave, seed) -> loss."""
    grid = RateGrid({octave: [measure(octave, 1)] for octave in range(center - 2, center + 3) if is_allowed(octave)})
    for count in range(1, seeds + 1):
        best = grid.best(max(1, count - 1))
        reach = MARGIN if count == 1 else 1
        while lacking := [
            octave
            for octave in range(best - reach, best + reach + 1)
            if is_allowed(octave) and len(grid.losses.get(octave, ())) < count
        ]:
            for octave in lacking:
                found = grid.losses.setdefault(octave, [])
                found += [measure(octave, seed) for seed in range(len(found) + 1, count + 1)]
            best = grid.best(count)
    return grid


def is_allowed(octave: int) -> bool:
    return 2.0**octave <= LARGEST_RATE


@dataclass(frozen=True)
class Size:
    """factor: times the base's width."""

    optim: str
    kind: str
    factor: int

    @property
    def name(self) -> str:
        return f"{self.optim}, {self.kind}, width {BASE['hidden_size'] * self.factor}"

    def pairs(self, text: Path, octave: int) -> tuple[str, ...]:
        sizes = tuple(f"model.config.{key}={value * self.factor}" for key, value in BASE.items())
        base = tuple(f"parametrization.base.{key}={value}" for key, value in BASE.items())
        scaled = () if self.kind == "standard" else (f"parametrization.name={self.kind}", *base)
        return (
            *COMMON,
            f"data.source={text}",
            f"optim={self.optim}",
            f"learning_rate={2.0**octave!r}",
            *sizes,
            *scaled,
        )


class Transfer:
    """The grids of all sizes, below the folder `root`."""

    def __init__(self, root: Path, pool: Any):
        self.code, self.text = own_code(), write_markov_text(root / "text.txt")
        pairs = Size("adamw", "standard", 1).pairs(self.text, -6)
        about = pool.submit(self.code, {"do": "describe", "recipe": "pretrain", "pairs": pairs}).result()
        ledger = Ledger(root / "ledger.jsonl", print)
        self.measurements = Measurements("pretrain", root, pool, ledger, "rate-transfer", hash_inputs(about))

    def grid(self, size: Size, center: int, seeds: int) -> RateGrid:
        def measure(octave: int, seed: int) -> float:
            request = RunRequest(size.name, size.pairs(self.text, octave), seed, self.code, "report")
            (record,) = self.measurements.measure([request], size.name)
            loss = read_metric(record, "eval/loss", size.name, VOCAB)
            print(f"{size.name}, 2^{octave}, seed {seed}: {loss}, {record['cpu_seconds']} s", flush=True)
            return float("inf") if loss is None else loss

        return search_rates(measure, center, seeds)


def describe(size: Size, grid: RateGrid) -> str:
    """A row of the table."""
    shown = "  ".join(
        f"2^{octave}: " + " ".join(f"{loss:.3f}" for loss in grid.losses[octave]) for octave in sorted(grid.losses)
    )
    return f"{size.name}: best 2^{grid.best(grid.seeds)}, vertex 2^{grid.vertex():.2f}   {shown}"


def describe_move(base: RateGrid, wide: RateGrid) -> str:
    """How far the best rate moves, and what the base's best rate costs at the larger width."""
    old, new = base.best(base.seeds), wide.best(wide.seeds)
    seeds = min(len(wide.losses[old]), len(wide.losses[new]))
    cost = wide.mean(old, seeds) - wide.mean(new, seeds)
    moved = f"{new - old:+d} octaves (vertex {wide.vertex() - base.vertex():+.2f})"
    return f"    moves {moved}; the base's rate costs {cost:.3f} nats"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factor", type=int, default=16, help="times the base's width")
    parser.add_argument("--kinds", default="mup,standard")
    parser.add_argument("--optims", default="adamw,muon")
    parser.add_argument("--seeds", type=int, default=2, help="of the best rate and its neighbors; standard has one")
    parser.add_argument("--center", type=int, default=-5, help="power of 2: the middle of the base's first rates")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with make_forked_pool(1) as pool:
        transfer = Transfer(given.out, pool)
        for optim in given.optims.split(","):
            size = Size(optim, "standard", 1)  # at the base all parametrizations are the same
            base = transfer.grid(size, given.center, given.seeds)
            lines = [describe(size, base)]
            for kind in given.kinds.split(","):
                size = Size(optim, kind, given.factor)
                control = kind == "standard"
                wide = transfer.grid(size, base.best(base.seeds), 1 if control else given.seeds)
                lines += [describe(size, wide), describe_move(base, wide)]
                moved = abs(wide.best(wide.seeds) - base.best(base.seeds))
                failed |= (moved <= MOST_OCTAVES) == control
            print("\n".join(lines), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
