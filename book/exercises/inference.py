"""Exercises about caches, long contexts, drafts, values, and runs that are resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from book.exercises.exercise import Exercise, Mistake
from book.exercises.layers import randn
from llm_quest.data.loader import shuffle_indices
from llm_quest.generation.speculative.rejection_sampler import acceptance_probability
from llm_quest.rollouts.gae import GAE

M = Mistake
Order = Callable[[int], Sequence[int]]


def attend_last(q: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(keys @ q * scale, 0) @ values


def cached_step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    return attend_last(q, torch.cat([keys, k[None]])[-window:], torch.cat([values, v[None]])[-window:])


def absorbed(q: Tensor, q_rope: Tensor, W: Tensor, c: Tensor, k_rope: Tensor, width: int | None = None) -> Tensor:
    """Scores (H, S) of latents c (S, r) that are never expanded."""
    scores = torch.einsum("hn,hnr,sr->hs", q, W, c) + torch.einsum("hr,sr->hs", q_rope, k_rope)
    return scores / (q.shape[-1] + q_rope.shape[-1] if width is None else width) ** 0.5


def yarn(d: int, theta: float, factor: float, original: int, fast: float, slow: float, *, whole: bool = True,
         unit: float = 2 * math.pi) -> Tensor:  # fmt: skip
    """Frequencies (d/2,) in float64."""
    low, high = (d * math.log(original / (turns * unit)) / (2 * math.log(theta)) for turns in (fast, slow))
    low, high = (math.floor(low), math.ceil(high)) if whole else (low, high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = ((torch.arange(d // 2).double() - low) / (high - low)).clamp(0, 1)
    return plain(d, theta) * (ramp / factor + 1 - ramp)


def plain(d: int, theta: float) -> Tensor:
    return theta ** (-2 * torch.arange(d // 2).double() / d)


def yarn_turned_over(d: int, theta: float, factor: float, original: int, fast: float, slow: float) -> Tensor:
    f = plain(d, theta)
    return f + f / factor - yarn(d, theta, factor, original, fast, slow)


def accepted(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> int:
    places = torch.arange(len(tokens))
    return leading(u < acceptance_probability(p[places, tokens], q[places, tokens]))


def leading(right: Tensor) -> int:
    """How many are true before the first that is not."""
    return int(right.long().cumprod(0).sum())


def draft_inputs(g: torch.Generator) -> list[tuple[Tensor, ...]]:
    found = []
    for _ in range(6):
        p, q = (torch.softmax(1.5 * randn(g, 6, 4), -1) for _ in range(2))
        found.append((p, q, torch.randint(0, 4, (6,), generator=g), torch.rand(6, generator=g).double()))
    return found


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    return torch.from_numpy(GAE(gamma=gamma, lam=lam).advantages(rewards.numpy(), values.numpy()))


def gae_like(r: Tensor, v: Tensor, gamma: float, decay: float, last: float = 0.0) -> Tensor:
    """The recursion with another decay, or another value behind the last token."""
    following = torch.cat([v[1:], v.new_tensor([last])])
    delta, found = r + gamma * following - v, torch.zeros_like(r)
    later = 0.0
    for t in reversed(range(len(r))):
        later = found[t] = delta[t] + decay * later
    return found


def order_of(rows: int) -> Order:
    return lambda epoch: [int(one) for one in shuffle_indices(rows, 7, epoch)]


def rows_of_step(step: int, batch: int, rows: int, order: Order) -> list[int]:
    numbers = range(step * batch, (step + 1) * batch)
    return [order(number // rows)[number % rows] for number in numbers]


def whole_batches(step: int, batch: int, rows: int, order: Order) -> list[int]:
    epoch, place = divmod(step, rows // batch)
    return list(order(epoch)[place * batch : (place + 1) * batch])


def one_epoch(step: int, batch: int, rows: int, order: Order) -> list[int]:
    return [order(step * batch // rows)[number % rows] for number in range(step * batch, (step + 1) * batch)]


EXERCISES = (
    Exercise(
        "cached_step", "generation", "q, k, v, keys, values, window",
        "Attention of one new token, one head: its q, k, v (d,), what is cached of the tokens before, keys and values\n"
        "(S, d); a token reads itself and what came before, `window` tokens in all.",
        lambda g: [(randn(g, 4), randn(g, 4), randn(g, 4), randn(g, n, 4), randn(g, n, 4), 3) for n in (5, 3, 1)],
        cached_step,
        (
            M("a token reads itself too: append its key and value first",
              lambda q, k, v, keys, values, w: attend_last(q, keys[-w:], values[-w:])),
            M("the window counts the token itself: one cached token less",
              lambda q, k, v, keys, values, w: cached_step(q, k, v, keys, values, w + 1)),
            M("the oldest tokens are kept; a window keeps the newest",
              lambda q, k, v, keys, values, w: attend_last(q, torch.cat([keys, k[None]])[:w],
                                                           torch.cat([values, v[None]])[:w])),
            M("the scores are not divided by the root of d",
              lambda q, k, v, keys, values, w: attend_last(q, torch.cat([keys, k[None]])[-w:],
                                                           torch.cat([values, v[None]])[-w:], 1.0)),
            M("the whole cache is read: the window is missing",
              lambda q, k, v, keys, values, w: cached_step(q, k, v, keys, values, len(keys) + 1)),
            M("keys and values are taken from other tokens: both are appended at the end",
              lambda q, k, v, keys, values, w: attend_last(q, torch.cat([keys, k[None]])[-w:],
                                                           torch.cat([v[None], values])[-w:])),
        ),
    ),
    Exercise(
        "absorbed_scores", "deepseek", "q, q_rope, W, c, k_rope",
        "Scores (H, S) of multi-head latent attention without expanding keys: q (H, n) and q_rope (H, r) of a token,\n"
        "W (H, n, rank) that would make keys of the latents c (S, rank), a rotated key k_rope (S, r) for all heads.",
        lambda g: [(randn(g, 3, 4), randn(g, 3, 2), randn(g, 3, 4, 4), randn(g, 5, 4), randn(g, 5, 2)),
                   (randn(g, 2, 3), randn(g, 2, 2), randn(g, 2, 3, 5), randn(g, 4, 5), randn(g, 4, 2))],
        absorbed,
        (
            M("a score is divided by the root of the width of a key, n + r; the rank is no width of a key",
              lambda q, qr, W, c, kr: absorbed(q, qr, W, c, kr, c.shape[-1] + kr.shape[-1])),
            M("a key is n + r wide: this divides by the root of n, and forgets the rotated part",
              lambda q, qr, W, c, kr: absorbed(q, qr, W, c, kr, q.shape[-1])),
            M("the rotated part is missing", lambda q, qr, W, c, kr: absorbed(q, torch.zeros_like(qr), W, c, kr)),
            M("these are probabilities; scores are asked for",
              lambda q, qr, W, c, kr: torch.softmax(absorbed(q, qr, W, c, kr), -1)),
            M("the scores are not scaled", lambda q, qr, W, c, kr: absorbed(q, qr, W, c, kr, 1)),
            M("every head has its own W: here all heads use the first",
              lambda q, qr, W, c, kr: absorbed(q, qr, W[:1].expand_as(W), c, kr)),
            M("each part is scaled by its own width; the sum of both is one score",
              lambda q, qr, W, c, kr: absorbed(q, torch.zeros_like(qr), W, c, kr, q.shape[-1])
              + absorbed(torch.zeros_like(q), qr, W, c, kr, qr.shape[-1])),
        ),
    ),
    Exercise(
        "yarn_frequencies", "long-context", "d, theta, factor, original, fast, slow",
        "YaRN's frequencies (d/2,): theta^(-2i/d) for pairs that turn more than `fast` times within the original\n"
        "length, divided by `factor` for those that turn less than `slow` times, a ramp between, linear in i. Pair i\n"
        "turns n times where i = d ln(original / (2 pi n)) / (2 ln theta); the ramp begins at that i for `fast`,\n"
        "rounded down, and ends at that for `slow`, rounded up.",
        lambda g: [(64, 10_000.0, 4.0, 4096, 32.0, 1.0), (128, 500_000.0, 8.0, 8192, 32.0, 1.0)],
        yarn,
        (
            M("the ramp is turned over: fast pairs stay, slow pairs are divided", yarn_turned_over),
            M("all pairs are divided: that is linear interpolation",
              lambda d, theta, s, n, fast, slow: plain(d, theta) / s),
            M("the ramp's ends are not rounded", lambda *given: yarn(*given, whole=False)),
            M("a turn is 2 pi, not 1", lambda *given: yarn(*given, unit=1.0)),
            M("the base is changed: that is NTK scaling",
              lambda d, theta, s, n, fast, slow: plain(d, theta * s ** (d / (d - 2)))),
            M("there is no ramp: pairs between the ends are divided like slow ones",
              lambda d, theta, s, n, fast, slow: torch.where(
                  yarn(d, theta, s, n, fast, slow) == plain(d, theta), plain(d, theta), plain(d, theta) / s)),
        ),
    ),
    Exercise(
        "accepted", "generation", "p, q, tokens, u",
        "How many drafted tokens (T,) are kept: p and q (T, V), the model's and the draft's probabilities at a place,\n"
        "u (T,) uniform numbers; a token is kept where u < min(1, p/q), up to the first that is not.",
        draft_inputs,
        accepted,
        (
            M("behind the first rejected token nothing counts",
              lambda p, q, t, u: int((u < (p / q)[torch.arange(len(t)), t]).sum())),
            M("the ratio is turned over: it is p over q",
              lambda p, q, t, u: leading(u < (q / p)[torch.arange(len(t)), t])),
            M("q is not in it: a token that the draft seldom proposes is then kept too seldom",
              lambda p, q, t, u: leading(u < p[torch.arange(len(t)), t])),
            M("this is greedy verification: it keeps what the model finds most probable",
              lambda p, q, t, u: leading(p.argmax(-1) == t)),
            M("the first rejected token is counted",
              lambda p, q, t, u: min(accepted(p, q, t, u) + 1, len(t))),
            M("the places are shifted by one: p at place i judges token i",
              lambda p, q, t, u: leading(u < (p.roll(-1, 0) / q)[torch.arange(len(t)), t])),
        ),
    ),
    Exercise(
        "gae", "reinforcement", "rewards, values, gamma, lam",
        "Generalized advantages (T,) of rewards and values (T,) of one text; behind the last token the value is 0.",
        lambda g: [(randn(g, 5), randn(g, 5), 0.9, 0.8),
                   (torch.tensor([0.0, 0.0, 1.0]).double(), randn(g, 3), 1.0, 0.5)],
        gae,
        (
            M("lam is missing: these are the returns less the values", lambda r, v, y, lam: gae_like(r, v, y, y)),
            M("the recursion is missing: these are the errors of one step",
              lambda r, v, y, lam: gae_like(r, v, y, 0.0)),
            M("the decay is gamma lam, not lam", lambda r, v, y, lam: gae_like(r, v, y, lam)),
            M("behind the last token the value is 0, not that of the last token",
              lambda r, v, y, lam: gae_like(r, v, y, y * lam, float(v[-1]))),
            M("the values are added: these are the targets of the value, not the advantages",
              lambda r, v, y, lam: gae_like(r, v, y, y * lam) + v),
            M("the next value is not discounted", lambda r, v, y, lam: gae_like(r, v, 1.0, y * lam)),
        ),
    ),
    Exercise(
        "rows_of_step", "training", "step, batch, rows, order",
        "The rows of a step, from its number alone: so a resumed run reads what the straight one would have read.\n"
        "order(epoch) is a list of all `rows` in the order of that epoch, counted from 0. Epochs follow each other\n"
        "without a gap: a batch may end one and begin the next.",
        lambda g: [(step, 3, 7, order_of(7)) for step in (0, 1, 2, 3, 6, 9)],
        rows_of_step,
        (
            M("every epoch has the order of the first",
              lambda s, b, n, order: [order(0)[i % n] for i in range(s * b, (s + 1) * b)]),
            M("the rest of an epoch that fills no batch is dropped", whole_batches),
            M("steps are counted from 0", lambda s, b, n, order: rows_of_step(s + 1, b, n, order)),
            M("a batch that ends an epoch takes its last rows from the next one's order", one_epoch),
            M("the rows are not shuffled", lambda s, b, n, order: [i % n for i in range(s * b, (s + 1) * b)]),
            M("each step shuffles anew: rows come twice in an epoch, others never",
              lambda s, b, n, order: order(s)[:b]),
        ),
    ),
    Exercise(
        "lookahead_loss", "deepseek", "logits, ids, k",
        "The mean loss in nats of a module that predicts k tokens further than the model: logits (B, T, V) at each\n"
        "position of ids (B, T); k = 0 is the model's own loss, of the next token.",
        lambda g: [(randn(g, 2, 6, 5), torch.randint(0, 5, (2, 6), generator=g), k) for k in (1, 2)],
        lambda x, ids, k: F.cross_entropy(x[:, : -1 - k].flatten(0, 1), ids[:, 1 + k :].flatten()),
        (
            M("the shift is k + 1: one for the next token, k for those further",
              lambda x, ids, k: F.cross_entropy(x[:, :-k].flatten(0, 1), ids[:, k:].flatten())),
            M("this is the loss of the next token; k is not in it",
              lambda x, ids, k: F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten())),
            M("the shift is turned: the logits of a position predict what follows it",
              lambda x, ids, k: F.cross_entropy(x[:, 1 + k :].flatten(0, 1), ids[:, : -1 - k].flatten())),
            M("the ids are rolled, so that the first ones are predicted from the end",
              lambda x, ids, k: F.cross_entropy(x.flatten(0, 1), ids.roll(-1 - k, 1).flatten())),
            M("the sum is divided by all positions; those without a target do not count",
              lambda x, ids, k: F.cross_entropy(x[:, : -1 - k].flatten(0, 1), ids[:, 1 + k :].flatten(),
                                                reduction="sum") / ids.numel()),
            M("this is the sum; the mean is wanted",
              lambda x, ids, k: F.cross_entropy(x[:, : -1 - k].flatten(0, 1), ids[:, 1 + k :].flatten(),
                                                reduction="sum")),
        ),
    ),
)  # fmt: skip
