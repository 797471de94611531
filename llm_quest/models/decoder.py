"""The decoder: embed, enter, blocks, leave, norm, head. Not inherited from: families differ by the modules they
pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.linear import LMHead, row_splits
from llm_quest.scope import Scope


@dataclass(frozen=True)
class GenerationConfig:
    """Token ids that begin, end (often several) and pad a text, and how its makers advise to sample; None: they say
    nothing."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class Decoder(nn.Module):
    """`model(tokens (B,T), scope=None) -> logits (B,T,V)`; the promises are in `contracts.Decoder`.

    embed(tokens, scope) -> (B,T,D). enter, leave: widen and close the stream (Identity but for hyper-connections). Each
    of `blocks` is called with the scope as its layer sees it. head: after the projection it may cap the logits.
    mtp_modules: multi-token prediction modules, read by their objective and by drafting alone."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        head: nn.Module,
        enter: nn.Module | None = None,
        leave: nn.Module | None = None,
        mtp_modules: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.spec = spec
        self.embed = embed
        self.enter = enter or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.leave = leave or nn.Identity()
        self.norm = norm
        self.head = head
        self.mtp_modules = nn.ModuleList(mtp_modules)
        self.generation_config: GenerationConfig | None = None

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.spec.config

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        scope: Scope | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden_states(input_ids, scope, inputs_embeds))

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        scope: Scope | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the head reads: the last block's output after the final norm. inputs_embeds: in place of
        `embed.embed_tokens(input_ids)`, for vectors that are not tokens (an image's)."""
        scope = (Scope.unpadded(input_ids) if scope is None else scope).with_input_ids(input_ids)
        x = self.enter(self.embed(input_ids, scope, inputs_embeds))
        for layer, block in enumerate(self.blocks):
            x = block(x, scope.for_layer(layer))
        return self.norm(self.leave(x))

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> Cache:
        """An empty cache for `batch` rows and positions below `capacity`; windowed layers can take back `max_rewind`
        tokens."""
        layer_caches = [block.new_cache(batch_size, capacity, max_rewind) for block in self.blocks]  # type: ignore[operator]
        return Cache(layer_caches, batch_size, capacity)

    def row_splits(self) -> dict[str, tuple[int, ...]]:
        """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each
        alone)."""
        return row_splits(self)


def decoder_of_blocks(
    family: str,
    config: Any,
    block: Callable[[Any, int], nn.Module],
    embedding: Callable[[int, int], nn.Module],
    norm: Callable[[int, float], nn.Module],
    mtp_modules: Sequence[nn.Module] = (),
) -> Decoder:
    """embedding(vocab_size, hidden_size), then block(config, layer_idx) for every layer, norm(hidden_size, eps) and a
    head, which is the embedding where `tie_word_embeddings` says so."""
    embed = embedding(config.vocab_size, config.hidden_size)
    tied: Any = embed.token if config.tie_word_embeddings else None
    return Decoder(
        ModelSpec(family, config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=norm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(config.hidden_size, config.vocab_size, tied_embedding=tied),
        mtp_modules=mtp_modules,
    )
