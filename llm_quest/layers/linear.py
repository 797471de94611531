"""y = x W^T + b, and the same in the other order for few rows: (W x^T)^T.

The product is the same, but the host's matrix multiplication is tuned for many rows of x. For the few rows of a decode
step the other order is 1.2 to 1.5 times as fast, and needs no second copy of the weights. Measured on one core
(`docs/LOG.md`, 2026-11-24), milliseconds for (50257, 768) and (3072, 768): bfloat16, 1 row 8.8 and 0.28 against 6.3 and
0.23, 32 rows 11.0 and 0.36 against 7.7 and 0.24; float32, 32 rows 33 and 1.17 against 27 and 0.86, while below 8 rows
it is slower. So it is from 64 rows on (the matrices of an 11M model one after another, on another machine: 15.4 ms
against 12.5).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = {torch.bfloat16: range(1, 65), torch.float32: range(8, 49)}
NO_ROWS = range(0)


class Linear(nn.Linear):
    """nn.Linear that takes the faster order for few rows where no gradient is needed. Under autocast the dtypes here
    are not those of the product, and the other order would return columns for which the next layer copies its weights.
    """

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        alike = x.dtype == self.weight.dtype and self.weight.is_contiguous() and not torch.is_grad_enabled()
        few = (
            alike
            and x.shape[:-1].numel() in FEW_ROWS.get(x.dtype, NO_ROWS)
            and not torch.is_autocast_enabled(x.device.type)
        )
        return (linear_few_rows if few else F.linear)(x, self.weight, self.bias)


def linear_few_rows(
    x: Float[Tensor, "*batch I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*batch O"]:
    """F.linear in the other order. A single row is taken twice: with one column the product falls back to the slow
    order."""
    rows = x.reshape(-1, x.shape[-1])
    columns = rows.expand(2, -1).T if rows.shape[0] == 1 else rows.T
    y = (weight @ columns)[:, : rows.shape[0]].T.contiguous()  # what follows is slow on rows that lie as columns
    return (y if bias is None else y + bias.to(y.dtype)).reshape(*x.shape[:-1], -1)
