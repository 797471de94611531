"""Multi-token prediction modules (DeepSeek-V3, arXiv:2412.19437, section 2.2): a chain of small models behind the main
one, each looking one token further ahead. The causal chain is kept: module k reads what module k-1 understood.

      tokens           a  b  c  d  e
      main reads       a  b  c  d         predicts   b  c  d  e
      module 1 reads   b  c  d            predicts   c  d  e        h_1 = block(join[norm(embed(b)); norm(h_0)])
      module 2 reads   c  d               predicts   d  e           h_2 = block(join[norm(embed(c)); norm(h_1)])

Commonly got wrong: the logits come from the block's *output* (else the last block learns nothing); the embedding stands
first in the pair, the other way round than the paper prints it; h_0 is the main model's output after its final norm.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.scope import Scope


class Lookahead(nn.Module):
    """One module: h (B,T,D) of the one before and the embeddings (B,T,D) of the tokens one further on -> its own h
    (B,T,D), after `norm`, ready for the head that all share."""

    def __init__(
        self, *, embed_norm: nn.Module, hidden_norm: nn.Module, join: nn.Linear, block: nn.Module, norm: nn.Module
    ):
        super().__init__()
        self.embed_norm = embed_norm
        self.hidden_norm = hidden_norm
        self.join = join
        self.block = block
        self.norm = norm

    def forward(
        self, h: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"], scope: Scope
    ) -> Float[Tensor, "B T D"]:
        pair = torch.cat((self.embed_norm(embedded), self.hidden_norm(h)), dim=-1)
        return self.norm(self.block(self.join(pair), scope))


def ahead(row: Int[Tensor, "B T"], k: int, empty: int) -> Int[Tensor, "B T"]:
    """Each place holds what stands k further on; `empty` where nothing does."""
    return torch.cat((row[:, k:], row.new_full((row.shape[0], min(k, row.shape[1])), empty)), dim=1)


def positions_ahead(scope: Scope, k: int) -> Int[Tensor, "B T"]:
    """The positions of the tokens k further on, -1 where the text, or the document, ends before."""
    positions = ahead(scope.positions, k, -1)
    gone = (scope.positions < 0) | (positions != scope.positions + k)
    if scope.segments is not None:
        gone = gone | (ahead(scope.segments, k, -1) != scope.segments)
    return torch.where(gone, -1, positions)
