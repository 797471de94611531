"""Selects the positions that RPT trains on: those where a proxy model is uncertain of the next token (RPT,
arXiv:2506.08007). They are found once and saved in the run folder.

      H = - sum over the 16 most likely tokens of p log p

The paper does not say whether those 16 probabilities are renormalized. Here they are: H is then the entropy of a
distribution, at most log 16, whatever the mass of the tail. `renormalize=False` is the other reading; where the 16 hold
nearly all of the mass the two agree."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.data.problems.problem import make_rng
from llm_quest.errors import DataError, UsageError
from llm_quest.files import atomic_write_json, damaged_file_errors, load_json
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.assembly import source_name
from llm_quest.recipes.rpt.documents import (
    ENTROPY_THRESHOLDS,
    TOP_K_ENTROPY,
    Documents,
    PositionSelectionConfig,
    RptDocuments,
    RptTextConfig,
)
from llm_quest.recipes.rpt.prompts import Position
from llm_quest.rollouts.sampler import eval_mode
from llm_quest.train.rng_state import derive_seed

TOKENS_PER_PASS = 4096
BUCKET_NAMES = ("trivial", "easy", "medium", "hard")
NO_THRESHOLD = -1.0
POSITIONS_FILE = "positions.json"


@dataclass(frozen=True)
class SelectedPositions:
    """The positions for training and for evaluation. flops: of finding them."""

    train: list[Position]
    held_out: list[Position]
    flops: float
    facts: dict[str, Any]

    @property
    def hash(self) -> str:
        """sha256 of the training positions, as the file has them."""
        return hashlib.sha256(json.dumps(positions_to_json(self.train)).encode()).hexdigest()


def find_or_load_positions(
    config: RptTextConfig, proxy: Decoder, cost: float, text: RptDocuments, folder: Path
) -> SelectedPositions:
    """Load the positions from their file, or find and save them. cost: FLOPs of a forward pass of the proxy over the
    training text."""
    key = {
        "documents": text.hash,
        "select": config.selection.model_dump(mode="json"),
        "each": config.eval_positions_per_bucket,
    }
    if (cached := load_positions(folder, key)) is not None:
        return cached
    part, seed = config.selection, derive_seed(config.seed, "positions")
    train, lost = text.prompt_builder.filter_positions(
        text.train, hard_positions(proxy, text.train, part, part.entropy_threshold)
    )
    held_out, _ = text.prompt_builder.filter_positions(
        text.held_out, hard_positions(proxy, text.held_out, part, NO_THRESHOLD)
    )
    train = train if part.max_positions is None else subsample_positions(train, part.max_positions, seed)
    held_out = sample_per_bucket(held_out, config.eval_positions_per_bucket, seed)
    short = sum(len(ids) < 2 for ids in text.train)
    facts = position_facts(text, train, held_out, lost, short)
    require_positions(config, train, held_out, lost, short)
    content = {
        "key": key,
        "train": positions_to_json(train),
        "held_out": positions_to_json(held_out),
        "flops": cost,
        "facts": facts,
    }
    atomic_write_json(folder / POSITIONS_FILE, content)
    return SelectedPositions(train, held_out, cost, facts)


def load_positions(folder: Path, key: Mapping[str, Any]) -> SelectedPositions | None:
    """Load saved positions; None if there are none, or if a value of `key` (the inputs of the selection) has
    changed."""
    if not (folder / POSITIONS_FILE).is_file():
        return None
    remedy = "remove it, and the places are found again"
    content = load_json(folder / POSITIONS_FILE, remedy=remedy)
    with damaged_file_errors(folder / POSITIONS_FILE, remedy):
        if any(content["key"][name] != value for name, value in key.items()):
            return None
        train, held_out = positions_from_json(content["train"]), positions_from_json(content["held_out"])
        return SelectedPositions(train, held_out, float(content["flops"]), dict(content["facts"]))


def hard_positions(
    proxy: Decoder, documents: Documents, selection: PositionSelectionConfig, above: float
) -> list[Position]:
    return select_positions(
        proxy, documents, min_entropy=above, top_k=selection.top_k, renormalize=selection.renormalize
    )


def position_facts(
    text: RptDocuments, train: Sequence[Position], held_out: Sequence[Position], lost: Counter[str], short: int
) -> dict[str, Any]:
    """Facts about the positions, for the report."""
    dropped = {**lost, **({"a document of one token": short} if short else {})}
    numbers = {"train_documents": len(text.train), "held_out_documents": len(text.held_out)}
    return {**numbers, "train_places": len(train), "held_out_places": len(held_out), "dropped_places": dropped}


def require_positions(
    config: RptTextConfig, train: Sequence[Position], held_out: Sequence[Position], lost: Counter[str], short: int
) -> None:
    if not train:
        why = "".join(f"; {number:,}: {reason}" for reason, number in lost.items())
        why += f"; {short:,} documents have no token to predict" if short else ""
        raise DataError(
            f"no place in {source_name(config.data)} is left to think about: the proxy finds none harder than "
            f"{config.selection.entropy_threshold:g} nats{why}; lower selection.entropy_threshold, or "
            "take a smaller proxy or more text"
        )
    if not held_out:
        raise DataError(f"nothing of {source_name(config.data)} that was held out can be asked for; add text")


def positions_to_json(positions: Sequence[Position]) -> list[list[float]]:
    return [[position.document, position.place, round(position.entropy, 6)] for position in positions]


def positions_from_json(rows: Sequence[Sequence[float]]) -> list[Position]:
    return [Position(int(document), int(place), entropy) for document, place, entropy in rows]


def top_entropy(
    logits: Float[Tensor, "*rows V"], top_k: int = TOP_K_ENTROPY, *, renormalize: bool = True
) -> Float[Tensor, "*rows"]:
    """The entropy of the top_k most likely tokens, in nats and at least float32. 0 log 0 = 0."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    best = z.log_softmax(dim=-1).topk(min(top_k, z.shape[-1]), dim=-1).values
    best = best.log_softmax(dim=-1) if renormalize else best
    return torch.special.entr(best.exp()).sum(dim=-1)


@torch.no_grad()
def select_positions(
    proxy_model: Decoder,
    documents: Sequence[Sequence[int]],
    *,
    min_entropy: float = ENTROPY_THRESHOLDS[0],
    top_k: int = TOP_K_ENTROPY,
    renormalize: bool = True,
) -> list[Position]:
    """Select every place where the proxy's entropy is above `min_entropy`, in the order of the documents. A document's
    first token is no place."""
    selected: list[list[Position]] = [[] for _ in documents]
    device = next(proxy_model.parameters()).device
    with eval_mode(proxy_model):
        for numbers in length_grouped_documents(documents, proxy_model.config.max_position_embeddings):
            rows = torch.zeros(len(numbers), len(documents[numbers[0]]) - 1, dtype=torch.int64)
            for row, number in zip(rows, numbers, strict=True):
                row[: len(documents[number]) - 1] = torch.tensor(list(documents[number][:-1]))
            entropies = top_entropy(proxy_model(rows.to(device)), top_k, renormalize=renormalize).cpu()
            for row, number in zip(entropies, numbers, strict=True):
                per_place = enumerate(row[: len(documents[number]) - 1].tolist(), start=1)
                selected[number] = [
                    Position(number, place, entropy) for place, entropy in per_place if entropy > min_entropy
                ]
    return [position for some in selected for position in some]


def length_grouped_documents(documents: Sequence[Sequence[int]], context: int) -> Iterator[list[int]]:
    """Batch documents with a token to predict, longest first, up to TOKENS_PER_PASS; padding is on the right, where
    causal attention never reads it."""
    for number, ids in enumerate(documents):
        if len(ids) - 1 > context:
            raise UsageError(f"document {number} has {len(ids)} tokens and the proxy sees {context}")
    some: list[int] = []
    for number in sorted(range(len(documents)), key=lambda number: -len(documents[number])):
        if len(documents[number]) < 2:
            break
        if some and (len(some) + 1) * len(documents[some[0]]) > TOKENS_PER_PASS:
            yield some
            some = []
        some.append(number)
    if some:
        yield some


def subsample_positions(positions: Sequence[Position], number: int, seed: int) -> list[Position]:
    """At most `number` of the positions, drawn evenly, in their order; the seed decides which."""
    picked = make_rng("positions", seed).sample(range(len(positions)), min(number, len(positions)))
    return [positions[place] for place in sorted(picked)]


def entropy_bucket(entropy: float, thresholds: Sequence[float] = ENTROPY_THRESHOLDS) -> int:
    """The disjoint bucket of an entropy: the number of thresholds below it. 0 is trivial, 1 easy, 2 medium, 3 hard."""
    return sum(entropy > threshold for threshold in thresholds)


def sample_per_bucket(positions: Sequence[Position], number: int, seed: int) -> list[Position]:
    """At most `number` places of each bucket, drawn evenly, in the order they had."""
    kept: list[int] = []
    for at in range(len(BUCKET_NAMES)):
        some = [place for place, position in enumerate(positions) if entropy_bucket(position.entropy) == at]
        kept += make_rng("buckets", seed, at).sample(some, min(number, len(some)))
    return [positions[place] for place in sorted(kept)]
