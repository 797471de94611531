"""KTO: Kahneman-Tversky optimization from single answers that are desirable or not (Ethayarajh et al. 2024,
arXiv:2402.01306, eqs. 7 and 8).

      r = log p(y|x) - log p_ref(y|x)        z = max(0, mean of log p(y'|x) - log p_ref(y'|x)), y' of other questions
      loss = desirable_weight (1 - sigma(beta (r - z)))        where y is desirable
             undesirable_weight (1 - sigma(beta (z - r)))      where it is not

z, the reference point, has no gradient. It is one number of the whole step, so that neither the split into
micro-batches nor the number of processes changes it.

Commonly got wrong: (1) z taken from the rows' own answers, which moves with what is learned; (2) z not held at 0 or
above; (3) z of a micro-batch of one row, which is noise; (4) labels that are out of balance, and weights that do not
make up for it (`balance_note`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.data.unpaired import UnpairedBatch
from llm_quest.objectives.preference import sequence_log_probs


class UnpairedLoss(Protocol):
    """The loss of each row from its log-ratio r and the reference point z. needs_kl: whether z is read."""

    needs_kl: ClassVar[bool]
    beta: float

    def desirable(self, r: Tensor, z: Tensor) -> Tensor: ...
    def undesirable(self, r: Tensor, z: Tensor) -> Tensor: ...


@dataclass
class KTO:
    """1 - sigma(beta (r - z)), and 1 - sigma(beta (z - r)) (arXiv:2402.01306, eq. 8)."""

    beta: float = 0.1
    needs_kl: ClassVar[bool] = True

    def desirable(self, r: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(-self.beta * (r - z))

    def undesirable(self, r: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(-self.beta * (z - r))


@dataclass
class APOZeroUnpaired:
    """1 - sigma(beta r), and sigma(beta r): APO-zero (arXiv:2408.06266, eq. 7) of single answers; z is 0."""

    beta: float = 0.1
    needs_kl: ClassVar[bool] = False

    def desirable(self, r: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(-self.beta * r)

    def undesirable(self, r: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(self.beta * r)


UNPAIRED_LOSSES: dict[str, type[Any]] = {"kto": KTO, "apo_zero_unpaired": APOZeroUnpaired}


class KTOLoss(nn.Module):
    """`KTOLoss(model, KTO(beta=0.1))(batch) -> Loss`: count = rows. Dropout is off, as in every pass that scores.

    metrics: rewards/chosen, rewards/rejected (beta r of desirable and of undesirable rows), logps/chosen,
    logps/rejected, kl (z), rewards/accuracy: how many rows are on their side of z."""

    def __init__(
        self,
        model: nn.Module,
        loss: UnpairedLoss = KTO(),
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ):
        super().__init__()
        self.model: Any = model
        self.loss = loss
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def forward(self, batch: UnpairedBatch) -> Loss:
        return self.loss_of(sequence_log_probs(self.model, batch), batch)

    def loss_of(self, log_p: Float[Tensor, " R"], batch: UnpairedBatch) -> Loss:
        """The loss from the policy's log-probability of each row."""
        r, z = log_p - batch.reference_log_probs, batch.kl.to(log_p.dtype)
        good = self.desirable_weight * self.loss.desirable(r, z)
        bad = self.undesirable_weight * self.loss.undesirable(r, z)
        total = torch.where(batch.desirable, good, bad).sum()
        rows = torch.tensor(len(r), dtype=torch.float32, device=r.device)
        return Loss(total, rows, self.metrics(log_p.detach(), r.detach(), z, batch))

    def metrics(self, log_p: Tensor, r: Tensor, z: Tensor, batch: UnpairedBatch) -> dict[str, tuple[Tensor, Tensor]]:
        good, rows = batch.desirable.to(r.dtype), torch.ones_like(r).sum()
        metrics = {}
        for side, is_on in (("chosen", good), ("rejected", 1 - good)):
            metrics[f"rewards/{side}"] = ((self.loss.beta * r * is_on).sum(), is_on.sum())
            metrics[f"logps/{side}"] = ((log_p * is_on).sum(), is_on.sum())
        metrics["rewards/accuracy"] = (((r > z) == batch.desirable).to(r.dtype).sum(), rows)
        return metrics | {"kl": (z * rows, rows)}


@torch.no_grad()
def gains_with_mismatch(model: Any, batches: Sequence[PreferenceBatch]) -> tuple[float, int]:
    """The sum over rows of log p(y'|x) - log p_ref(y'|x), and the number of rows."""
    total, rows = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        assert batch.reference_log_probs is not None, "the reference of mismatched answers is computed before"
        gain = sequence_log_probs(model, rows_with_mismatch(batch).to(device)).double().cpu()
        total += float((gain - batch.reference_log_probs[batch.rejected]).sum())
        rows += len(batch.rejected)
    return total, rows


def rows_with_mismatch(batch: PreferenceBatch) -> UnpairedBatch:
    """The rows of a batch with the answers to other questions."""
    rows, nothing = batch.rejected, torch.zeros(len(batch.rejected))
    return UnpairedBatch(
        batch.input_ids[rows], batch.targets[rows], batch.position_ids[rows], nothing > 0, nothing, torch.zeros(())
    )


def reference_point(parts: Sequence[tuple[float, int]]) -> Float[Tensor, ""]:
    """z from the sums and counts of all processes."""
    rows = sum(count for _, count in parts)
    return torch.tensor(max(0.0, sum(total for total, _ in parts) / max(rows, 1)))


def balance_note(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> str:
    """The counts of labels, and where the weighted ratio of both sides is outside 1 to 4/3 (arXiv:2402.01306,
    section 4.2) the weight that puts it inside."""
    counts_line = f"labels: {desirable:,} desirable, {undesirable:,} undesirable answers"
    if not desirable or not undesirable:
        return f"{counts_line}; one side alone teaches no difference"
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if 1 <= ratio <= 4 / 3:
        return counts_line
    if ratio < 1:
        weight = undesirable_weight * undesirable / desirable
        return f"{counts_line}; KTO's paper advises desirable_weight={weight:.3g} to {4 / 3 * weight:.3g}"
    weight = desirable_weight * desirable / undesirable
    return f"{counts_line}; KTO's paper advises undesirable_weight={3 / 4 * weight:.3g} to {weight:.3g}"
