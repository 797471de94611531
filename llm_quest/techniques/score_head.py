"""ScoreHead: replaces the output projection by one that gives a few numbers: classes, or one reward.

      out = h W^T, no bias      (transformers' ForSequenceClassification: the same tensor, called score.weight)

It is read at a row's last real token, the first that has seen all others. Not an identity: its outputs are not logits
of tokens. A tied embedding keeps its own matrix.

Commonly got wrong: initial values as large as the stream's make the first losses those of a confident guess; here they
are small, and the first loss is near ln N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import nn

from llm_quest.data.batch import MULTI_LABEL, SINGLE_LABEL
from llm_quest.errors import UsageError
from llm_quest.layers.linear import LMHead
from llm_quest.techniques.model_spec import record_technique, require_decoder, require_not_applied

Model = TypeVar("Model", bound=Any)
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEM_TYPES = get_args(ProblemType)


@dataclass(frozen=True)
class ScoreHead:
    """Replaces the head by one that gives scores. outputs: how many numbers. labels: the names of the classes. std: of
    the initial values. readout: which of a reward model's scores make the reward (`objectives.readouts.READOUTS`).
    step_token_ids: what ends a step, for a process reward model. problem_type: transformers' name of what the scores
    of several labels mean."""

    outputs: int = 1
    labels: tuple[str, ...] = ()
    std: float = 0.02
    seed: int = 0
    readout: str = "last_token"
    step_token_ids: tuple[int, ...] = ()
    problem_type: ProblemType = SINGLE_LABEL
    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = False

    @property
    def is_multi_label(self) -> bool:
        """Whether each label has a probability of its own."""
        return self.problem_type == MULTI_LABEL

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        require_not_applied(model, self)
        if self.outputs < 1 or (self.labels and len(self.labels) != self.outputs):
            raise UsageError(f"outputs is {self.outputs} and there are {len(self.labels)} labels; one each is needed")
        before = model.head.weight
        head = LMHead(model.config.hidden_size, self.outputs)
        nn.init.normal_(head.weight, std=self.std, generator=torch.Generator().manual_seed(self.seed))
        model.head = head.to(device=before.device, dtype=before.dtype)
        return record_technique(model, self)


def find_score_head(model: Any) -> ScoreHead | None:
    """The ScoreHead in the model's spec."""
    return next((technique for technique in model.spec.techniques if isinstance(technique, ScoreHead)), None)


def read_length(model: Any, model_max_length: int | None) -> int:
    """Tokens of a text that the model reads. A classifier: as many as it was trained on, which its tokenizer's
    model_max_length keeps (transformers' `truncation=True` goes by it too). Others: their context.

    Commonly got wrong: a classifier that was trained and scored on the first N tokens is given whole texts afterwards,
    so that what its accuracy was measured on is not what it reads."""
    context: int = model.config.max_position_embeddings
    head = find_score_head(model)
    return min(model_max_length or context, context) if head is not None and head.outputs > 1 else context
