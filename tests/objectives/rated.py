"""Rated answers for tests of what learns from them, and TRL's trainers with nothing in them but their loss."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.models.build import build
from llm_quest.scope import Scope


def elements(number: int = 4, answers: int = 2, vocab: int = 97, seed: int = 0) -> list[TokenizedPreference]:
    """Random ids, prompts and answers of random lengths."""
    random = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return random.integers(0, vocab, random.integers(1, 7))

    return [TokenizedPreference(ids(), tuple(ids() for _ in range(answers)), float(n % 3) / 2) for n in range(number)]


def tiny(seed: int = 0, page: str = "llama3.2-tiny", dtype: torch.dtype = torch.float64) -> Any:
    """A model with every tensor random."""
    model = build(page, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def gradients(model: Any, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))


def trl_inputs(batch: PreferenceBatch) -> dict[str, Tensor]:
    """TRL wants all chosen, then all rejected; masks in place of positions; the answer's own tokens marked."""
    order = torch.cat([batch.chosen, batch.rejected])
    learned = (batch.targets != -100).roll(1, dims=1)
    learned[:, 0] = False
    inputs = {
        "input_ids": batch.input_ids[order],
        "attention_mask": (batch.position_ids[order] >= 0).long(),
        "completion_mask": learned[order].long(),
    }
    if batch.reference_log_probs is not None:
        inputs |= {
            "ref_chosen_logps": batch.reference_log_probs[batch.chosen],
            "ref_rejected_logps": batch.reference_log_probs[batch.rejected],
        }
    return inputs


class Answering:
    """Our model as TRL calls a model."""

    training = True

    def __init__(self, model: Any):
        self.model = model

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.where(attention_mask > 0, attention_mask.cumsum(dim=1) - 1, -1)
        return self.model(input_ids, Scope(positions))

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, use_cache: bool, fused_lm_head: bool
    ) -> Any:
        logp = self.logits(input_ids, attention_mask)[:, :-1].log_softmax(dim=-1)
        wanted = labels[:, 1:]
        picked = logp.gather(2, wanted.clamp(min=0)[..., None]).squeeze(2).masked_fill(wanted == -100, 0.0)
        nothing = torch.zeros_like(picked)
        return SimpleNamespace(log_probs=picked, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


class Scoring(Answering):
    """A reward model as TRL calls one."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, **rest: Tensor) -> Any:  # type: ignore[override]
        scores = self.logits(input_ids, attention_mask)
        last = attention_mask.sum(dim=1) - 1
        return SimpleNamespace(logits=scores[torch.arange(len(last)), last])


def trainer(**settings: Any) -> Any:
    """As much of a TRL trainer as its loss looks at."""
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {"accelerator": same, "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True}
    common |= {"f_divergence_type": "reverse_kl", "loss_weights": [1.0], "use_weighting": False}
    common |= {"_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1}
    return SimpleNamespace(**common, **settings)
