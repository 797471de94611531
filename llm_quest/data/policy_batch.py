"""PolicyBatch: rows that a policy wrote, and what each of their tokens was worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.contracts import Share
from llm_quest.data.batch import IGNORE
from llm_quest.data.prefix import Prefix, alone, laid, together

Notes = Mapping[str, tuple[float, float]]
"""Name -> (sum, count): numbers that are known on the host, to be reported with the step."""


@dataclass(frozen=True)
class PolicyRow:
    """One sample, ready to learn from. advantages, sampled and the others are arrays (float32), one number per token
    of `tokens`, the completion. old: scored again by the trainer; reference: by the reference policy. looks (tokens,
    length): where the place that predicts each token looked when it was written."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    advantages: np.ndarray
    sampled: np.ndarray
    old: np.ndarray | None = None
    reference: np.ndarray | None = None
    looks: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens that a pass reads: the last one is only predicted."""
        return len(self.prompt) + len(self.tokens) - 1


@dataclass(frozen=True)
class PolicyBatch:
    """As in `TokenBatch`, `targets[b, t]` is predicted *at* t, and every other tensor stands where its target stands.

    Padding is on the right, where a causal pass never looks back at it: the rows are plain, and no kernel needs a
    mask. Or the rows share their prompts (`Prefix`) and say their positions; num_tokens is what plain rows would hold.
    zero_rows, zero_tokens: samples (and their completions' tokens) that are not among the rows, because their
    advantage is 0, and that count in the loss's divisor.

        tokens      p0  p1  a   b   .        prompt p0 p1, completion a b </s>
        targets      .  a   b  </s> .        . is -100
        advantages   0  A   A   A   0
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    sampled: Float[Tensor, "B T"]
    old: Float[Tensor, "B T"] | None = None
    reference: Float[Tensor, "B T"] | None = None
    looks: Float[Tensor, "B T T"] | None = None
    positions: Int[Tensor, "B T"] | None = None
    prefix: Prefix | None = None
    num_tokens: int = 0
    zero_rows: int = 0
    zero_tokens: int = 0
    notes: Notes = field(default_factory=dict)
    segments: ClassVar[None] = None

    @property
    def learn(self) -> Bool[Tensor, "B T"]:
        return self.targets != IGNORE

    def to(self, device: torch.device | str) -> PolicyBatch:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: thing.to(device) for name, thing in named.items() if isinstance(thing, Tensor | Prefix)
        }
        return replace(self, **moved)


def nothing(*more: str) -> PolicyRow:
    """A row with nothing to learn, which says as much (old, reference, looks) as those that have. It carries notes, and
    stands in where a process has less to do than the others."""
    none = np.zeros(0, np.float32)
    values: dict[str, Any] = {name: none.reshape(0, 0) if name == "looks" else none for name in more}
    return PolicyRow((0,), (), none, none, **values)


def policy_batch(rows: Sequence[PolicyRow], notes: Notes | None = None, *, shared: bool = False) -> PolicyBatch:
    """Rows side by side, on the host; shared: equal prompts are read once."""
    assert not shared or all(row.looks is None for row in rows), "looks go over whole rows"
    made = laid([(row.prompt, row.tokens[:-1]) for row in rows], shared=shared)
    targets = np.full(made.tokens.shape, IGNORE)
    more = [name for name in ("old", "reference") if getattr(rows[0], name) is not None]
    values: dict[str, Any] = {name: np.zeros(targets.shape, np.float32) for name in ("advantages", "sampled", *more)}
    for number, (row, first) in enumerate(zip(rows, made.firsts, strict=True)):
        place = slice(first, first + len(row.tokens))
        targets[number, place] = row.tokens
        for name, value in values.items():
            value[number, place] = getattr(row, name)
    if rows[0].looks is not None:
        values["looks"] = looks_laid(rows, made.firsts, made.tokens.shape[1])
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in values.items()}
    return PolicyBatch(
        torch.from_numpy(made.tokens),
        torch.from_numpy(targets),
        positions=None if made.prefix is None else torch.from_numpy(made.positions),
        prefix=made.prefix,
        num_tokens=sum(row.length for row in rows),
        notes=dict(notes or {}),
        **tensors,
    )


def looks_laid(rows: Sequence[PolicyRow], firsts: Sequence[int], width: int) -> np.ndarray:
    """Each row's looks (B,T,T), where its targets stand."""
    laid_out = np.zeros((len(rows), width, width), np.float32)
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        assert row.looks is not None, "all rows have looks or none has"
        laid_out[number, first : first + len(row.tokens), : row.length] = row.looks
    return laid_out


def in_full(rows: Sequence[PolicyRow]) -> int:
    """Tokens that a pass reads, padding included: every row in full."""
    return alone([(row.prompt, len(row.tokens) - 1) for row in rows])


def in_part(rows: Sequence[PolicyRow]) -> int:
    """The same where every prompt is read once."""
    return together([(row.prompt, len(row.tokens) - 1) for row in rows])


def grouped(
    rows: Sequence[PolicyRow],
    budget: int,
    cost: Callable[[Sequence[PolicyRow]], int] = in_full,
    size: Callable[[PolicyRow], int] = lambda row: row.length,
) -> list[list[PolicyRow]]:
    """The longest first (equal ones in their order), so that rows of like size stand together and little is padding; no
    group costs more than `budget`, but for a row that alone does."""
    groups: list[list[PolicyRow]] = []
    for row in sorted(rows, key=lambda row: -size(row)):
        if groups and cost([*groups[-1], row]) <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def parted(rows: Sequence[PolicyRow], budget: int, *, share: bool) -> tuple[list[list[PolicyRow]], bool]:
    """Groups for micro-batches, and whether they share their prompts: where that may be and reads fewer tokens."""
    plain = grouped(rows, budget)
    if not share:
        return plain, False
    shared = grouped(rows, budget, in_part, lambda row: len(row.tokens))
    return (shared, True) if sum(map(in_part, shared)) < sum(map(in_full, plain)) else (plain, False)


def micro_batches(
    rows: Sequence[PolicyRow],
    budget: int,
    notes: Notes | None = None,
    *,
    share: bool = False,
    part: Share = Share(),
    idle: PolicyRow | None = None,
    zero: Sequence[PolicyRow] = (),
) -> list[PolicyBatch]:
    """A batch of each group, dealt out to `part.world` processes, who all get equally many: `idle` is for those who
    come away empty. The notes and the count of the `zero` rows, which are not read, travel with the first batch of the
    first process; the others' notes have the same names and no weight."""
    groups, shared = parted(rows, budget, share=share)
    mine = groups[part.rank :: part.world]
    turns = max(1, -(-len(groups) // part.world))
    batches = [policy_batch(some, shared=shared) for some in mine]
    batches += [policy_batch([idle or nothing()])] * (turns - len(mine))
    told = dict(notes or {}) if part.rank == 0 else dict.fromkeys(notes or {}, (0.0, 0.0))
    counted = zero if part.rank == 0 else ()
    first = replace(batches[0], notes=told, zero_rows=len(counted), zero_tokens=sum(len(row.tokens) for row in counted))
    return [first, *batches[1:]]
