"""Read-outs of a reward model: which of its scores, one at every token, make the reward of an answer.

      last_token       the score of the last token, which has seen all others (InstructGPT, arXiv:2203.02155)
      mean_tokens      the mean of the scores of all tokens, question included
      mean_steps       the mean over steps of sigma(score) at each step's last token: a process reward model
      min_steps        the smallest of them: one wrong step makes an answer wrong (arXiv:2305.20050, 2504.15275)

A step ends where the answer's tokens are those of the separator, and at its last token. Commonly got wrong: steps are
looked for in decoded text, whose characters are not the tokens that were sampled; separators in the question count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.objectives.classification import last_token_outputs, pad_rows
from llm_quest.scope import Scope
from llm_quest.techniques.score_head import find_score_head

Readout = Callable[[Float[Tensor, " T"], Sequence[int]], Tensor]
"""The scores of a row's tokens and the indices of its steps' last tokens -> one number."""

READOUTS: dict[str, Readout] = {
    "last_token": lambda scores, ends: scores[-1],
    "mean_tokens": lambda scores, ends: scores.mean(),
    "mean_steps": lambda scores, ends: torch.sigmoid(scores[list(ends)]).mean(),
    "min_steps": lambda scores, ends: torch.sigmoid(scores[list(ends)]).min(),
}


ROW_READOUTS = ("last_token", "mean_tokens")
"""Those that a model of whole answers is trained with."""


def step_ends(ids: Sequence[int], start: int, separator: Sequence[int]) -> list[int]:
    """The index of each step's last token: where the ids from `start` on are the separator's, and the last of all."""
    size = len(separator)
    ends = [
        end
        for end in range(start + size - 1, len(ids))
        if size and tuple(ids[end - size + 1 : end + 1]) == tuple(separator)
    ]
    return ends if ends and ends[-1] == len(ids) - 1 else [*ends, len(ids) - 1]


def token_scores(model: Any, rows: Sequence[Sequence[int]]) -> list[Float[Tensor, " T"]]:
    """The scores of every token of each row, at least float32."""
    tokens, positions = pad_rows(rows)
    device = model.head.weight.device
    scores = score_tokens(model, tokens.to(device), positions.to(device))
    return [scores[number, : len(row)] for number, row in enumerate(rows)]


def score_tokens(model: Any, input_ids: Tensor, position_ids: Tensor) -> Float[Tensor, "R T"]:
    """The score of every token; that of padding means nothing."""
    scores = model.head(model.hidden_states(input_ids, Scope(position_ids)))[..., 0]
    return scores if scores.dtype == torch.float64 else scores.float()


def read_rewards(model: Any, input_ids: Tensor, position_ids: Tensor) -> Float[Tensor, " R"]:
    """The reward of each row as the model was trained to give it: by its last token, or the mean of all. UsageError for
    a process reward model, which must know where the answer begins."""
    readout = find_readout(model)
    if readout not in ROW_READOUTS:
        raise UsageError(
            "a process reward model scores the steps of an answer, not a whole conversation: use it as a reward of "
            "quest train grpo, or train a reward model (quest train reward)"
        )
    if readout == "last_token":
        return last_token_outputs(model, input_ids, position_ids)[:, 0]
    scores, exists = score_tokens(model, input_ids, position_ids), position_ids >= 0
    return (scores * exists).sum(dim=1) / exists.sum(dim=1)


def find_readout(model: Any) -> str:
    """The read-out that the model's score head was trained with."""
    head = find_score_head(model)
    return "last_token" if head is None else head.readout
