"""Multi-token prediction modules (DeepSeek-V3, arXiv:2412.19437, section 2.2): a chain of small models after the main
one, each of which predicts one token further ahead. The causal chain is kept: module k reads the output of module k-1.

      tokens           a  b  c  d  e
      main reads       a  b  c  d         predicts   b  c  d  e
      module 1 reads   b  c  d            predicts   c  d  e        h_1 = block(join[norm(embed(b)); norm(h_0)])
      module 2 reads   c  d               predicts   d  e           h_2 = block(join[norm(embed(c)); norm(h_1)])

Commonly got wrong: the logits come from the block's *output* (else the last block learns nothing); the embedding is the
first of the pair, where the paper prints it second; h_0 is the main model's output after its final norm.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.layers.norm import RMSNorm
from llm_quest.scope import Scope


class MTPModule(nn.Module):
    """One module: h (B,T,D) of the previous one and the embeddings (B,T,D) of the tokens one further on -> its own h
    (B,T,D) after `norm`, ready for the head that all share."""

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
        self, h: Float[Tensor, "B T D"], embeddings: Float[Tensor, "B T D"], scope: Scope
    ) -> Float[Tensor, "B T D"]:
        pair = torch.cat((self.embed_norm(embeddings), self.hidden_norm(h)), dim=-1)
        return self.norm(self.block(self.join(pair), scope))


def make_mtp_module(dim: int, eps: float, block: nn.Module) -> MTPModule:
    """A module around this block, with RMSNorms and a join without bias, as the published models have it."""
    embed_norm, hidden_norm, norm = (RMSNorm(dim, eps) for _ in range(3))
    join = nn.Linear(2 * dim, dim, bias=False)
    return MTPModule(embed_norm=embed_norm, hidden_norm=hidden_norm, join=join, block=block, norm=norm)


def shift_left(row: Int[Tensor, "B T"], k: int, fill_value: int) -> Int[Tensor, "B T"]:
    """Each position holds the value k further on; `fill_value` where there is none."""
    return torch.cat((row[:, k:], row.new_full((row.shape[0], min(k, row.shape[1])), fill_value)), dim=1)


def shift_position_ids(scope: Scope, k: int) -> Int[Tensor, "B T"]:
    """The positions of the tokens k further on; -1 where the text, or the document, ends before."""
    position_ids = shift_left(scope.position_ids, k, -1)
    beyond_end = (scope.position_ids < 0) | (position_ids != scope.position_ids + k)
    if scope.segment_ids is not None:
        beyond_end = beyond_end | (shift_left(scope.segment_ids, k, -1) != scope.segment_ids)
    return torch.where(beyond_end, -1, position_ids)
