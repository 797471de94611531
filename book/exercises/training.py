"""Exercises about losses, training and judging."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from book.exercises.exercise import Exercise, Mistake
from book.exercises.layers import randn
from llm_quest.objectives.preference_losses import DPO, LogRatios
from llm_quest.train.optimizers import make_lr_schedule

M = Mistake


def surrogate(ratio: Tensor, advantage: Tensor, epsilon: float, low: float | None = None) -> Tensor:
    bounded = ratio.clamp(1 - epsilon if low is None else low, 1 + epsilon)
    return torch.minimum(ratio * advantage, bounded * advantage)


def cosine(step: int, warmup: int, total: int, *, floor: float = 0.1, late: int = 0) -> float:
    if step < warmup:
        return (step + 1 - late) / warmup
    done = (step - warmup) / (total - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def residual(p: Tensor, q: Tensor) -> Tensor:
    rest = (p - q).clamp(min=0)
    return rest / rest.sum()


def group_advantages(r: Tensor, *, correction: int = 1, dim: int = -1) -> Tensor:
    return (r - r.mean(dim, keepdim=True)) / (r.std(dim, keepdim=True, correction=correction) + 1e-4)


def dpo(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(margin(w, x, rw, rx, beta)).mean()


def margin(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, beta: float) -> Tensor:
    return beta * ((w - rw) - (x - rx))


def preference_inputs(g: torch.Generator) -> list[tuple[Any, ...]]:
    return [(*(randn(g, 5) - 8 for _ in range(4)), 0.3)]


def pass_at(n: int, c: int, k: int) -> float:
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def tokens_of(chosen: Tensor, experts: int) -> Tensor:
    """Which expert (T, E) each token went to."""
    return F.one_hot(chosen, experts).double()


EXERCISES = (
    Exercise(
        "bits_per_byte", "ngrams", "nats, text",
        "Bits per UTF-8 byte of a text whose tokens cost so many nats in all.",
        lambda g: [(12.5, "Größe"), (7.0, "plain")],
        lambda nats, text: nats / math.log(2) / len(text.encode()),
        (
            M("characters are counted; ö has two bytes", lambda nats, text: nats / math.log(2) / len(text)),
            M("nats are not turned into bits", lambda nats, text: nats / len(text.encode())),
            M("a nat is more than a bit: divide by ln 2", lambda nats, text: nats * math.log(2) / len(text.encode())),
            M("this is bits, not yet for each byte", lambda nats, text: nats / math.log(2)),
            M("log10 in place of the natural logarithm", lambda nats, text: nats / math.log10(2) / len(text.encode())),
        ),
    ),
    Exercise(
        "step_loss", "training", "losses, counts",
        "The loss of a step: sums of micro-batches (N,) and their numbers of tokens (N,).",
        lambda g: [(torch.tensor([10.0, 1.0, 4.0]).double(), torch.tensor([5.0, 1.0, 8.0]).double())],
        lambda losses, counts: losses.sum() / counts.sum(),
        (
            M("this is the mean of means: a token of a short batch counts more", lambda x, n: (x / n).mean()),
            M("the sum is not divided", lambda x, n: x.sum()),
            M("it is divided by the number of micro-batches", lambda x, n: x.mean()),
            M("the means are added", lambda x, n: (x / n).sum()),
            M("the largest count is taken for all", lambda x, n: x.sum() / (n.max() * len(n))),
        ),
    ),
    Exercise(
        "learning_rate", "training", "step, warmup, total",
        "The share of the peak rate at a step counted from 0: linear warm-up, 1/warmup at step 0, then a cosine\n"
        "from 1 at step `warmup` to 0.1 at step `total`.",
        lambda g: [(step, 4, 20) for step in (0, 3, 4, 8, 12, 20)],
        lambda s, w, t: make_lr_schedule(t, warmup_steps=w, shape="cosine", min_lr_ratio=0.1)(s),
        (
            M("the first step has rate 0 and teaches nothing: the warm-up counts from 1",
              lambda s, w, t: cosine(s, w, t, late=1)),
            M("it falls to 0; a tenth is to remain", lambda s, w, t: cosine(s, w, t, floor=0.0)),
            M("the decay begins at step 0 and not behind the warm-up",
              lambda s, w, t: (s + 1) / w if s < w else 0.1 + 0.9 * (1 + math.cos(math.pi * s / t)) / 2),
            M("the warm-up is missing", lambda s, w, t: cosine(max(s, w), w, t)),
            M("the decay is linear", lambda s, w, t: (s + 1) / w if s < w else 1 - 0.9 * (s - w) / (t - w)),
        ),
    ),
    Exercise(
        "merge_lora", "fine-tuning", "W, A, B, alpha",
        "The merged weight: W (m, n), A (r, n), B (m, r).",
        lambda g: [(randn(g, 4, 4), randn(g, 2, 4), randn(g, 4, 2), 8.0)],
        lambda W, A, B, alpha: W + alpha / A.shape[0] * B @ A,
        (
            M("alpha is divided by the rank", lambda W, A, B, alpha: W + alpha * B @ A),
            M("the root of the rank is rsLoRA's", lambda W, A, B, alpha: W + alpha / A.shape[0] ** 0.5 * B @ A),
            M("the product is transposed", lambda W, A, B, alpha: W + alpha / A.shape[0] * (B @ A).T),
            M("the base weight is missing", lambda W, A, B, alpha: alpha / A.shape[0] * B @ A),
            M("the scale is left out", lambda W, A, B, alpha: W + B @ A),
        ),
    ),
    Exercise(
        "balance_loss", "experts", "probabilities, chosen",
        "Switch's loss of one layer: probabilities (T, E) of the router, the expert (T,) that each token chose.\n"
        "It is 1 where all is even.",
        lambda g: [(torch.softmax(randn(g, 12, 4), -1), torch.randint(0, 4, (12,), generator=g))],
        lambda p, c: p.shape[1] * (tokens_of(c, p.shape[1]).mean(0) * p.mean(0)).sum(),
        (
            M("the number of experts is missing: even would be 1/E",
              lambda p, c: (tokens_of(c, p.shape[1]).mean(0) * p.mean(0)).sum()),
            M("the shares are squared: they have no gradient",
              lambda p, c: p.shape[1] * tokens_of(c, p.shape[1]).mean(0).square().sum()),
            M("tokens are counted; their share is due",
              lambda p, c: p.shape[1] * (tokens_of(c, p.shape[1]).sum(0) * p.mean(0)).sum()),
            M("the product is taken for each token, before the means",
              lambda p, c: p.shape[1] * (tokens_of(c, p.shape[1]) * p).mean(0).sum()),
            M("the probabilities are squared: where tokens really went is not in it",
              lambda p, c: p.shape[1] * p.mean(0).square().sum()),
        ),
    ),
    Exercise(
        "dpo_loss", "preferences", "chosen, rejected, ref_chosen, ref_rejected, beta",
        "DPO's mean loss, of log-probabilities (N,) of answers under the policy and the reference.",
        preference_inputs,
        lambda w, x, rw, rx, beta: DPO(beta)(LogRatios(w - rw, x - rx, rw - rx)).mean(),
        (
            M("the reference is missing", lambda w, x, rw, rx, b: -F.logsigmoid(b * (w - x)).mean()),
            M("chosen and rejected are swapped", lambda w, x, rw, rx, b: dpo(x, w, rx, rw, b)),
            M("the log-ratios are added; the margin is their difference",
              lambda w, x, rw, rx, b: -F.logsigmoid(b * ((w - rw) + (x - rx))).mean()),
            M("beta stands outside of the sigmoid", lambda w, x, rw, rx, b: b * dpo(w, x, rw, rx, 1.0)),
            M("the logarithm is missing", lambda w, x, rw, rx, b: (1 - torch.sigmoid(margin(w, x, rw, rx, b))).mean()),
            M("beta is left out", lambda w, x, rw, rx, b: dpo(w, x, rw, rx, 1.0)),
            M("the margins are averaged before the sigmoid",
              lambda w, x, rw, rx, b: -F.logsigmoid(margin(w, x, rw, rx, b).mean())),
        ),
    ),
    Exercise(
        "reward_loss", "preferences", "chosen, rejected",
        "The mean Bradley-Terry loss of scores (N,), also where they are 1,000 apart.",
        lambda g: [(randn(g, 6), randn(g, 6)), (torch.tensor([0.0]).double(), torch.tensor([1000.0]).double())],
        lambda w, x: -F.logsigmoid(w - x).mean(),
        (
            M("log(sigmoid(x)) is minus infinity for large negative x: use logsigmoid",
              lambda w, x: -torch.sigmoid(w - x).log().mean()),
            M("chosen and rejected are swapped", lambda w, x: -F.logsigmoid(x - w).mean()),
            M("the sign is wrong", lambda w, x: F.logsigmoid(w - x).mean()),
            M("this is a hinge", lambda w, x: (1 - (w - x)).clamp(min=0).mean()),
            M("the sum is taken; the mean is wanted", lambda w, x: -F.logsigmoid(w - x).sum()),
        ),
    ),
    Exercise(
        "group_advantages", "reinforcement", "rewards",
        "GRPO's advantages of rewards (prompts, samples): of each group less its mean, over its standard deviation\n"
        "(n - 1) plus 1e-4.",
        lambda g: [(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.9, 0.4, 0.1]]).double(),),
                   (torch.ones(2, 3).double(),)],
        group_advantages,
        (
            M("mean and deviation are taken over the batch; each prompt is a group of its own",
              lambda r: (r - r.mean()) / (r.std() + 1e-4)),
            M("the deviation divides by n; n - 1 is asked for", lambda r: group_advantages(r, correction=0)),
            M("it is not divided: that is Dr. GRPO", lambda r: r - r.mean(-1, keepdim=True)),
            M("the mean is not subtracted", lambda r: r / (r.std(-1, keepdim=True) + 1e-4)),
            M("without the small number a group without spread gives NaN",
              lambda r: (r - r.mean(-1, keepdim=True)) / r.std(-1, keepdim=True)),
            M("the samples of one prompt are the group, not the first samples of all prompts",
              lambda r: group_advantages(r, dim=0)),
        ),
    ),
    Exercise(
        "clipped_surrogate", "reinforcement", "ratio, advantage, epsilon",
        "PPO's term to maximize at each token.",
        lambda g: [(torch.tensor([0.5, 0.9, 1.5, 0.5, 0.9, 1.5]).double(),
                    torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0]).double(), 0.2)],
        surrogate,
        (
            M("max where min is due: what should be held back goes on",
              lambda r, a, e: torch.maximum(r * a, r.clamp(1 - e, 1 + e) * a)),
            M("the clipped term alone: a ratio on the wrong side can no longer come back",
              lambda r, a, e: r.clamp(1 - e, 1 + e) * a),
            M("nothing is clipped", lambda r, a, e: r * a),
            M("the product is clipped; the ratio is to be",
              lambda r, a, e: torch.minimum(r * a, (r * a).clamp(1 - e, 1 + e))),
            M("the lower bound is missing", lambda r, a, e: surrogate(r, a, e, low=0.0)),
            M("the sign is that of a loss; this term is maximized", lambda r, a, e: -surrogate(r, a, e)),
        ),
    ),
    Exercise(
        "kl_estimate", "reinforcement", "log_p, log_ref",
        "The estimator k3 of KL(policy || reference) at each token that the policy sampled: never negative.",
        lambda g: [(randn(g, 6) - 2, randn(g, 6) - 2)],
        lambda p, r: (r - p).exp() - (r - p) - 1,
        (
            M("this is k1: its mean is right, its values may be negative", lambda p, r: p - r),
            M("this is k2", lambda p, r: (p - r).square() / 2),
            M("the ratio is turned over: it is reference over policy", lambda p, r: (p - r).exp() - (p - r) - 1),
            M("the minus one is missing: it is 1 where both agree", lambda p, r: (r - p).exp() - (r - p)),
            M("the log-ratio is added; it is subtracted", lambda p, r: (r - p).exp() + (r - p) - 1),
        ),
    ),
    Exercise(
        "residual", "generation", "p, q",
        "The distribution from which a rejected draft is replaced: p of the large model, q of the draft, (V,) each.",
        lambda g: [(torch.softmax(randn(g, 5), 0), torch.softmax(randn(g, 5), 0))],
        residual,
        (
            M("it does not sum to one", lambda p, q: (p - q).clamp(min=0)),
            M("the large model's own distribution: tokens that the draft likes come too often", lambda p, q: p),
            M("p and q are swapped", lambda p, q: residual(q, p)),
            M("negative differences are 0, not turned around", lambda p, q: (p - q).abs() / (p - q).abs().sum()),
            M("the differences are squared", lambda p, q: residual(p, q).square() / residual(p, q).square().sum()),
        ),
    ),
    Exercise(
        "pass_at_k", "evaluation", "n, c, k",
        "The unbiased estimate of pass@k: n samples, c of them right.",
        lambda g: [(20, 3, 10), (10, 9, 2), (8, 0, 4)],
        pass_at,
        (
            M("this is biased: it draws with replacement", lambda n, c, k: 1 - (1 - c / n) ** k),
            M("this is the chance that none is right", lambda n, c, k: 1 - pass_at(n, c, k)),
            M("this is pass@1", lambda n, c, k: c / n),
            M("this is the number of right ones among k, on average", lambda n, c, k: k * c / n),
            M("this is the chance that all k are right", lambda n, c, k: math.comb(c, k) / math.comb(n, k)),
        ),
    ),
)  # fmt: skip
