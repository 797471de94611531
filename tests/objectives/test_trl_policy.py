"""Losses and gradients beside TRL's GRPO trainer, on the same tensors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_quest.data.policy_batch import PolicyBatch
from llm_quest.objectives.kl_penalty import KLPenalty
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS, CISPOSurrogate, ClippedSurrogate, sequence_ratio

B, T, HORIZON = 4, 6, 10


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 2, 5, 1])
    old = -0.2 - 3 * torch.rand(B, T, generator=g)
    return {
        "learn": torch.arange(T)[None] < lengths[:, None],
        "old": old,
        "log_p": old + 0.3 * torch.randn(B, T, generator=g),
        "reference": old + 0.3 * torch.randn(B, T, generator=g),
        "advantages": torch.randn(B, generator=g),
    }


def ours(surrogate: Any, count: str, **options: Any) -> tuple[float, Tensor]:
    t = tensors()
    log_p = t["log_p"].requires_grad_()
    batch = PolicyBatch(
        t["learn"].long(),
        torch.where(t["learn"], 0, -100),
        t["advantages"][:, None].expand(B, T),
        t["old"],
        reference_log_probs=t["reference"],
    )
    made = PolicyGradientLoss(nn.Identity(), surrogate, count=count, **options)
    loss = made.loss(log_p, batch)
    (slope,) = torch.autograd.grad(loss.total / loss.count, log_p)
    return (loss.total / loss.count).item(), slope


def trl_loss(**settings: Any) -> tuple[float, Tensor]:
    """`GRPOTrainer._compute_loss` itself, on a trainer that holds nothing but its settings."""
    from collections import defaultdict

    from trl import GRPOTrainer

    t = tensors()
    log_p = t["log_p"].requires_grad_()
    args = SimpleNamespace(
        delta=settings.pop("delta", None),
        use_bias_correction_kl=settings.pop("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )
    fixed = {
        "beta": 0.0,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "off_policy_mask_threshold": None,
    }
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=HORIZON,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_p, torch.zeros(B, T), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        **fixed | settings,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": t["learn"].long(),
        "advantages": t["advantages"],
        "old_per_token_logps": t["old"],
        "ref_per_token_logps": t["reference"],
        "num_items_in_batch": t["learn"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (slope,) = torch.autograd.grad(loss, log_p)
    return loss.item(), slope


CASES = {
    "grpo": (ClippedSurrogate(), "sequences", {}, {}),
    "grpo with kl": (ClippedSurrogate(), "sequences", {"kl": KLPenalty(0.1)}, {"beta": 0.1}),
    "unbiased kl": (
        ClippedSurrogate(),
        "sequences",
        {"kl": KLPenalty(0.1, "unbiased")},
        {"beta": 0.1, "use_bias_correction_kl": True},
    ),
    "dr_grpo": (ClippedSurrogate(), "horizon", {"horizon": HORIZON}, {"loss_type": "dr_grpo"}),
    "dapo": (POLICY_VARIANTS["dapo"].surrogate, "tokens", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        ClippedSurrogate(0.05, 0.1, importance_ratio=sequence_ratio),
        "sequences",
        {},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
    ),
    "sapo": (POLICY_VARIANTS["sapo"].surrogate, "sequences", {}, {"loss_type": "sapo"}),
    "cispo": (CISPOSurrogate(1.3), "tokens", {}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    "two-sided": (ClippedSurrogate(delta=1.25), "sequences", {}, {"delta": 1.25}),
    "off-policy mask": (
        ClippedSurrogate(),
        "sequences",
        {"off_policy_delta": 0.05},
        {"off_policy_mask_threshold": 0.05},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(name):
    surrogate, count, options, settings = CASES[name]
    loss, slope = ours(surrogate, count, **options)
    their_loss, their_slope = trl_loss(**dict(settings))
    assert loss == pytest.approx(their_loss, abs=1e-5)
    torch.testing.assert_close(slope, their_slope, atol=1e-5, rtol=0)
    assert slope.abs().max() > 1e-3
