"""Which positions are worth thinking about: those where a proxy model does not know what comes next (RPT,
arXiv:2506.08007).

      H = - sum over the 16 likeliest tokens of p log p

The paper does not say whether those 16 are made to sum to one. Here they are: H is then the entropy of a distribution,
at most log 16, whatever the tail weighs. `renormalised=False` is the other reading; where the 16 hold nearly everything
the two agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.data.problems.problem import make_rng
from llm_quest.errors import UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.sampler import eval_mode

TOP_K_ENTROPY = 16
TOKENS_PER_PASS = 4096
ENTROPY_THRESHOLDS = (0.5, 1.0, 1.5)
"""Easy, medium and hard begin here (RPT), in nats. The paper's sets are nested: hard is in medium too."""


@dataclass(frozen=True)
class Position:
    """tokens[place] of a document is what is to be foretold, from tokens[:place] alone."""

    document: int
    place: int
    entropy: float


def top_entropy(
    logits: Float[Tensor, "*rows V"], top_k: int = TOP_K_ENTROPY, *, renormalised: bool = True
) -> Float[Tensor, "*rows"]:
    """In nats, at least float32. A token without probability adds nothing (0 log 0 = 0)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    best = z.log_softmax(dim=-1).topk(min(top_k, z.shape[-1]), dim=-1).values
    best = best.log_softmax(dim=-1) if renormalised else best
    return torch.special.entr(best.exp()).sum(dim=-1)


@torch.no_grad()
def select_positions(
    proxy_model: Decoder,
    documents: Sequence[Sequence[int]],
    *,
    min_entropy: float = ENTROPY_THRESHOLDS[0],
    top_k: int = TOP_K_ENTROPY,
    renormalised: bool = True,
) -> list[Position]:
    """Every place whose next token the proxy finds harder than `min_entropy`, in the order of the documents. A
    document's first token is never asked for."""
    found: list[list[Position]] = [[] for _ in documents]
    device = next(proxy_model.parameters()).device
    with eval_mode(proxy_model):
        for numbers in length_grouped_documents(documents, proxy_model.config.max_position_embeddings):
            rows = torch.zeros(len(numbers), len(documents[numbers[0]]) - 1, dtype=torch.int64)
            for row, number in zip(rows, numbers, strict=True):
                row[: len(documents[number]) - 1] = torch.tensor(list(documents[number][:-1]))
            entropies = top_entropy(proxy_model(rows.to(device)), top_k, renormalised=renormalised).cpu()
            for row, number in zip(entropies, numbers, strict=True):
                told = enumerate(row[: len(documents[number]) - 1].tolist(), start=1)
                found[number] = [Position(number, place, entropy) for place, entropy in told if entropy > min_entropy]
    return [position for some in found for position in some]


def length_grouped_documents(documents: Sequence[Sequence[int]], context: int) -> Iterator[list[int]]:
    """Numbers of documents with anything to foretell, longest first, as many together as make a fair-sized pass;
    padding on the right is never looked back at."""
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


def subsample_positions(found: Sequence[Position], number: int, seed: int) -> list[Position]:
    """At most `number` of the positions, drawn evenly, in their order; the seed decides which."""
    picked = make_rng("positions", seed).sample(range(len(found)), min(number, len(found)))
    return [found[place] for place in sorted(picked)]


def entropy_bucket(entropy: float, thresholds: Sequence[float] = ENTROPY_THRESHOLDS) -> int:
    """Disjoint buckets: how many thresholds lie below. 0 is trivial, 1 easy, 2 medium, 3 hard."""
    return sum(entropy > threshold for threshold in thresholds)
