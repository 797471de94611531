"""Short trainings, each by its name: an objective, a technique and a model. On one process, or on one of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_quest.data.loader import ShardedLoader
from llm_quest.data.policy_batch import PolicyRow, empty_row, micro_batches
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.text_classification import TextClassificationDataset
from llm_quest.data.whole_documents import WholeDocuments
from llm_quest.models.build import build
from llm_quest.objectives.classification import TextClassificationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.preference import PreferenceLoss
from llm_quest.objectives.reward_model import RewardModelLoss
from llm_quest.techniques.expert_bias import ExpertBiasBalancer
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw, make_muon
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state import model_state_dict
from tests.laws.test_techniques import EXAMPLES, NOT_TRAINED, REFUSED
from tests.train.small import Losses

ROWS, STEPS = 4, 2
PLAIN, WITH_MODULES = "llama3.2-tiny", "deepseek-v3-tiny"
"""A plain family; one with experts, their biases, and multi-token modules, which most objectives do not call."""

Cell = tuple[str, str, str]
"""(objective, techniques joined by + or "", model)."""


def some_ids(number: int, low: int, high: int) -> np.ndarray:
    """Ids of a length of their own."""
    chance = np.random.default_rng(number)
    return chance.integers(1, 60, chance.integers(low, high))


def documents(shard: Any) -> Any:
    """Short ones and long ones: the second process has short ones alone, of which more fit into a micro-batch."""
    lengths = [9, 60, 9, 60, 9, 9, 9, 9]
    texts = [some_ids(number, length, length + 1).tolist() for number, length in enumerate(lengths)]
    return ShardedLoader(
        WholeDocuments(texts, max_micro_batch_tokens=62), batch_size=ROWS, micro_batch_size=ROWS, seed=0, shard=shard
    )


def pairs(shard: Any) -> Any:
    made = [TokenizedPreference(some_ids(n, 4, 9), (some_ids(n + 50, 3, 6), some_ids(n + 90, 3, 6))) for n in range(8)]
    return ShardedLoader(PreferenceDataset(made), batch_size=ROWS, micro_batch_size=1, seed=0, shard=shard)


def classification_loader(shard: Any) -> Any:
    labels = [(n % 3,) for n in range(8)]
    texts = TextClassificationDataset([some_ids(n, 4, 9) for n in range(8)], labels, ["a", "b", "c"])
    return ShardedLoader(texts, batch_size=ROWS, micro_batch_size=1, seed=0, shard=shard)


class Completions:
    """Rows of a policy: three, which two processes cannot share equally."""

    def __init__(self, shard: Any):
        self.shard = shard

    def batches(self, step: int) -> Sequence[Any]:
        rows = []
        for number in range(3):
            prompt, said = some_ids(number, 4, 9), some_ids(number + 50 + step, 3, 6)
            advantages = np.full(len(said), 1.0 - number, np.float32)
            rows.append(PolicyRow(tuple(prompt), tuple(said), advantages, np.full(len(said), -5.0, np.float32)))
        return micro_batches(rows, 14, shard=self.shard, filler=empty_row())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def score(model: Any, labels: int) -> Any:
    return model if find_score_head(model) is not None else ScoreHead(labels, seed=0)(model)


def no_reference(batch: PreferenceBatch) -> Tensor:
    return torch.zeros(len(batch.input_ids))


OBJECTIVES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], Any]]] = {
    "next token": (NextTokenLoss, documents),
    "preference": (lambda model: PreferenceLoss(model, reference=no_reference), pairs),
    "reward": (lambda model: RewardModelLoss(score(model, 1)), pairs),
    "classification": (
        lambda model: TextClassificationLoss(score(model, 3), class_weights=torch.tensor([0.5, 1.0, 4.0])),
        classification_loader,
    ),
    "policy": (PolicyGradientLoss, Completions),
}
SUITABLE = {"score_head": "classification"}
OWN_NOISE = ("neftune",)
"""Techniques whose random numbers each process draws for its own rows, as dropout's: two processes have other noise."""
CELLS: list[Cell] = [
    *(
        (SUITABLE.get(technique, "next token"), technique, PLAIN if (technique, PLAIN) not in REFUSED else "qwen3-tiny")
        for technique in EXAMPLES
        if technique not in {*NOT_TRAINED, *OWN_NOISE}
    ),
    ("next token", "quantize+lora", PLAIN),
    *((objective, "", WITH_MODULES) for objective in OBJECTIVES),
    *((objective, "dyt", PLAIN) for objective in OBJECTIVES if objective != "next token"),
]


def run_cell(cell: Cell, parallel: DistributedContext, optimizer: str = "adamw") -> dict[str, Any]:
    """Losses and norms of two steps, and the weights after them. The model is in float64, its losses in float32."""
    objective_name, techniques, family = cell
    applied = [EXAMPLES[name] for name in techniques.split("+") if name]
    make_objective, make_loader = OBJECTIVES[objective_name]
    torch.manual_seed(0)
    model: Any = build(family, seed=0)
    for technique in applied:
        model = technique(model)
    objective = make_objective(model).double()
    callbacks = [technique for technique in applied if hasattr(technique, "on_step_end")]
    parallel.parallelize(objective, list(model.blocks))
    make = partial(make_adamw, lr=1e-2) if optimizer == "adamw" else partial(make_muon, row_splits=model.row_splits())
    shown = Losses()
    train(
        objective, make_loader(parallel.data_shard), make(model) if optimizer == "adamw" else make(model, lr=1e-2),
        lambda step: 1.0, TrainingArguments(max_steps=STEPS, logging_steps=1), parallel=parallel,
        callbacks=[*callbacks, ExpertBiasBalancer()], logger=shown,
    )  # fmt: skip
    losses = parallel.broadcast([(row["loss"], row["grad_norm"]) for row in shown.rows])
    return {"losses": losses, "weights": model_state_dict(model, is_main_process=True)}


def run_cells(strategy: str, file: str) -> None:
    """Every cell on this process, which is one of several; the first one writes what it has."""
    parallel = DistributedContext.from_environment("cpu", strategy)
    found = {cell: run_cell(cell, parallel) for cell in CELLS}
    if parallel.is_main_process:
        torch.save(found, file)
    parallel.destroy_process_group()
