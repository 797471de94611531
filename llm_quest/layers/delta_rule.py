"""The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): an associative memory of a fixed size.

A state S (key dimension x value dimension) per head is an associative memory. Each token decays it, reads what it holds
for its key, and corrects that towards its value:

      S <- e^g S          error = v - S^T k          S <- S + k (beta error)^T          o = S^T q

`recurrent_gated_delta_rule` is that definition, one token after another. `chunk_gated_delta_rule` computes 32 tokens at
a time: inside a chunk the corrections depend on each other through a unit lower-triangular matrix, which one triangular
solve inverts before any state is known (section 3.3 there; its eq. 6 to 9 are the same without the decay):

      L = strict_lower(beta k k^T D)        A = (I + L)^-1 diag(beta)       U = A v       W = A (e^G k)
      v' = U - W S      o = e^G q S + lower(q k^T D) v'      S <- e^G_end S + (e^(G_end - G) k)^T v'
      D_ij = e^(G_i - G_j), G = cumsum(g)

Commonly got wrong: e^(G_i - G_j) above the diagonal overflows and makes the gradients NaN unless it is masked *before*
the exponential; everything here runs in float32; a token at which a document begins meets an empty memory.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK_SIZE = 32
CHUNKS_AT_ONCE = 4


class DeltaRule(Protocol):
    """q, k (B,T,H,dk), v (B,T,H,dv), g, beta (B,T,H), state (B,H,dk,dv), segments (B,T) or None -> o (B,T,H,dv), state.
    The given state belongs to the segment of the first token."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def recurrent_gated_delta_rule(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
    segments: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H dv"], Float[Tensor, "B H dk dv"]]:
    """The definition: one token after another."""
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def chunk_gated_delta_rule(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
    segments: Int[Tensor, "B T"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Tensor, "B T H dv"], Float[Tensor, "B H dk dv"]]:
    """The gated delta rule, `size` tokens at a time. Rows are padded with tokens that neither decay nor write. As many
    chunks are prepared at once as keep their intermediate results in the processor's cache."""
    batch, length, heads = q.shape[:3]
    pad_length = -length % chunk_size
    parts = [pad_to_chunks(part, pad_length).split(CHUNKS_AT_ONCE * chunk_size, dim=1) for part in (q, k, v, g, beta)]
    if segments is not None:
        parts += [
            part.split(CHUNKS_AT_ONCE)
            for part in chunk_boundaries(chunk_segment_ids(segments, pad_length, chunk_size), heads)
        ]
    outputs, S = [], state.flatten(0, 1)
    for group in zip(*parts, strict=True):
        chunks = [split_chunks(part, chunk_size) for part in group[:5]]
        chunk_terms = prepare_chunks(*chunks, boundaries=ChunkBoundaries(*group[5:]) if segments is not None else None)
        # unbind, not an index: the backward of `part[n]` builds a gradient of the full size for every chunk
        for U, W, o_intra, q_in, k_end, fade in zip(*(part.unbind() for part in chunk_terms), strict=True):
            corrected = torch.baddbmm(U, W, S, alpha=-1)
            outputs.append((q_in @ S).baddbmm_(o_intra, corrected))
            S = (S * fade).baddbmm_(k_end, corrected)
    o = torch.stack(outputs).unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :length], S.unflatten(0, (batch, heads))


def prepare_chunks(
    q: Float[Tensor, "N R C dk"],
    k: Float[Tensor, "N R C dk"],
    v: Float[Tensor, "N R C dv"],
    g: Float[Tensor, "N R C"],
    beta: Float[Tensor, "N R C"],
    *,
    boundaries: ChunkBoundaries | None,
) -> tuple[Tensor, ...]:
    """What N chunks of R rows need before any state is known: U, W, lower(q k^T D), e^G q, (e^(G_end - G) k)^T,
    e^G_end."""
    G = g.cumsum(dim=-1)
    lower = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    mask = lower if boundaries is None else lower & boundaries.same_document
    D = (G[..., :, None] - G[..., None, :]).masked_fill_(~mask, float("-inf")).exp_()
    from_start, to_end = G.exp(), D[..., -1, :]
    decay = from_start[..., -1:, None]
    if boundaries is not None:
        from_start, to_end = from_start * boundaries.same_as_first, to_end * boundaries.continues_into_next[..., None]
        decay = from_start[..., -1:, None] * boundaries.continues_into_next[..., None, None]
    L = (k @ k.mT) * (D * beta[..., None])
    A = torch.linalg.solve_triangular(L, torch.diag_embed(beta), upper=False, unitriangular=True)
    return (
        A @ v,
        (A * from_start[..., None, :]) @ k,
        (q @ k.mT) * D,
        q * from_start[..., None],
        (k * to_end[..., None]).mT,
        decay,
    )


class ChunkBoundaries(NamedTuple):
    """Where documents meet, for N chunks of R = B H rows: same_document (N,R,C,C): pairs in one document; same_as_first
    (N,R,C): in the document that the chunk begins with; continues_into_next (N,R): the next chunk begins in the
    document that this one ends with."""

    same_document: Bool[Tensor, "N R C C"]
    same_as_first: Bool[Tensor, "N R C"]
    continues_into_next: Bool[Tensor, "N R"]


def chunk_boundaries(segments: Int[Tensor, "N B C"], num_heads: int) -> ChunkBoundaries:
    following = torch.cat((segments[1:, :, 0], segments[-1:, :, -1]))
    boundaries = ChunkBoundaries(
        segments[..., :, None] == segments[..., None, :], segments == segments[..., :1], segments[..., -1] == following
    )
    return ChunkBoundaries(*(part.repeat_interleave(num_heads, dim=1) for part in boundaries))


def chunk_segment_ids(segments: Int[Tensor, "B T"], pad_length: int, chunk_size: int) -> Int[Tensor, "N B C"]:
    """The segments of the chunks; padding belongs to the last token's document."""
    row = torch.cat((segments, segments[:, -1:].expand(-1, pad_length)), dim=1)
    return row.unflatten(1, (-1, chunk_size)).transpose(0, 1)


def pad_to_chunks(x: Float[Tensor, "B T *rest"], pad_length: int) -> Float[Tensor, "B P *rest"]:
    """Pad rows with zeros to whole chunks."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad_length)) if pad_length else x


def split_chunks(x: Float[Tensor, "B T H *rest"], chunk_size: int) -> Float[Tensor, "N R C *rest"]:
    """Split R = B H rows into N chunks of C tokens."""
    chunks = x.unflatten(1, (-1, chunk_size))
    return chunks.permute(1, 0, 3, 2, *range(4, chunks.dim())).flatten(1, 2).contiguous()


def recurrent_with_states(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
) -> tuple[Float[Tensor, "B T H dv"], list[Float[Tensor, "B H dk dv"]]]:
    """`recurrent_gated_delta_rule`, with the state after every token."""
    outputs, states = [], []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        o, state = recurrent_gated_delta_rule(q[:, now], k[:, now], v[:, now], g[:, now], beta[:, now], state)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), states


def single_state(result: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The last state alone."""
    return result[0], [result[1]]


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the head."""
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + 1e-6)
