"""PolicyBatch: completions of a policy, with the numbers that policy-gradient losses need of each token."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.contracts import DataShard
from llm_quest.data.batch import (
    IGNORE_INDEX,
    SharedPrefix,
    full_token_count,
    pad_with_shared_prefix,
    shared_token_count,
)

MetricSums = Mapping[str, tuple[float, float]]
"""Name -> (sum, count): numbers that are known on the host, to be reported with the step."""


@dataclass(frozen=True)
class PolicyRow:
    """One completion to learn from. advantages, sampler_log_probs and the others are arrays (float32), one number
    per token of `completion_ids`. is_policy_token: which of them the policy sampled, None for all; the others (what an
    environment answered) are read and never learned. old_log_probs: computed again by the trainer;
    reference_log_probs: by the reference policy. attention_maps (tokens, length): the attention of the position that
    predicts each token, when it was sampled. values, returns: of a value head when it was sampled, and what it learns
    (GAE). routing (length, choices): the experts that the rollout's pass chose for each token that is read."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantages: np.ndarray
    sampler_log_probs: np.ndarray
    old_log_probs: np.ndarray | None = None
    reference_log_probs: np.ndarray | None = None
    attention_maps: np.ndarray | None = None
    values: np.ndarray | None = None
    returns: np.ndarray | None = None
    is_policy_token: np.ndarray | None = None
    routing: np.ndarray | None = None

    @property
    def num_policy_tokens(self) -> int:
        return len(self.completion_ids) if self.is_policy_token is None else int(self.is_policy_token.sum())

    def at_policy_tokens(self, values: np.ndarray) -> np.ndarray:
        """Select, from one number for each token of the completion, those of the policy's own tokens."""
        return values if self.is_policy_token is None else values[self.is_policy_token]

    def spread_over_completion(self, values: np.ndarray) -> np.ndarray:
        """One number for each token of the completion, from one for each token of the policy; 0 at the others."""
        if self.is_policy_token is None:
            return values
        spread = np.zeros((len(self.completion_ids), *values.shape[1:]), values.dtype)
        spread[self.is_policy_token] = values
        return spread

    def divergence_from(self, reference: np.ndarray) -> float:
        """KL(policy that sampled, reference) by k3, summed. reference: its log-probabilities of the completion."""
        gap = np.clip(reference - self.sampler_log_probs, -20.0, 20.0).astype(np.float64)
        return float((np.exp(gap) - gap - 1).sum())

    @property
    def length(self) -> int:
        """Tokens that a pass reads: the last one is only predicted."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


@dataclass(frozen=True)
class PolicyBatch:
    """Completions of a policy as rows. As in `TokenBatch`, `targets[b, t]` is predicted *at* t, and every other tensor
    is aligned with the targets.

    Padding is on the right, where no token of a causal pass sees it: the rows are plain, and no kernel needs a
    mask. Or the rows share their prompts (`SharedPrefix`) and say their positions; num_tokens is what plain rows would
    hold. zero_rows, zero_tokens: samples (and their completions' tokens) that are not among the rows, because their
    advantage is 0, and that count in the loss's divisor.

        tokens      p0  p1  a   b   .        prompt p0 p1, completion a b </s>
        targets      .  a   b  </s> .        . is -100
        advantages   0  A   A   A   0

    With an answer of the environment (x y) inside the completion, which is read and not learned:

        tokens      p0  p1  a  </s>  x   y   b
        targets      .  a  </s>  .   .   b  </s>"""

    input_ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    sampler_log_probs: Float[Tensor, "B T"]
    old_log_probs: Float[Tensor, "B T"] | None = None
    reference_log_probs: Float[Tensor, "B T"] | None = None
    attention_maps: Float[Tensor, "B T T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    routing: Int[Tensor, "B T C"] | None = None
    position_ids: Int[Tensor, "B T"] | None = None
    prefix: SharedPrefix | None = None
    num_tokens: int = 0
    zero_rows: int = 0
    zero_tokens: int = 0
    metric_sums: MetricSums = field(default_factory=dict)
    segment_ids: ClassVar[None] = None

    @property
    def loss_mask(self) -> Bool[Tensor, "B T"]:
        return self.targets != IGNORE_INDEX

    def to(self, device: torch.device | str) -> PolicyBatch:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: thing.to(device) for name, thing in named.items() if isinstance(thing, Tensor | SharedPrefix)
        }
        return replace(self, **moved)


OPTIONAL_ARRAYS = ("old_log_probs", "reference_log_probs", "values", "returns")
"""Fields of a row with one number a token, which all rows have or none."""


def empty_row(*more: str) -> PolicyRow:
    """A row with nothing to learn, which has the same fields (such as old_log_probs) as those that have. It carries
    metrics, and fills in where a process has fewer rows than the others."""
    none = np.zeros(0, np.float32)
    values: dict[str, Any] = {name: none.reshape(0, 0) if name == "attention_maps" else none for name in more}
    return PolicyRow((0,), (), none, none, **values)


def collate_policy_rows(
    rows: Sequence[PolicyRow], metric_sums: MetricSums | None = None, *, share_prompts: bool = False
) -> PolicyBatch:
    """Rows as a batch, on the host; share_prompts: equal prompts are read once."""
    assert not share_prompts or all(row.attention_maps is None for row in rows), "attention maps cover whole rows"
    padded = pad_with_shared_prefix([(row.prompt_ids, row.completion_ids[:-1]) for row in rows], shared=share_prompts)
    targets = np.full(padded.tokens.shape, IGNORE_INDEX)
    more = [name for name in OPTIONAL_ARRAYS if getattr(rows[0], name) is not None]
    values: dict[str, Any] = {
        name: np.zeros(targets.shape, np.float32) for name in ("advantages", "sampler_log_probs", *more)
    }
    for number, (row, first) in enumerate(zip(rows, padded.first_target_columns, strict=True)):
        place = slice(first, first + len(row.completion_ids))
        targets[number, place] = row.completion_ids
        if row.is_policy_token is not None:
            targets[number, place][~row.is_policy_token] = IGNORE_INDEX
        for name, value in values.items():
            value[number, place] = getattr(row, name)
    if rows[0].attention_maps is not None:
        values["attention_maps"] = pad_attention_maps(rows, padded.first_target_columns, padded.tokens.shape[1])
    if rows[0].routing is not None:
        values["routing"] = pad_routing(rows, padded.tokens.shape[1])
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in values.items()}
    return PolicyBatch(
        torch.from_numpy(padded.tokens),
        torch.from_numpy(targets),
        position_ids=None if padded.prefix is None else torch.from_numpy(padded.positions),
        prefix=padded.prefix,
        num_tokens=sum(row.length for row in rows),
        metric_sums=dict(metric_sums or {}),
        **tensors,
    )


def pad_attention_maps(rows: Sequence[PolicyRow], firsts: Sequence[int], width: int) -> np.ndarray:
    """Each row's attention maps (B,T,T), aligned with its targets."""
    laid_out = np.zeros((len(rows), width, width), np.float32)
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        assert row.attention_maps is not None, "all rows have attention maps or none has"
        laid_out[number, first : first + len(row.completion_ids), : row.length] = row.attention_maps
    return laid_out


def pad_routing(rows: Sequence[PolicyRow], width: int) -> np.ndarray:
    """Each row's routing (B,T,C), expert 0 for padding."""
    assert rows[0].routing is not None, "the first row has a routing"
    laid_out = np.zeros((len(rows), width, rows[0].routing.shape[1]), np.int64)
    for number, row in enumerate(rows):
        assert row.routing is not None, "all rows have a routing or none has"
        laid_out[number, : row.length] = row.routing
    return laid_out


def full_token_cost(rows: Sequence[PolicyRow]) -> int:
    """Tokens that a pass reads, padding included: every row in full."""
    return full_token_count([(row.prompt_ids, len(row.completion_ids) - 1) for row in rows])


def shared_token_cost(rows: Sequence[PolicyRow]) -> int:
    """Tokens that a group costs where every prompt is read once."""
    return shared_token_count([(row.prompt_ids, len(row.completion_ids) - 1) for row in rows])


class GroupCost:
    """The tokens of a group that grows by one row at a time: `full_token_cost` of its rows, or `shared_token_cost`.
    (Asking those two for every row would read the whole group each time.)"""

    def __init__(self, *, share_prompts: bool):
        self.share_prompts = share_prompts
        self.rows = self.longest = self.longest_prompt = 0
        self.prompts: set[tuple[int, ...]] = set()

    def add(self, row: PolicyRow) -> int:
        """Count one more row; the tokens of all."""
        self.rows += 1
        if not self.share_prompts:
            self.longest = max(self.longest, row.length)
            return self.rows * self.longest
        self.longest = max(self.longest, len(row.completion_ids))
        self.longest_prompt = max(self.longest_prompt, len(row.prompt_ids))
        self.prompts.add(tuple(row.prompt_ids))
        return self.rows * self.longest + len(self.prompts) * (self.longest_prompt - 1)


def group_by_token_budget(
    rows: Sequence[PolicyRow], max_tokens: int, *, share_prompts: bool = False
) -> list[list[PolicyRow]]:
    """Groups of rows, the longest first (equal ones in their order), so that rows of similar length are together and
    little is padding; no group costs more than `max_tokens`, except a single row that does. share_prompts: prompts are
    read once, so a row is as long as its completion."""
    groups: list[list[PolicyRow]] = []
    cost = GroupCost(share_prompts=share_prompts)
    for row in sorted(rows, key=lambda row: -(len(row.completion_ids) if share_prompts else row.length)):
        if groups and cost.add(row) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            cost = GroupCost(share_prompts=share_prompts)
            cost.add(row)
    return groups


def plan_micro_batches(
    rows: Sequence[PolicyRow], max_tokens: int, *, share_prompts: bool
) -> tuple[list[list[PolicyRow]], bool]:
    """The groups of micro-batches, and whether they share their prompts: if that is allowed and reads fewer tokens."""
    plain = group_by_token_budget(rows, max_tokens)
    if not share_prompts:
        return plain, False
    shared = group_by_token_budget(rows, max_tokens, share_prompts=True)
    return (shared, True) if sum(map(shared_token_cost, shared)) < sum(map(full_token_cost, plain)) else (plain, False)


def micro_batches(
    rows: Sequence[PolicyRow],
    max_tokens: int,
    metric_sums: MetricSums | None = None,
    *,
    share_prompts: bool = False,
    shard: DataShard = DataShard(),
    filler: PolicyRow | None = None,
    zero: Sequence[PolicyRow] = (),
) -> list[PolicyBatch]:
    """A batch of each group, distributed to `shard.world_size` processes, which all get the same number: `filler` is
    for those without a group. The metrics and the count of the `zero` rows, which are not read, are in the first
    batch of the first process; the metrics of the others have the same names and no weight."""
    groups, shared = plan_micro_batches(rows, max_tokens, share_prompts=share_prompts)
    own_groups = groups[shard.rank :: shard.world_size]
    turns = max(1, -(-len(groups) // shard.world_size))
    batches = [collate_policy_rows(some, share_prompts=shared) for some in own_groups]
    batches += [collate_policy_rows([filler or empty_row()])] * (turns - len(own_groups))
    first_sums = dict(metric_sums or {}) if shard.rank == 0 else dict.fromkeys(metric_sums or {}, (0.0, 0.0))
    counted = zero if shard.rank == 0 else ()
    first = replace(
        batches[0],
        metric_sums=first_sums,
        zero_rows=len(counted),
        zero_tokens=sum(row.num_policy_tokens for row in counted),
    )
    return [first, *batches[1:]]


ROW_ARRAYS = ("advantages", "sampler_log_probs", *OPTIONAL_ARRAYS, "attention_maps", "routing")


def row_to_json(row: PolicyRow) -> dict[str, Any]:
    """A row as JSON, exact to the bit, for a checkpoint in the middle of a rollout."""
    arrays = {name: getattr(row, name) for name in ROW_ARRAYS}
    encoded = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items() if array is not None}
    if row.is_policy_token is not None:
        encoded["is_policy_token"] = base64.b64encode(row.is_policy_token.tobytes()).decode()
    return {"prompt": list(row.prompt_ids), "tokens": list(row.completion_ids), **encoded}


def row_from_json(saved: Mapping[str, Any]) -> PolicyRow:
    """The row that `row_to_json` wrote."""
    arrays = {name: np.frombuffer(base64.b64decode(saved[name]), np.float32) for name in ROW_ARRAYS if name in saved}
    if "attention_maps" in arrays:  # a row of the matrix for each token
        arrays["attention_maps"] = arrays["attention_maps"].reshape(len(saved["tokens"]), -1)
    if "routing" in arrays:  # of each token that is read
        arrays["routing"] = arrays["routing"].reshape(len(saved["prompt"]) + len(saved["tokens"]) - 1, -1)
    if "is_policy_token" in saved:
        arrays["is_policy_token"] = np.frombuffer(base64.b64decode(saved["is_policy_token"]), np.bool_)
    return PolicyRow(tuple(saved["prompt"]), tuple(saved["tokens"]), **arrays)
