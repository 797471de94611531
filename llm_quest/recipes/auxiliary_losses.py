"""What a model's own parts ask of its training: losses and a balancing step for experts, a weight for multi-token
prediction modules. A setting for a part that the model does not have is refused: it would change nothing.

Routers that choose by sigmoid and a bias (DeepSeek-V3, MiMo) are balanced by that bias, with the paper's small loss
within sequences; routers that choose by softmax (Mixtral, Qwen3) by the load-balancing loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from llm_quest.contracts import Callback
from llm_quest.errors import UsageError
from llm_quest.layers.moe import SigmoidRouter, SoftmaxRouter
from llm_quest.models.build import family_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import AuxiliaryLoss, NextTokenLoss
from llm_quest.recipes.config import StrictModel
from llm_quest.techniques.expert_bias import ExpertBiasBalancer

BIAS_UPDATE_SPEED, SEQUENCE_BALANCE_COEF, MTP_LOSS_WEIGHT = 0.001, 0.0001, 0.3
MTP_FAMILIES = "deepseek_v3 and mimo"


class RouterLossConfig(StrictModel):
    """Coefficients of the routers' losses. null: what the model's routers are trained with; 0 leaves one out."""

    load_balancing: float | None = Field(
        default=None, ge=0, description="Switch's, pooled over layers; the loss is k where the load is even"
    )
    sequence_balancing: float | None = Field(
        default=None, ge=0, description="DeepSeek-V3's, within each sequence; 1 a layer where the load is even"
    )
    z_loss: float = Field(default=0.0, ge=0, description="ST-MoE's: keeps the logits small; 0.001 is usual")

    @property
    def active_terms(self) -> dict[str, float]:
        """Those that are added."""
        return {name: value for name, value in self.model_dump().items() if value}


@dataclass(frozen=True)
class AuxiliaryLosses:
    """What is trained beside the next token; null where the model has no such part."""

    router: RouterLossConfig | None
    balance: float | None
    lookahead: float | None

    def resolve(self, model: Decoder) -> AuxiliaryLosses:
        """With the defaults written out. UsageError for a setting that would change nothing."""
        family = family_of(model.config).name
        by_softmax = [one.aux_loss_coef for one in model.modules() if isinstance(one, SoftmaxRouter)]
        by_bias = any(isinstance(one, SigmoidRouter) for one in model.modules())
        if self.router is not None and not (by_softmax or by_bias):
            raise UsageError(f"router has no effect: this {family} model has no experts; leave router out")
        if self.balance is not None and not by_bias:
            why = "its routers have no bias; use router.load_balancing" if by_softmax else "it has no experts"
            raise UsageError(f"balance has no effect on this {family} model: {why}")
        if self.lookahead is not None and not len(model.mtp_modules):
            raise UsageError(
                f"lookahead has no effect: this {family} model has no multi-token modules; {MTP_FAMILIES} build them with "
                "model.sizes.num_nextn_predict_layers=1, the technique multi_token adds them to any"
            )
        router = (self.router or RouterLossConfig()) if by_softmax or by_bias else None
        if router is not None:
            own = {
                "load_balancing": max(by_softmax, default=0.0),
                "sequence_balancing": SEQUENCE_BALANCE_COEF if by_bias else 0.0,
            }
            given = router.model_dump(exclude_none=True)
            router = RouterLossConfig(**{**own, **given})
        return AuxiliaryLosses(
            router,
            BIAS_UPDATE_SPEED if self.balance is None and by_bias else self.balance,
            MTP_LOSS_WEIGHT if self.lookahead is None and len(model.mtp_modules) else self.lookahead,
        )

    def build_objective(self, model: Decoder, extra_terms: Sequence[AuxiliaryLoss] = ()) -> NextTokenLoss:
        """Next-token prediction with what the parts add, and further terms."""
        router = self.router.active_terms if self.router else {}
        return NextTokenLoss(model, router_coefs=router, mtp_weight=self.lookahead or 0.0, auxiliary=extra_terms)

    def build_callbacks(self) -> list[Callback]:
        """The balancing step, where there is one."""
        return [ExpertBiasBalancer(self.balance)] if self.balance else []

    def initial_loss(self, model: Decoder) -> float:
        """Of random weights: ln V, and the multi-token modules' share of as much again."""
        return math.log(model.config.vocab_size) * (1 + (self.lookahead or 0.0))
