"""Exercises about what models are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from book.exercises.exercise import Exercise, Mistake

M = Mistake


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def causal(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.T * scale).masked_fill(~mask, -math.inf), -1) @ v


def mask_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) * causal(len(q))) @ v


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~causal(len(q)), -math.inf)
    return torch.softmax(scores, 0) @ v


def rotate(x: Tensor, positions: Tensor, exponent: float = 2.0, sign: float = 1.0, first: int = 0) -> Tensor:
    half = x.shape[-1] // 2
    angle = (positions[:, None] + first) * 10_000.0 ** (-exponent * torch.arange(half).double() / x.shape[-1])
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - sign * b * angle.sin(), b * angle.cos() + sign * a * angle.sin()], -1)


def rotate_neighbors(x: Tensor, positions: Tensor) -> Tensor:
    d = x.shape[-1]
    order = torch.arange(d).view(-1, 2).T.flatten()
    turned = rotate(x[..., order], positions)
    return turned[..., torch.argsort(order)]


def chosen_weights(logits: Tensor, k: int, *, largest: bool = True) -> Tensor:
    values, chosen = logits.topk(k, -1, largest=largest)
    return torch.zeros_like(logits).scatter(-1, chosen, torch.softmax(values, -1))


def masked_by_choice(weights: Tensor, logits: Tensor, k: int) -> Tensor:
    return weights * torch.zeros_like(logits).scatter(-1, logits.topk(k, -1).indices, 1.0)


def top_p(p: Tensor, limit: float, *, crossing: bool = True, renormalize: bool = True, extra: int = 0) -> Tensor:
    values, order = p.sort(descending=True)
    before = values.cumsum(0) - values
    kept = before < limit if crossing else values.cumsum(0) <= limit
    kept = kept | (torch.arange(len(p)) < int(kept.sum()) + extra)
    result = torch.zeros_like(p).scatter(0, order, values * kept)
    return result / result.sum() if renormalize else result


def from_the_smallest(p: Tensor, limit: float) -> Tensor:
    values, order = p.sort()
    result = torch.zeros_like(p).scatter(0, order, values * (values.cumsum(0) - values < limit))
    return result / result.sum()


EXERCISES = (
    Exercise(
        "softmax", "attention", "scores",
        "Probabilities of scores (..., N), over the last dimension; also for scores of 1,000.",
        lambda g: [(randn(g, 3, 5),), (torch.tensor([1000.0, 999.0, -1000.0]).double(),)],
        lambda scores: torch.softmax(scores, -1),
        (
            M("large scores overflow: subtract the maximum first, which changes nothing else",
              lambda x: x.exp() / x.exp().sum(-1, keepdim=True)),
            M("the sum runs over the first dimension; it is over the last", lambda x: torch.softmax(x, 0)),
            M("these are log-probabilities", lambda x: torch.log_softmax(x, -1)),
            M("the sum runs over all elements, not over each row", lambda x: torch.softmax(x.flatten(), 0).view_as(x)),
            M("a sigmoid looks at each score alone; the probabilities do not sum to one", torch.sigmoid),
        ),
    ),
    Exercise(
        "cross_entropy", "gpt2", "logits, targets",
        "The mean loss in nats of logits (N, V) for targets (N,).",
        lambda g: [(randn(g, 6, 5), torch.randint(0, 5, (6,), generator=g))],
        F.cross_entropy,
        (
            M("this is the sum over tokens; the mean is wanted", lambda x, y: F.cross_entropy(x, y, reduction="sum")),
            M("the sign is wrong: a loss is minus the log-probability", lambda x, y: -F.cross_entropy(x, y)),
            M("this is in bits; nats are wanted", lambda x, y: F.cross_entropy(x, y) / math.log(2)),
            M("the probability is missing its logarithm",
              lambda x, y: (1 - torch.softmax(x, -1).gather(1, y[:, None])).mean()),
            M("the logits are not normalized: log_softmax comes first", lambda x, y: -x.gather(1, y[:, None]).mean()),
            M("the mean runs over the vocabulary too", lambda x, y: F.cross_entropy(x, y) / x.shape[1]),
        ),
    ),
    Exercise(
        "next_token_loss", "gpt2", "logits, ids",
        "The mean loss of a model: logits (B, T, V) after reading ids (B, T), each position asked for the next token.",
        lambda g: [(randn(g, 2, 6, 7), torch.randint(0, 7, (2, 6), generator=g))],
        lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
        (
            M("nothing is shifted: each position is asked for the token that it has just read",
              lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten())),
            M("the shift goes the wrong way: position t is asked for token t-1",
              lambda x, y: F.cross_entropy(x[:, 1:].flatten(0, 1), y[:, :-1].flatten())),
            M("the shift is two tokens", lambda x, y: F.cross_entropy(x[:, :-2].flatten(0, 1), y[:, 2:].flatten())),
            M("the last position is asked for the first token: leave it out, do not roll",
              lambda x, y: F.cross_entropy(x.flatten(0, 1), y.roll(-1, 1).flatten())),
            M("the sum is divided by all tokens, also those that predict nothing",
              lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum") / y.numel()),
        ),
    ),
    Exercise(
        "causal_mask", "attention", "T",
        "A mask (T, T), true where the query of a row may read the key of a column: itself and what came before.",
        lambda g: [(1,), (4,)],
        causal,
        (
            M("it is turned over: the first token sees everything, the last only itself", lambda T: causal(T).T),
            M("a token must see itself, or the first one sees nothing",
              lambda T: torch.ones(T, T, dtype=torch.bool).tril(-1)),
            M("it sees one token of the future", lambda T: torch.ones(T, T, dtype=torch.bool).tril(1)),
            M("nothing is masked", lambda T: torch.ones(T, T, dtype=torch.bool)),
            M("this is true where it must not look", lambda T: ~causal(T)),
        ),
    ),
    Exercise(
        "attention", "attention", "q, k, v",
        "Causal attention of one head: q, k, v (T, d) -> (T, d).",
        lambda g: [(randn(g, 5, 8), randn(g, 5, 8), randn(g, 5, 8))],
        lambda q, k, v: attend(q, k, v, q.shape[-1] ** -0.5, causal(len(q))),
        (
            M("the scores are not divided by the root of d", lambda q, k, v: attend(q, k, v, 1.0, causal(len(q)))),
            M("the scores are divided by d; its root is due",
              lambda q, k, v: attend(q, k, v, 1 / q.shape[-1], causal(len(q)))),
            M("the mask comes after the softmax: rows no longer sum to one", mask_after_softmax),
            M("the future is visible: the mask is missing",
              lambda q, k, v: attend(q, k, v, q.shape[-1] ** -0.5, torch.ones(len(q), len(q), dtype=torch.bool))),
            M("the softmax runs over queries; it must run over keys",
              softmax_over_queries),
            M("queries and keys are swapped", lambda q, k, v: attend(k, q, v, q.shape[-1] ** -0.5, causal(len(q)))),
        ),
    ),
    Exercise(
        "repeat_keys", "llama", "k, heads",
        "Keys (T, G, d) of G groups -> (T, heads, d): query heads 0 to heads/G - 1 read group 0, and so on.",
        lambda g: [(randn(g, 3, 2, 4), 6)],
        lambda k, heads: k.repeat_interleave(heads // k.shape[1], 1),
        (
            M("the groups are tiled, 0 1 0 1; neighboring heads share a group, 0 0 1 1",
              lambda k, heads: k.repeat(1, heads // k.shape[1], 1)),
            M("all heads read the first group", lambda k, heads: k[:, :1].expand(-1, heads, -1)),
            M("the groups are in reverse order", lambda k, heads: k.flip(1).repeat_interleave(heads // k.shape[1], 1)),
            M("the groups are averaged", lambda k, heads: k.mean(1, keepdim=True).expand(-1, heads, -1)),
            M("tokens are repeated in place of heads",
              lambda k, heads: k.repeat_interleave(heads // k.shape[1], 0)),
        ),
    ),
    Exercise(
        "rms_norm", "llama", "x, weight, eps",
        "RMSNorm over the last dimension of x (..., D), with a weight (D,).",
        lambda g: [(randn(g, 3, 8) * 0.1 + 0.05, randn(g, 8), 1e-2)],
        lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps),
        (
            M("the mean is subtracted: that is LayerNorm",
              lambda x, w, eps: F.layer_norm(x, x.shape[-1:], w, None, eps)),
            M("eps belongs inside the root",
              lambda x, w, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w),
            M("the root is missing", lambda x, w, eps: x / (x.square().mean(-1, keepdim=True) + eps) * w),
            M("the squares are summed; their mean is due",
              lambda x, w, eps: x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * w),
            M("the weight is 1 + w: that is Gemma's", lambda x, w, eps: F.rms_norm(x, x.shape[-1:], 1 + w, eps)),
            M("the weight is left out", lambda x, w, eps: F.rms_norm(x, x.shape[-1:], None, eps)),
        ),
    ),
    Exercise(
        "rotary", "llama", "x, positions",
        "Rotate x (T, d) by its positions (T,): the pair (i, i + d/2) turns by position * 10000^(-2i/d).",
        lambda g: [(randn(g, 4, 8), torch.tensor([0.0, 1.0, 5.0, 9.0]).double())],
        rotate,
        (
            M("neighbors (2i, 2i+1) are turned; halves (i, i + d/2) are wanted", rotate_neighbors),
            M("it turns the other way: check the sign of the sine", lambda x, p: rotate(x, p, sign=-1.0)),
            M("the exponent is i/d; it is 2i/d", lambda x, p: rotate(x, p, exponent=1.0)),
            M("the first token is at position 0, not 1", lambda x, p: rotate(x, p, first=1)),
            M("nothing turns: positions are not used", lambda x, p: rotate(x, p * 0)),
        ),
    ),
    Exercise(
        "swiglu", "llama", "x, gate, up, down",
        "A gated layer: x (T, D), gate and up (D, F), down (F, D); the gate passes through SiLU.",
        lambda g: [(randn(g, 3, 4), randn(g, 4, 6), randn(g, 4, 6), randn(g, 6, 4))],
        lambda x, gate, up, down: (F.silu(x @ gate) * (x @ up)) @ down,
        (
            M("gate and up are swapped", lambda x, gate, up, down: (F.silu(x @ up) * (x @ gate)) @ down),
            M("the gate is a sigmoid; SiLU is x times its sigmoid",
              lambda x, gate, up, down: (torch.sigmoid(x @ gate) * (x @ up)) @ down),
            M("the gate multiplies; it is not added", lambda x, gate, up, down: (F.silu(x @ gate) + (x @ up)) @ down),
            M("GELU is Gemma's; SiLU is wanted", lambda x, gate, up, down: (F.gelu(x @ gate) * (x @ up)) @ down),
            M("the gate has no activation", lambda x, gate, up, down: ((x @ gate) * (x @ up)) @ down),
        ),
    ),
    Exercise(
        "router", "experts", "logits, k",
        "Weights (T, E) of experts for router logits (T, E): a softmax over the k largest, 0 elsewhere.",
        lambda g: [(randn(g, 4, 6), 2)],
        chosen_weights,
        (
            M("the softmax runs over all experts and is not renormalized over the chosen",
              lambda x, k: masked_by_choice(torch.softmax(x, -1), x, k)),
            M("all experts compute: nothing is left out", lambda x, k: torch.softmax(x, -1)),
            M("the smallest are chosen", lambda x, k: chosen_weights(x, k, largest=False)),
            M("the chosen are weighed alike", lambda x, k: masked_by_choice(torch.full_like(x, 1 / k), x, k)),
            M("one expert too few is chosen", lambda x, k: chosen_weights(x, k - 1)),
            M("sigmoids are DeepSeek's, and have to be normalized", lambda x, k: masked_by_choice(x.sigmoid(), x, k)),
        ),
    ),
    Exercise(
        "delta_rule", "recurrence", "S, k, v, beta",
        "One step of the delta rule: the state S (d, dv), a key k (d,), a value v (dv,) and a rate beta -> the new S.",
        lambda g: [(randn(g, 4, 4), F.normalize(randn(g, 4), dim=0), randn(g, 4), 0.7)],
        lambda S, k, v, beta: S + beta * torch.outer(k, v - S.T @ k),
        (
            M("the old value is not subtracted: this is linear attention",
              lambda S, k, v, beta: S + beta * torch.outer(k, v)),
            M("the outer product is transposed", lambda S, k, v, beta: S + beta * torch.outer(v - S.T @ k, k)),
            M("what the memory holds for k is S^T k, not S k",
              lambda S, k, v, beta: S + beta * torch.outer(k, v - S @ k)),
            M("beta is left out", lambda S, k, v, beta: S + torch.outer(k, v - S.T @ k)),
            M("the old value is added; it has to be subtracted",
              lambda S, k, v, beta: S + beta * torch.outer(k, v + S.T @ k)),
        ),
    ),
    Exercise(
        "top_p", "generation", "p, limit",
        "Nucleus sampling: of probabilities p (V,) the fewest most probable that reach the limit, renormalized.",
        lambda g: [(torch.tensor([0.1, 0.45, 0.05, 0.3, 0.1]).double(), 0.7),
                   (torch.tensor([0.2, 0.7, 0.1]).double(), 0.6)],
        top_p,
        (
            M("the token that crosses the limit stays: otherwise a certain token is dropped",
              lambda p, limit: top_p(p, limit, crossing=False)),
            M("the result is not renormalized", lambda p, limit: top_p(p, limit, renormalize=False)),
            M("one token too many is kept", lambda p, limit: top_p(p, limit, extra=1)),
            M("the least probable are kept: sort downwards", from_the_smallest),
            M("this is min-p: a limit for each probability, against the largest",
              lambda p, limit: (p * (p >= limit * p.max())) / (p * (p >= limit * p.max())).sum()),
        ),
    ),
)  # fmt: skip
