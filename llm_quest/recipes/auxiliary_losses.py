"""Auxiliary losses of pretraining: routers of experts and multi-token prediction modules. A coefficient of a part that
the model does not have is an error: it would have no effect.

Routers that choose by sigmoid and a bias (DeepSeek-V3, MiMo) are balanced by that bias, with the paper's small loss
within sequences; routers that choose by softmax (Mixtral, Qwen3) by the load-balancing loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_quest.contracts import Callback
from llm_quest.errors import UsageError
from llm_quest.layers.moe import SigmoidRouter, SoftmaxRouter
from llm_quest.models.build import family_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import AuxiliaryLoss, NextTokenLoss
from llm_quest.techniques.expert_bias import ExpertBiasBalancer

BIAS_UPDATE_SPEED, SEQUENCE_BALANCE_COEF, MTP_LOSS_WEIGHT = 0.001, 0.0001, 0.3
MTP_FAMILIES = "deepseek_v3 and mimo"
ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "router_seq_aux_loss_coef", "router_z_loss_coef")


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Coefficients of the losses besides the next token's; None where the model has no such part."""

    router_aux_loss_coef: float | None
    router_seq_aux_loss_coef: float | None
    router_z_loss_coef: float
    expert_bias_update_speed: float | None
    mtp_loss_weight: float | None

    def resolve(self, model: Decoder) -> AuxiliaryLosses:
        """With the defaults of this model written out. UsageError for a coefficient that would have no effect."""
        self.require_effect(model)
        by_softmax = [one.aux_loss_coef for one in model.modules() if isinstance(one, SoftmaxRouter)]
        by_bias = any(isinstance(one, SigmoidRouter) for one in model.modules())
        pooled, within, speed, mtp = (
            self.router_aux_loss_coef,
            self.router_seq_aux_loss_coef,
            self.expert_bias_update_speed,
            self.mtp_loss_weight,
        )
        if by_softmax or by_bias:
            pooled = max(by_softmax, default=0.0) if pooled is None else pooled
            within = (SEQUENCE_BALANCE_COEF if by_bias else 0.0) if within is None else within
        if by_bias and speed is None:
            speed = BIAS_UPDATE_SPEED
        if len(model.mtp_modules) and mtp is None:
            mtp = MTP_LOSS_WEIGHT
        return AuxiliaryLosses(pooled, within, self.router_z_loss_coef, speed, mtp)

    def require_effect(self, model: Decoder) -> None:
        """UsageError for a coefficient of a part that the model does not have."""
        family = family_of(model.config).name
        softmax, sigmoid = (
            any(isinstance(one, kind) for one in model.modules()) for kind in (SoftmaxRouter, SigmoidRouter)
        )
        for key in ROUTER_COEFFICIENTS if not (softmax or sigmoid) else ():
            if getattr(self, key):
                raise UsageError(f"{key} has no effect: this {family} model has no experts; leave it out")
        if self.expert_bias_update_speed is not None and not sigmoid:
            why = "its routers have no bias; use router_aux_loss_coef" if softmax else "it has no experts"
            raise UsageError(f"expert_bias_update_speed has no effect on this {family} model: {why}")
        if self.mtp_loss_weight is not None and not len(model.mtp_modules):
            raise UsageError(
                f"mtp_loss_weight has no effect: this {family} model has no multi-token modules; {MTP_FAMILIES} build "
                "them with model.config.num_nextn_predict_layers=1, the technique multi_token adds them to any"
            )

    @property
    def router_coefs(self) -> dict[str, float]:
        """Coefficients of the routers' losses that are added, by the loss's name."""
        coefs = {
            "load_balancing": self.router_aux_loss_coef,
            "sequence_balancing": self.router_seq_aux_loss_coef,
            "z_loss": self.router_z_loss_coef,
        }
        return {name: value for name, value in coefs.items() if value}

    def build_objective(self, model: Decoder, extra_terms: Sequence[AuxiliaryLoss] = ()) -> NextTokenLoss:
        """Next-token prediction with what the parts add, and further terms."""
        return NextTokenLoss(
            model, router_coefs=self.router_coefs, mtp_weight=self.mtp_loss_weight or 0.0, auxiliary=extra_terms
        )

    def build_callbacks(self) -> list[Callback]:
        """The balancing step, where there is one."""
        return [ExpertBiasBalancer(self.expert_bias_update_speed)] if self.expert_bias_update_speed else []

    def initial_loss(self, model: Decoder) -> float:
        """Of random weights: ln V, and the multi-token modules' share of as much again."""
        return math.log(model.config.vocab_size) * (1 + (self.mtp_loss_weight or 0.0))
