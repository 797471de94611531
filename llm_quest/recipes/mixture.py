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
from llm_quest.models.build import page_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import Beside, NextToken
from llm_quest.recipes.config import Strict
from llm_quest.techniques.expert_bias import BalanceExperts

BIAS_STEP, WITHIN, LOOKAHEAD = 0.001, 0.0001, 0.3
BUILDERS = "deepseek_v3 and mimo"


class Router(Strict):
    """Coefficients of the routers' losses. null: what the model's routers are trained with; 0 leaves one out."""

    load_balancing: float | None = Field(
        default=None, ge=0, description="Switch's, pooled over layers; the loss is k where the load is even"
    )
    sequence_balancing: float | None = Field(
        default=None, ge=0, description="DeepSeek-V3's, within each sequence; 1 a layer where the load is even"
    )
    z_loss: float = Field(default=0.0, ge=0, description="ST-MoE's: keeps the logits small; 0.001 is usual")

    @property
    def terms(self) -> dict[str, float]:
        """Those that are added."""
        return {name: value for name, value in self.model_dump().items() if value}


@dataclass(frozen=True)
class Parts:
    """What is trained beside the next token; null where the model has no such part."""

    router: Router | None
    balance: float | None
    lookahead: float | None

    def decided(self, model: Decoder) -> Parts:
        """With the defaults written out. UsageError for a setting that would change nothing."""
        page = page_of(model.config).name
        by_softmax = [one.balance for one in model.modules() if isinstance(one, SoftmaxRouter)]
        by_bias = any(isinstance(one, SigmoidRouter) for one in model.modules())
        if self.router is not None and not (by_softmax or by_bias):
            raise UsageError(f"router has no effect: this {page} model has no experts; leave router out")
        if self.balance is not None and not by_bias:
            why = "its routers have no bias; use router.load_balancing" if by_softmax else "it has no experts"
            raise UsageError(f"balance has no effect on this {page} model: {why}")
        if self.lookahead is not None and not len(model.lookahead):
            raise UsageError(
                f"lookahead has no effect: this {page} model has no multi-token modules; {BUILDERS} build them with "
                "model.sizes.lookahead=1, the technique multi_token adds them to any"
            )
        router = (self.router or Router()) if by_softmax or by_bias else None
        if router is not None:
            own = {"load_balancing": max(by_softmax, default=0.0), "sequence_balancing": WITHIN if by_bias else 0.0}
            given = router.model_dump(exclude_none=True)
            router = Router(**{**own, **given})
        return Parts(
            router,
            BIAS_STEP if self.balance is None and by_bias else self.balance,
            LOOKAHEAD if self.lookahead is None and len(model.lookahead) else self.lookahead,
        )

    def objective(self, model: Decoder, beside: Sequence[Beside] = ()) -> NextToken:
        """Next-token prediction with what the parts add, and further terms."""
        router = self.router.terms if self.router else {}
        return NextToken(model, router=router, lookahead=self.lookahead or 0.0, beside=beside)

    def callbacks(self) -> list[Callback]:
        """The balancing step, where there is one."""
        return [BalanceExperts(self.balance)] if self.balance else []

    def first_loss(self, model: Decoder) -> float:
        """Of random weights: ln V, and the multi-token modules' share of as much again."""
        return math.log(model.config.vocab) * (1 + (self.lookahead or 0.0))
