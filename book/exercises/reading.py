"""Exercises about what goes into a model and what is made of its answers: merges, Gemma's scores, images, prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from book.exercises.exercise import Exercise, Mistake
from book.exercises.layers import causal, randn
from llm_quest.recipes.rpt.prompts import prefix_match

M = Mistake
Pairs = Sequence[tuple[int, int]]
Merge = Callable[[list[int], tuple[int, int], int], list[int]]

ENDINGS = tuple(
    (said, [b" caf", b"\xc3", b"\xa9", b" is"])
    for said in (" café".encode(), b" caf", " café is".encode(), b" ca", " café i".encode(), b"", b"caf", b" cat",
                 "é".encode(), " café is it".encode())
)  # fmt: skip
"""What is predicted, and the tokens that follow: three are right, of one, three and four tokens."""


def bpe_with(merge: Merge, ids: list[int], merges: Pairs, *, reverse: bool = False, first: int = 256) -> list[int]:
    """Each merge of the list, made by a function of ids, a pair and its new token."""
    numbered = list(enumerate(merges, start=first))
    for new, pair in reversed(numbered) if reverse else numbered:
        ids = merge(ids, pair, new)
    return ids


def merge_once(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """The ids with every place of a pair as one new token, from the left."""
    out, at = [], 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        out.append(new if found else ids[at])
        at += 2 if found else 1
    return out


def bpe_encode(ids: list[int], merges: Pairs) -> list[int]:
    return bpe_with(merge_once, ids, merges)


def merge_overlapping(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    return [new if tuple(ids[at : at + 2]) == pair else one for at, one in enumerate(ids)]


def merge_first_place(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    place = next((at for at in range(len(ids) - 1) if tuple(ids[at : at + 2]) == pair), None)
    return ids if place is None else [*ids[:place], new, *ids[place + 2 :]]


def merge_from_the_right(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    return merge_once(ids[::-1], pair[::-1], new)[::-1]


def longest_first(ids: list[int], merges: Pairs) -> list[int]:
    """The longest known token at each place, whatever the order of the merges."""
    names = {bytes([one]): one for one in range(256)}
    text = {one: bytes([one]) for one in range(256)}
    for number, (a, b) in enumerate(merges):
        text[256 + number] = text[a] + text[b]
        names[text[256 + number]] = 256 + number
    rest, out = b"".join(text[one] for one in ids), []
    while rest:
        size = next(n for n in range(len(rest), 0, -1) if rest[:n] in names)
        out.append(names[rest[:size]])
        rest = rest[size:]
    return out


def gemma_weights(q: Tensor, k: Tensor, scalar: float, cap: float, window: int, *, cap_late: bool = False) -> Tensor:
    scores, mask = q @ k.T / scalar**0.5, seen_through(len(q), window)
    if cap_late:
        return torch.softmax(cap * torch.tanh(scores.masked_fill(~mask, -math.inf) / cap), -1)
    return torch.softmax((cap * torch.tanh(scores / cap)).masked_fill(~mask, -math.inf), -1)


def seen_through(T: int, window: int) -> Tensor:
    return causal(T).triu(1 - window)


def masked_softmax(scores: Tensor, window: int) -> Tensor:
    return torch.softmax(scores.masked_fill(~seen_through(len(scores), window), -math.inf), -1)


def patch_grid(image: Tensor, size: int) -> Tensor:
    """(rows, columns, channels, size, size)."""
    return image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4)


def products(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines (N, N) of every image with every text."""
    return F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def two_ways(scores: Tensor) -> Tensor:
    return (one_way(scores) + one_way(scores.T)) / 2


def one_way(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, torch.arange(len(scores)))


def ends_of(tokens: Sequence[bytes]) -> set[int]:
    return set(accumulate(map(len, tokens)))


EXERCISES = (
    Exercise(
        "bpe_encode", "text-and-tokens", "ids, merges",
        "Byte-pair encoding: ids, a list of bytes, and merges, a list of pairs in the order of learning. Merge\n"
        "number n, counted from 0, replaces its pair by the token 256 + n everywhere, from left to right; a later\n"
        "merge may join tokens that an earlier one made. Returns a list.",
        lambda g: [(list(b"aaaabaaa"), [(97, 97), (256, 98)]), (list(b"abcab"), [(98, 99), (97, 98)]),
                   (list(b"low lower"), [(108, 111), (256, 119), (101, 114)])],
        bpe_encode,
        (
            M("merged tokens overlap: of aaa the pair aa is one token and an a is left",
              lambda ids, merges: bpe_with(merge_overlapping, ids, merges)),
            M("the merges are made in reverse order: what was learned first is merged first",
              lambda ids, merges: bpe_with(merge_once, ids, merges, reverse=True)),
            M("only the first place of a pair is merged",
              lambda ids, merges: bpe_with(merge_first_place, ids, merges)),
            M("pairs are looked for from the right; of aaa the first two are merged",
              lambda ids, merges: bpe_with(merge_from_the_right, ids, merges)),
            M("the longest token is taken at each place; the order of the merges decides",
              longest_first),
            M("the first merge makes token 256", lambda ids, merges: bpe_with(merge_once, ids, merges, first=257)),
            M("the pairs are left in front of the tokens that they make",
              lambda ids, merges: bpe_with(lambda old, pair, new: [
                  one for at, token in enumerate(old)
                  for one in ([token, new] if tuple(old[at : at + 2]) == pair else [token])], ids, merges)),
        ),
    ),
    Exercise(
        "capped_weights", "gemma", "q, k, scalar, cap, window",
        "The attention weights (T, T) of a local layer of Gemma 2, one head: q and k (T, d). Scores are divided by\n"
        "the root of `scalar`, bounded to `cap` by tanh; a token reads the last `window` tokens, itself included.",
        lambda g: [(4 * randn(g, 6, 4), 4 * randn(g, 6, 4), 9.0, 3.0, 3),
                   (9 * randn(g, 4, 8), 9 * randn(g, 4, 8), 2.0, 5.0, 2)],
        gemma_weights,
        (
            M("the cap comes before the mask: after it a hidden key scores -cap and is read",
              lambda q, k, s, cap, w: gemma_weights(q, k, s, cap, w, cap_late=True)),
            M("there is no cap", lambda q, k, s, cap, w: masked_softmax(q @ k.T / s**0.5, w)),
            M("tanh is not multiplied by the cap: all scores lie between -1 and 1",
              lambda q, k, s, cap, w: masked_softmax(torch.tanh(q @ k.T / s**0.5 / cap), w)),
            M("the scores are cut off at the cap, where the gradient ends; tanh bends them",
              lambda q, k, s, cap, w: masked_softmax((q @ k.T / s**0.5).clamp(-cap, cap), w)),
            M("the scores are divided by the root of the head's width; Gemma has a number of its own for it",
              lambda q, k, s, cap, w: gemma_weights(q, k, q.shape[-1], cap, w)),
            M("the cap comes after the scale",
              lambda q, k, s, cap, w: masked_softmax(cap * torch.tanh(q @ k.T / cap) / s**0.5, w)),
            M("the window counts the token itself: one earlier token less",
              lambda q, k, s, cap, w: gemma_weights(q, k, s, cap, w + 1)),
            M("all earlier tokens are read: this is a global layer",
              lambda q, k, s, cap, w: gemma_weights(q, k, s, cap, len(q))),
        ),
    ),
    Exercise(
        "patches", "images", "image, size",
        "The patches of an image (C, H, W) as rows (H/size * W/size, C * size * size): row by row from the top left;\n"
        "within a patch first the channel, then its row, then its column.",
        lambda g: [(randn(g, 3, 4, 6), 2), (randn(g, 2, 6, 3), 3)],
        lambda image, size: patch_grid(image, size).flatten(0, 1).flatten(1),
        (
            M("the patches go down the columns; they go along the rows",
              lambda image, size: patch_grid(image, size).transpose(0, 1).flatten(0, 1).flatten(1)),
            M("the channel comes last within a patch; it comes first, as in the weight of a convolution",
              lambda image, size: patch_grid(image, size).permute(0, 1, 3, 4, 2).flatten(0, 1).flatten(1)),
            M("rows and columns are swapped within a patch",
              lambda image, size: patch_grid(image, size).transpose(3, 4).flatten(0, 1).flatten(1)),
            M("a reshape alone cuts strips out of the memory, not squares: split both sides first",
              lambda image, size: image.reshape(-1, image.shape[0] * size * size)),
            M("the patches overlap: the step is the size",
              lambda image, size: F.unfold(image[None], size, stride=1)[0].T),
            M("rows and columns of the result are swapped: one patch is one row",
              lambda image, size: patch_grid(image, size).flatten(0, 1).flatten(1).T),
        ),
    ),
    Exercise(
        "clip_loss", "images", "images, texts, scale",
        "CLIP's loss of a batch: vectors of images and of texts (N, d), of which the pairs have the same row. They\n"
        "are brought to length 1, their products times `scale` are logits, and each side has to find its partner.",
        lambda g: [(2 * randn(g, 5, 4), 3 * randn(g, 5, 4), 3.0), (randn(g, 3, 6), randn(g, 3, 6), 10.0)],
        lambda images, texts, scale: two_ways(scale * products(images, texts)),
        (
            M("the vectors keep their length: a long one wins every comparison",
              lambda images, texts, s: two_ways(s * images @ texts.T)),
            M("only the images look for their texts; the mean of both directions is wanted",
              lambda images, texts, s: one_way(s * products(images, texts))),
            M("only the texts look for their images; the mean of both directions is wanted",
              lambda images, texts, s: one_way(s * products(images, texts).T)),
            M("both directions are added; their mean is wanted",
              lambda images, texts, s: 2 * two_ways(s * products(images, texts))),
            M("the scale divides; it multiplies (a temperature would divide)",
              lambda images, texts, s: two_ways(products(images, texts) / s)),
            M("the scale is missing", lambda images, texts, s: two_ways(products(images, texts))),
            M("the other pairs of the batch are not in it: this only brings partners together",
              lambda images, texts, s: 1 - products(images, texts).diagonal().mean()),
        ),
    ),
    Exercise(
        "prefix_match", "reasoning", "predicted, tokens",
        "The reward of reinforcement pre-training, 1.0 or 0.0: predicted (bytes) is right if it is how the text goes\n"
        "on, to the byte, and ends where one of the true tokens (a list of bytes) ends. An empty one is wrong.",
        lambda g: ENDINGS,
        prefix_match,
        (
            M("it may end within a token: an answer ends where a true token ends",
              lambda predicted, tokens: float(bool(predicted) and b"".join(tokens).startswith(predicted))),
            M("an empty prediction is right: saying nothing must earn nothing",
              lambda predicted, tokens: float(b"".join(tokens).startswith(predicted)
                                              and len(predicted) in {0, *ends_of(tokens)})),
            M("only the first token is right; it may foretell several",
              lambda predicted, tokens: float(predicted == tokens[0])),
            M("only the whole continuation is right; it may end sooner",
              lambda predicted, tokens: float(predicted == b"".join(tokens))),
            M("spaces are stripped: a space is a prediction like any other",
              lambda predicted, tokens: float(predicted.strip() in {
                  b"".join(tokens[:n]).strip() for n in range(1, len(tokens) + 1)})),
            M("ends are counted in characters; they are counted in bytes",
              lambda predicted, tokens: float(b"".join(tokens).startswith(predicted)
                                              and len(predicted.decode()) in ends_of(tokens))),
            M("what goes beyond the known text is right too: it has to be a beginning of it",
              lambda predicted, tokens: float(prefix_match(predicted, tokens)
                                              or predicted.startswith(b"".join(tokens)))),
        ),
    ),
)  # fmt: skip
