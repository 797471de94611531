"""The reference that preference learning is held to: log-probabilities computed once and kept in the run folder, or a
copy of the model that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_quest.data.by_length import ByLengthFeed, all_of
from llm_quest.data.pairs import AnswerBatch, Pairs
from llm_quest.data.preferences import Rated
from llm_quest.errors import DataError
from llm_quest.objectives.preference import answer_log_probs
from llm_quest.tensor_files import write_tensors
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import undisturbed
from llm_quest.train.step import autocast

Say = Callable[[str], None]
FILE = "reference.safetensors"
AT_ONCE = 8


@dataclass(frozen=True)
class Known:
    """log_probs: of each pair, a number for each answer. key: what they were computed from. fresh: not on disk yet."""

    log_probs: list[np.ndarray]
    key: str
    fresh: bool

    def keep(self, folder: Path) -> None:
        """In the run folder, for the next start."""
        if self.fresh:
            keep(folder / FILE, {"log_probs": torch.from_numpy(np.concatenate(self.log_probs))}, {"key": self.key})


def known(
    model: nn.Module, pairs: Sequence[Rated], folder: Path, parallel: Parallel, precision: str, say: Say,
    *, share: bool = False,
) -> Known:  # fmt: skip
    """The log-probability that a model gives each answer, as it is now: from the run folder if they were computed for
    this model, these pairs and this precision; else computed, each question once if they share it. Before the model is
    shared out: a part of it cannot be called alone."""
    told = {"model": weights_hash(model), "pairs": Pairs(pairs).hash, "precision": precision}
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    flat = parallel.broadcast(kept(folder / FILE, key) if parallel.leader else None)
    fresh = flat is None
    if fresh:
        say(f"reference: log-probabilities of {sum(len(one.answers) for one in pairs):,} answers, once")
        with undisturbed(model), autocast(precision, parallel.device):
            flat = np.concatenate(computed(model.to(parallel.device), Pairs(pairs, shared=share), parallel.device))
    ends = np.cumsum([len(one.answers) for one in pairs])[:-1]
    return Known(np.split(flat, ends), key, fresh)


def computed(model: nn.Module, source: Pairs, device: torch.device) -> list[np.ndarray]:
    """In float32, answers of like length together."""
    pairs = source.elements
    found: list[np.ndarray] = [np.empty(0)] * len(pairs)
    for numbers in all_of(source, AT_ONCE):
        flat = answer_log_probs(model, source.batch(numbers).to(device)).float().cpu().numpy()
        parts = np.split(flat, np.cumsum([len(pairs[n].answers) for n in numbers])[:-1])
        for n, part in zip(numbers, parts, strict=True):
            found[n] = part
    return found


def kept(file: Path, key: str) -> np.ndarray | None:
    """What the file holds, if it is of this key."""
    if not file.is_file():
        return None
    with safe_open(file, framework="np") as held:
        return held.get_tensor("log_probs") if (held.metadata() or {}).get("key") == key else None  # type: ignore[no-any-return]


def keep(file: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    """Whole or not at all."""
    staged = file.with_name(f".tmp-{file.name}")
    staged.unlink(missing_ok=True)
    write_tensors(staged, tensors, told)
    staged.replace(file)


def weights_hash(model: nn.Module) -> str:
    """sha256 of every parameter."""
    told = hashlib.sha256()
    for name, parameter in model.named_parameters():
        told.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
    return told.hexdigest()


class Moving:
    """A reference of its own: every `every` steps it becomes mix x policy + (1 - mix) x reference. It is the feed too,
    for what the reference is belongs to where a run stands: the bookmark names the file it was kept in.

    keep: so many files stay, one for each checkpoint and one more."""

    def __init__(
        self,
        feed: ByLengthFeed[Pairs],
        model: nn.Module,
        folder: Path,
        *,
        every: int,
        mix: float,
        keep: int,
        leader: bool,
    ):
        self.feed, self.folder, self.every, self.mix = feed, folder / "reference", every, mix
        self.files, self.leader, self.synced = keep + 1, leader, 0
        self.model = deepcopy(model).eval().requires_grad_(False)

    def __call__(self, batch: AnswerBatch) -> Tensor:
        """The reference's log-probability of each row."""
        return answer_log_probs(self.model, batch)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        if step % self.every == 0:
            self.synced = step
            for mine, policy in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.lerp_(policy.to(mine), self.mix)

    def after_refusal(self, model: nn.Module) -> None:
        """Nothing was left."""

    def at(self, step: int) -> list[AnswerBatch]:
        return self.feed.at(step)

    def bookmark(self) -> dict[str, Any]:
        """Asked for when a checkpoint is made: the reference is kept beside it."""
        if self.leader and self.synced and not self.place(self.synced).exists():
            self.folder.mkdir(exist_ok=True)
            keep(self.place(self.synced), dict(self.model.named_parameters()), {"step": str(self.synced)})
            for old in sorted(self.folder.glob("step-*.safetensors"))[: -self.files]:
                old.unlink()
        return self.feed.bookmark() | {"reference": self.synced}

    def resume(self, bookmark: dict[str, Any]) -> None:
        self.feed.resume(bookmark)
        self.synced = int(bookmark.get("reference", 0))
        if self.synced:
            file = self.place(self.synced)
            if not file.is_file():
                raise DataError(f"{file} is not there, without which this run cannot go on; start a new one")
            with torch.no_grad():
                saved = load_file(file)
                for name, mine in self.model.named_parameters():
                    mine.copy_(saved[name])

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
