"""What an adapter saves: a whole optimizer step (forward, loss, backward, clip, fused AdamW) at 124M, all parameters
trained against adapters alone, in turn, in one process, on the same tokens.

python -m benchmarks.adapters [--shape 124m] [--pairs 5] [--only lora] [--rows 4] [--length 256]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

import llm_quest as quest
from benchmarks.generation import SHAPES
from benchmarks.pairs import race
from llm_quest.data.batch import TokenBatch
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.techniques.lora import DoRA, LoRA, TinyLoRA
from llm_quest.train.optimizers import make_adamw

FORMS: dict[str, Callable[[Any], Any]] = {
    "all parameters": lambda model: model,
    "LoRA, rank 8, all": LoRA(rank=8),
    "LoRA, rank 8, q and v": LoRA(rank=8, targets=("q", "v")),
    "DoRA, rank 8, all": DoRA(rank=8),
    "TinyLoRA, q and v": TinyLoRA(targets=("q", "v")),
}


HEAD = "| trained | numbers | optimizer, MB | s a step | of the full step (range) |\n| --- | --- | --- | --- | --- |"


class Runner:
    """One contestant: one optimizer step a call."""

    def __init__(self, config: Any, form: Callable[[Any], Any], rows: int, length: int):
        model = form(quest.build(config)).train()
        self.objective, self.optimizer = NextTokenLoss(model), make_adamw(model, lr=1e-4)
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tokens = torch.randint(0, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        self.batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])

    def __call__(self) -> None:
        loss = self.objective(self.batch)
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def state_bytes(self) -> int:
        """What the optimizer holds."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in held if torch.is_tensor(value))


def measured(shape: str, only: str, pairs: int, rows: int, length: int) -> list[dict[str, Any]]:
    config = SHAPES[shape][1]
    chosen = [name for name in FORMS if name.startswith("all") or only.lower() in name.lower()]
    runners = {name: Runner(config, FORMS[name], rows, length) for name in chosen}
    raced = race(runners, pairs=pairs)
    found = []
    for row in raced:
        runner = runners[row.name]
        numbers = sum(parameter.numel() for parameter in runner.learned)
        found.append({**row.__dict__, "trained": numbers, "optimizer": runner.state_bytes})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["124m", "124m-llama"])
    parser.add_argument("--only", default="")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for shape in [options.shape] if options.shape else ["124m", "124m-llama"]:
        rows = measured(shape, options.only, options.pairs, options.rows, options.length)
        if options.json:
            print(json.dumps({"shape": shape, "rows": rows}))
            continue
        print(f"\n{shape}, {options.rows} rows of {options.length} tokens, fp32, {torch.get_num_threads()} threads\n")
        print(HEAD)
        for row in rows:
            share = f"{1 / row['times_reference']:.2f} ({1 / row['high']:.2f}-{1 / row['low']:.2f})"
            size = f"{row['optimizer'] / 1e6:,.2f}"
            print(f"| {row['name']} | {row['trained']:,} | {size} | {row['seconds']:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
