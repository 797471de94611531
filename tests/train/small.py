"""A real small training for the engine's tests: a model with dropout, an objective, a feed, and a process of its
own."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import DataShard, Loss
from llm_quest.errors import QuestError
from llm_quest.progress import LineLogger
from llm_quest.train.arguments import TrainingArguments, TrainResult
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw, make_lr_schedule, make_muon
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir

V, D = 17, 16


class Model(nn.Module):
    """Predicts a token from the one before it. The head is tied to the embedding."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)) for _ in range(2)]
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + self.dropout(block(x))
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Rows:
    """tokens and targets (B,T); targets are -100 where nothing is learned."""

    tokens: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def to(self, device: Any) -> Rows:
        return Rows(self.tokens.to(device), self.targets.to(device))


class NextToken(nn.Module):
    """Sum of cross-entropies, and how many were guessed right."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Rows) -> Loss:
        logits = self.model(batch.tokens).flatten(0, 1)
        targets = batch.targets.flatten()
        total = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-100)
        count = (targets != -100).sum(dtype=torch.float32)
        right = (logits.argmax(-1) == targets).sum(dtype=torch.float32)
        return Loss(total, count, {"accuracy": (right, count)})


class Rule:
    """Rows of t -> (3 t + 1) mod V with a masked part of its own length in every row: `rows` a step, pure in (seed,
    step)."""

    def __init__(
        self, rows: int = 8, micro: int = 1, share: DataShard | None = None, seed: int = 0, pause: float = 0.0
    ):
        self.rows, self.micro, self.share, self.seed, self.pause = rows, micro, share or DataShard(), seed, pause
        self.asked: list[int] = []

    def batches(self, step: int) -> Sequence[Rows]:
        time.sleep(self.pause)
        self.asked.append(step)
        random = torch.Generator().manual_seed(self.seed * 100_003 + step)
        first = torch.randint(0, V, (self.rows, 1), generator=random)
        row = [first]
        for _ in range(8):
            row.append((3 * row[-1] + 1) % V)
        tokens = torch.cat(row, dim=1)
        masked = torch.arange(8) < torch.randint(0, 8, (self.rows, 1), generator=random)
        targets = tokens[:, 1:].masked_fill(masked, -100)
        mine = range(self.share.rank, self.rows, self.share.world_size)
        parts = torch.tensor(list(mine)).chunk(self.micro)
        return [Rows(tokens[part, :-1], targets[part]) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["seed"] != self.seed:
            raise ValueError(f"the bookmark is of seed {state_dict['seed']}, this feed has {self.seed}")


class Losses:
    """Keeps every row that is shown."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.events: list[str] = []

    def start(self, step: int, steps: int) -> None:
        pass

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def log_event(self, text: str) -> None:
        self.events.append(text)

    def close(self) -> None:
        pass

    def __getitem__(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def objective(seed: int = 0, dropout: float = 0.1) -> NextToken:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NextToken(Model(dropout))


def go(
    steps: int,
    run: RunDir | None = None,
    *,
    made: NextToken | None = None,
    feed: Rule | None = None,
    optimizer: str = "adamw",
    parallel: DistributedContext | None = None,
    show: Any = None,
    probes: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> TrainResult:
    """Train the small model; what is not said is as usual."""
    made = made or objective()
    built = make_adamw(made.model, lr=3e-2) if optimizer == "adamw" else make_muon(made.model, lr=3e-2)
    options = TrainingArguments(max_steps=steps, **({"logging_steps": 1} | settings))
    plan = make_lr_schedule(40, warmup_steps=3)
    seen = {"parallel": parallel, "logger": show, "evaluators": probes, "callbacks": callbacks}
    return train(made, feed or Rule(), built, plan, options, run, **seen)


def digest(folder: Path | str) -> str:
    """Of a checkpoint's weights and optimizer state."""
    total = hashlib.sha256()
    for name in ("model.safetensors", "optim.safetensors"):
        total.update((Path(folder) / name).read_bytes())
    return total.hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    """`python -m tests.train.small FOLDER --steps N`: the same training in a process that can be killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--engine", default="")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    parallel = DistributedContext.from_environment("cpu", args.engine) if args.engine else DistributedContext()
    try:
        with RunDir(args.folder, is_main_process=parallel.is_main_process) as run:
            made = objective(dropout=0.0 if args.engine else 0.1)
            parallel.parallelize(made, list(made.model.blocks))
            feed = Rule(micro=2, share=parallel.data_shard, pause=args.pause)
            more = {"optimizer": args.optimizer, "parallel": parallel, "show": LineLogger(parallel.rank)}
            return go(args.steps, run, made=made, feed=feed, save_steps=args.save_steps, **more).exit_code
    except QuestError as error:
        print(error)
        return error.exit_code
    finally:
        parallel.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
