"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1): softmax(q k^T * scale) v.

`explicit_attention` is the definition; `fused_attention` computes the same through PyTorch's kernel, and one query a
row in compiled code on the host through our operator (`query_attention`); laws hold them equal. `ScaledDotProduct` is
the module that mixers call. Its scale, dropout, soft cap and sinks are its attributes, and forward hooks on it see the
queries and keys of every pass (QK-Clip, attention taps).

Commonly got wrong: the cap comes after the scale and before the mask; a window counts the token itself; a sink's logit
is not scaled like a score, and its column is dropped after the softmax, so the weights sum to less than one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers import native, training_kernels
from llm_quest.scope import BlockDiagonalMask, CausalMask, MaskSpec, Scope, SlidingWindow

AttentionMask = Bool[Tensor, "B T S"] | CausalMask | SlidingWindow | BlockDiagonalMask
OPERATOR_DTYPES = (torch.float32, torch.bfloat16)
"""What the operator in C++ reads."""


class AttentionFunction(Protocol):
    """q (B,T,H,d), k (B,S,G,d), v (B,S,G,dv), a mask -> (B,T,H,dv)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: MaskSpec,
        *,
        scale: float,
        dropout: float = 0.0,
        sink: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor: ...


def explicit_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: AttentionMask,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B T H dv"]:
    """softmax(q k^T * scale) v over the visible keys: the definition. Keeps every score in memory."""
    weights = attention_weights(q, k, attention_mask, scale=scale, sink=sink, softcap=softcap).to(v.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def attention_weights(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    attention_mask: AttentionMask,
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """Attention weights, softmax(q k^T * scale), computed in at least float32.

    softcap: scores become cap * tanh(score / cap) *before* the mask (Gemma 2; after it, a masked key would score -cap
    instead of -inf). sink: one more logit per head, which takes weight and has no value (gpt-oss, MiMo)."""
    k_BSHd = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k_BSHd) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not CausalMask.FULL:
        scores = scores.masked_fill(~dense_mask(attention_mask, q, k)[:, None], float("-inf"))
    if sink is not None:
        sink_column = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink_column), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., : k.shape[1]]


def dense_mask(attention_mask: AttentionMask, q: Tensor, k: Tensor) -> Bool[Tensor, "batch T S"]:
    """The mask as a tensor."""
    if isinstance(attention_mask, Tensor):
        return attention_mask
    if isinstance(attention_mask, BlockDiagonalMask):
        return dense_blocks(attention_mask, q)
    allowed = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    allowed = allowed if attention_mask is CausalMask.FULL else allowed.tril()
    return allowed.triu(1 - attention_mask.window) if isinstance(attention_mask, SlidingWindow) else allowed


def dense_blocks(blocks: BlockDiagonalMask, q: Float[Tensor, "B T H d"]) -> Bool[Tensor, "B T T"]:
    """The mask of a block-diagonal pass as a tensor."""
    lengths = torch.tensor(blocks.lengths, device=q.device)
    block = torch.arange(len(blocks.lengths), device=q.device).repeat_interleave(lengths).view(q.shape[:2])
    allowed = (block[:, :, None] == block[:, None, :]).tril()
    return allowed if blocks.window is None else allowed.triu(1 - blocks.window)


def fused_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: AttentionMask,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B T H dv"]:
    """Attention through PyTorch's fused kernel, which does not keep the scores. For a single query, the heads of a
    group are the rows of one product, so that k is read once. The kernel has no soft cap: with one, the explicit form
    runs. It has no sink: `sink_attention`."""
    if isinstance(attention_mask, BlockDiagonalMask):
        options = {"scale": scale, "dropout": dropout, "sink": sink, "softcap": softcap}
        return block_diagonal_attention(q, k, v, attention_mask, **options)  # type: ignore[arg-type]
    if not dropout and takes_query_operator(q, k, v, attention_mask, sink):
        return query_attention(q, k, v, attention_mask, scale=scale, sink=sink, softcap=softcap)
    if softcap is not None:
        return explicit_attention(q, k, v, attention_mask, scale=scale, dropout=dropout, sink=sink, softcap=softcap)
    if isinstance(attention_mask, SlidingWindow):
        return sliding_window_attention(q, k, v, attention_mask.window, scale=scale, dropout=dropout, sink=sink)
    if takes_causal_kernel(q, k, v, attention_mask, sink, dropout):
        return training_kernels.causal_attention_by_kernel(q, k, v, scale)
    if sink is not None:
        return sink_attention(q, k, v, attention_mask, sink, scale=scale, dropout=dropout)
    batch_size, length, num_attention_heads, head_dim = q.shape
    num_key_value_heads = k.shape[2]
    k_BGSd, v_BGSd = k.transpose(1, 2), v.transpose(1, 2)
    mask = None if isinstance(attention_mask, CausalMask) else attention_mask[:, None]
    if length == 1 and not dropout and q.device.type == "cpu" and torch.compiler.is_dynamo_compiling():
        return single_query_attention(q, k, v, mask, scale=scale)
    if length == 1:
        q_BGrd = q.reshape(batch_size, num_key_value_heads, num_attention_heads // num_key_value_heads, head_dim)
        out = F.scaled_dot_product_attention(q_BGrd, k_BGSd, v_BGSd, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.reshape(batch_size, 1, num_attention_heads, -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGSd,
        v_BGSd,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=attention_mask is CausalMask.CAUSAL,
        scale=scale,
        enable_gqa=num_key_value_heads != num_attention_heads,
    )
    return out.transpose(1, 2)


def takes_causal_kernel(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: AttentionMask, sink: Tensor | None, dropout: float
) -> bool:
    """Whether this is a causal pass over whole short rows for the training kernels."""
    return (
        attention_mask is CausalMask.CAUSAL
        and not dropout
        and sink is None
        and 1 < q.shape[1] == k.shape[1] <= training_kernels.MAX_LENGTH
        and training_kernels.takes_training_kernel(q, k, v)
    )


def takes_query_operator(
    q: Float[Tensor, "B T H d"], k: Tensor, v: Tensor, attention_mask: AttentionMask, sink: Tensor | None
) -> bool:
    """Whether the operator in C++ computes this: one query a row, in compiled code on the host, without gradients.
    (Eager code leaves attention to torch, so that its last bits do not depend on what was built before.)"""
    return (
        q.shape[1] == 1
        and q.device.type == "cpu"
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and (attention_mask is CausalMask.FULL or isinstance(attention_mask, Tensor))
        and q.dtype == k.dtype == v.dtype
        and q.dtype in OPERATOR_DTYPES
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sink)))
        and native.is_loaded()
    )


def query_attention(
    q: Float[Tensor, "B 1 H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: MaskSpec,
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
    isa: str = "best",
) -> Float[Tensor, "B 1 H dv"]:
    """Attention of one query a row by the operator in C++ (query_attention.cpp), which reads visible keys alone and
    keeps nothing for a backward pass. attention_mask: (B or 1, 1, S), or FULL. isa: of `native.ISA`."""
    mask = attention_mask[:, 0] if isinstance(attention_mask, Tensor) else None
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    sink = None if sink is None else sink.to(torch.float32).contiguous()
    operator = torch.ops.llm_quest.query_attention
    return operator(q, k, v, mask, sink, scale, softcap or 0.0, native.ISA[isa])  # type: ignore[no-any-return]


def single_query_attention(
    q: Float[Tensor, "B 1 H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    mask: Bool[Tensor, "B 1 1 S"] | None,
    *,
    scale: float,
) -> Float[Tensor, "B 1 H dv"]:
    """Attention of one query a row as sums that torch.compile fuses into loops, for a host without our operator: for a
    decoded token the fused kernel takes 1.5 times as long in float32 and five times in bfloat16, since it calls a
    matrix product for each head. The division by the sum of the weights comes last."""
    groups, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    q_BGr1d = (q.to(wide) * scale).reshape(q.shape[0], groups, -1, 1, q.shape[3])
    k_BG1Sd, v_BG1Sd = (part.transpose(1, 2)[:, :, None] for part in (k, v))
    scores = (q_BGr1d * k_BG1Sd).sum(-1)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    mixed = (weights[..., None] * v_BG1Sd).sum(-2) / weights.sum(dim=-1, keepdim=True)
    return mixed.reshape(q.shape[0], 1, q.shape[2], -1).to(q.dtype)


def block_diagonal_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B T G d"],
    v: Float[Tensor, "B T G dv"],
    blocks: BlockDiagonalMask,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B T H dv"]:
    """Each document as a row of its own: the causal kernel without a mask, and no scores between documents or for
    padding (which becomes 0). Split, not sliced: the backward of a slice builds a gradient of the full size."""
    options = {"scale": scale, "dropout": dropout, "sink": sink, "softcap": softcap}
    parts = [part.flatten(0, 1).split(blocks.lengths) for part in (q, k, v)]
    outputs = []
    for *block, is_padding in zip(*parts, blocks.is_padding, strict=True):
        if is_padding:
            outputs.append(v.new_zeros(len(block[0]), q.shape[2], v.shape[3]))
        else:
            mask = blocks.of_block(len(block[0]))
            outputs.append(fused_attention(*(part[None] for part in block), mask, **options)[0])  # type: ignore[misc, arg-type]
    return torch.cat(outputs).unflatten(0, q.shape[:2])


def sliding_window_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B T G d"],
    v: Float[Tensor, "B T G dv"],
    window: int,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B T H dv"]:
    """Blocks of as many queries as the window is long, each with the keys that it can see: 2 x window scores per query
    instead of T."""
    block_size, length, outputs = max(window, 64), q.shape[1], []
    for start in range(0, length, block_size):
        stop, first = min(start + block_size, length), max(0, start - window + 1)
        offset = start - first
        allowed = torch.ones(stop - start, stop - first, dtype=torch.bool, device=q.device)
        allowed = allowed.tril(offset).triu(offset - window + 1).expand(q.shape[0], -1, -1)
        block = (q[:, start:stop], k[:, first:stop], v[:, first:stop])
        outputs.append(fused_attention(*block, allowed, scale=scale, dropout=dropout, sink=sink))
    return torch.cat(outputs, dim=1)


def sink_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: AttentionMask,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H dv"]:
    """The sink as one more key and value of zeros, whose column in a float mask holds the sink itself."""
    length, num_attention_heads = q.shape[1:3]
    keys = k.shape[1]
    allowed = dense_mask(attention_mask, q, k)
    mask = q.new_zeros(allowed.shape[0], 1, length, keys).masked_fill(~allowed[:, None], float("-inf"))
    column = sink.to(q.dtype)[None, :, None, None].expand(mask.shape[0], num_attention_heads, length, 1)
    mask = torch.cat((mask.expand(-1, num_attention_heads, -1, -1), column), dim=-1)
    k_BGSd, v_BGSd = (F.pad(part, (0, 0, 0, 0, 0, 1)).transpose(1, 2) for part in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGSd,
        v_BGSd,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=k.shape[2] != num_attention_heads,
    )
    return out.transpose(1, 2)


class ScaledDotProduct(nn.Module):
    """softmax(q k^T * scale) v, as a module. H query heads read G key/value heads: head h reads h // (H/G).

    dropout: of the weights, in training. softcap: scores s become softcap * tanh(s / softcap) (Gemma 2). sink (H): a
    learned logit per head that takes weight and has no value (MiMo). implementation: `fused_attention`, or
    `explicit_attention`, the definition."""

    def __init__(
        self,
        scale: float,
        *,
        dropout: float = 0.0,
        softcap: float | None = None,
        sink: nn.Parameter | None = None,
    ):
        super().__init__()
        self.scale, self.dropout, self.softcap, self.sink = scale, dropout, softcap, sink
        self.implementation: AttentionFunction = fused_attention

    def forward(
        self,
        q: Float[Tensor, "B T H d"],
        k: Float[Tensor, "B S G d"],
        v: Float[Tensor, "B S G dv"],
        attention_mask: AttentionMask,
        scope: Scope,
    ) -> Float[Tensor, "B T H dv"]:
        """The attention output, by the chosen implementation. scope: not read here; forward hooks need it (positions of
        padding, records)."""
        dropout = self.dropout if self.training else 0.0
        return self.implementation(
            q, k, v, attention_mask, scale=self.scale, dropout=dropout, sink=self.sink, softcap=self.softcap
        )

    def weights(self, q: Tensor, k: Tensor, attention_mask: MaskSpec) -> Float[Tensor, "B H T S"]:
        """The attention weights of these queries and keys, without dropout."""
        return attention_weights(q, k, attention_mask, scale=self.scale, sink=self.sink, softcap=self.softcap)

    def init_weights(self, generator: torch.Generator | None) -> None:
        """A sink starts at 0."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)
