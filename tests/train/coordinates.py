"""The coordinate check: how much activations change in a few steps, at several widths and depths.

`python -m tests.train.coordinates [--families all] [--seeds 3]` prints the table for widths and depths 1 to 8 times the
base; a small part of it is a law (`test_parametrization.py`)."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, build_meta_model
from llm_quest.models.parametrization import scale_first_values_, scale_parameters
from llm_quest.models.resize import resize_config
from llm_quest.train.optimizers import make_adamw, make_muon

STEPS, ROWS, LENGTH, VOCAB = 10, 8, 24, 64
RATES = {"adamw": 4e-3, "muon": 1e-2}
"""Working rates of the base."""
MOST_SPREAD, MOST_SLOPE = 1.5, 0.1


@dataclass(frozen=True)
class Case:
    """base: the config of the smallest model. axis: width or depth. factors: how many times it."""

    base: Any
    kind: str
    axis: str
    factors: tuple[int, ...] = (1, 2, 4, 8)
    optim: str = "adamw"
    seeds: int = 2
    steps: int = STEPS


def markov_rows(seed: int) -> Tensor:
    """Rows of a Markov chain over VOCAB symbols with few successors."""
    generator = torch.Generator().manual_seed(seed)
    following = torch.randint(0, VOCAB, (VOCAB, 3), generator=torch.Generator().manual_seed(0))
    rows = [torch.randint(0, VOCAB, (ROWS,), generator=generator)]
    for _ in range(LENGTH):
        choice = torch.randint(0, 3, (ROWS,), generator=generator)
        rows.append(following[rows[-1], choice])
    return torch.stack(rows, dim=1)


class Probe:
    """Activations of a pass, by name: the stream behind each block, attention scores, logits."""

    def __init__(self, model: Any, base_layers: int):
        self.model, self.base_layers, self.seen = model, base_layers, dict[str, Tensor]()
        for number, block in enumerate(model.blocks):
            block.register_forward_hook(self.keep(f"stream {number}"))
        for number, one in enumerate(m for m in model.modules() if isinstance(m, ScaledDotProduct)):
            one.register_forward_hook(self.keep_scores(f"scores {number}"))

    def keep(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor) -> None:
            self.seen[name] = out.detach()

        return hook

    def keep_scores(self, name: str) -> Any:
        def hook(module: Any, given: Any, out: Tensor) -> None:
            q, k = given[0].detach(), given[1].detach()
            k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
            self.seen[name] = torch.einsum("bthd,bshd->bhts", q, k) * module.scale

        return hook

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = self.model(tokens)
        repeats = len(self.model.blocks) // self.base_layers
        middle = f"stream {max(1, self.base_layers // 2) * repeats - 1}"  # the same share of every depth
        last = f"stream {len(self.model.blocks) - 1}"
        found = {"middle stream": self.seen[middle], "last stream": self.seen[last], "logits": logits}
        scores = [value for name, value in self.seen.items() if name.startswith("scores")]
        return found | ({"first attention": scores[0], "last attention": scores[-1]} if scores else {})


def change_of(case: Case, factor: int, seed: int) -> tuple[dict[str, float], float]:
    """The root mean square of each activation's change after the steps, and the last loss."""
    base = case.base
    wide, deep = (factor, 1) if case.axis == "width" else (1, factor)
    config = resize_config(base, heads=base.num_attention_heads * wide, layers=base.num_hidden_layers * deep)
    model: Any = build(config, seed=seed)
    scales = scale_parameters(model, build_meta_model(base), case.kind)
    scale_first_values_(model, scales)
    common: dict[str, Any] = {"lr": RATES[case.optim], "weight_decay": 0.0, "scales": scales}
    optimizer = (
        make_muon(model, row_splits=model.row_splits(), form="float32", **common)
        if case.optim == "muon"
        else make_adamw(model, **common)
    )
    rows = markov_rows(seed)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    probe = Probe(model, base.num_hidden_layers)
    before = probe.read(tokens)
    loss = torch.zeros(())
    for _ in range(case.steps):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = probe.read(tokens)
    return {name: float((after[name] - before[name]).pow(2).mean().sqrt()) for name in before}, float(loss.detach())


def changes(case: Case) -> dict[str, list[float]]:
    """Activation -> its change at each factor, the mean over seeds; `loss`: the last loss."""
    found: dict[str, list[float]] = {}
    for factor in case.factors:
        runs = [change_of(case, factor, seed) for seed in range(1, case.seeds + 1)]
        for name in runs[0][0]:
            found.setdefault(name, []).append(statistics.fmean(run[0][name] for run in runs))
        found.setdefault("loss", []).append(statistics.fmean(run[1] for run in runs))
    return found


def spread(values: Sequence[float]) -> float:
    return max(values) / min(values)


def slope(values: Sequence[float], factors: Sequence[int]) -> float:
    """Of the logarithm of the change against that of the size."""
    x, y = [math.log(factor) for factor in factors], [math.log(value) for value in values]
    mean = statistics.fmean(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def base_config(config: Any) -> Any:
    """A family's tiny config with the vocabulary of the check and no multi-token modules, two layers at least."""
    sizes = {"vocab_size": VOCAB}
    if getattr(config, "num_nextn_predict_layers", 0):
        sizes["num_nextn_predict_layers"] = 0
    return replace(config, **sizes)


def tiny_configs() -> dict[str, Any]:
    return {one.name: base_config(one.config) for f in FAMILIES for one in f.presets if one.name.endswith("-tiny")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", default="llama3.2-tiny")
    parser.add_argument("--kinds", default="standard,mup,completep")
    parser.add_argument("--axes", default="width,depth")
    parser.add_argument("--optims", default="adamw,muon")
    parser.add_argument("--factors", default="1,2,4,8")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    configs = tiny_configs()
    for name in configs if given.families == "all" else given.families.split(","):
        for optim in given.optims.split(","):
            for axis in given.axes.split(","):
                for kind in given.kinds.split(","):
                    factors = tuple(int(one) for one in given.factors.split(","))
                    case = Case(configs[name], kind, axis, factors, optim, given.seeds)
                    found = changes(case)
                    shown = "  ".join(
                        f"{what} {spread(v):.2f} ({slope(v, factors):+.2f})"
                        for what, v in found.items()
                        if what != "loss"
                    )
                    print(f"{name} {optim} {axis} {kind}: {shown}  loss " + " ".join(f"{v:.2f}" for v in found["loss"]))


if __name__ == "__main__":
    main()
