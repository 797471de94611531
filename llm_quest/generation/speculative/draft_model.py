"""Drafting with a smaller model of the same vocabulary.

Two models of one tokenizer may have embeddings padded to other sizes (Qwen2.5: 151,936 and 152,064 rows). Ids that the
draft model does not have are never drafted, and ids that the target does not have neither; the text is the target's
alone in any case.

Commonly got wrong: the draft's cache is taken back with the target's, or it goes on from rejected tokens; an id that
only one of two padded vocabularies has is never drafted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.compiled import compile_for_model, keeps_history, round_up_capacity
from llm_quest.generation.decoding import continuation_scope, pad_left
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.speculative.drafters import (
    MAX_DRAFT_TOKENS,
    DraftBuffer,
    DraftRequest,
    DraftTokens,
    ShouldContinue,
    count_weights,
    relative_pass_cost,
    sample_draft,
    stack_draft_samples,
)
from llm_quest.layers.kv_cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

COMPILED_STRIDE = 4
"""A compiled lookahead draws so many tokens before the host looks at them."""
MAX_VOCABULARY_PADDING = 1024
"""Rows by which two embeddings of one tokenizer may differ."""
MAX_UNREAD_TOKENS = 2
"""It begins with so many columns: after a full acceptance the last guess is unread, and the token after it."""


class DraftModelDrafter:
    """Drafts with a smaller model, which has a cache of its own. `cached_lengths`: how many tokens of each row it
    holds; missing ones are read with the first step.

    compile: `tokens_per_step` tokens are drawn in one graph, each read by the next step without leaving it
    (`draft_loop`)."""

    context_only = True
    max_draft_tokens = MAX_DRAFT_TOKENS

    def __init__(
        self, draft_model: Decoder, target_model: Decoder, sampling_params: SamplingParams, *, compile: bool = False
    ):
        self.vocab_size, own = target_model.config.vocab_size, draft_model.config.vocab_size
        if abs(own - self.vocab_size) > MAX_VOCABULARY_PADDING:
            raise UsageError(
                f"the draft knows {own} tokens, the model {self.vocab_size}: a draft must have the model's own "
                "tokenizer; train one with tokenizer.load, or take draft='ngram'"
            )
        if draft_model.training:
            raise UsageError("the draft is in training mode, where dropout would disturb it: call draft.eval() first")
        self.model = draft_model
        self.sampling_params = sampling_params
        self.device = next(draft_model.parameters()).device
        self.compiled_loop = compile_for_model(draft_loop, draft_model) if compile else None
        self.tokens_per_step = COMPILED_STRIDE if compile else 1
        size, of = (
            (count_weights(draft_model), len(draft_model.blocks)),
            (count_weights(target_model), len(target_model.blocks)),
        )
        self.relative_cost = relative_pass_cost(size[0], of[0], size[1], of[1], compiled=compile)

    @torch.inference_mode()
    def prefill(self, windows: Sequence[Sequence[int]], rows_per_window: int, capacity: int) -> None:
        capacity = min(capacity, self.model.config.max_position_embeddings)
        self.kv_cache = self.model.new_cache(
            len(windows), round_up_capacity(capacity) if self.compiled_loop else capacity, MAX_DRAFT_TOKENS + 1
        )
        read = [list(window[:-1])[: self.model.config.max_position_embeddings] for window in windows]
        forward_hidden(self.model, read, [0] * len(windows), self.kv_cache, self.device)
        self.cached_lengths = [len(part) for part in read for _ in range(rows_per_window)]
        if rows_per_window > 1:
            self.kv_cache.batch_repeat_interleave(rows_per_window)

    @torch.inference_mode()
    def propose(self, request: DraftRequest, should_continue: ShouldContinue) -> DraftTokens:
        buffer = DraftBuffer(request)
        room = [self.model.config.max_position_embeddings - len(text) + 1 for text in request.texts]
        wanted = [min(want, space) for want, space in zip(request.wanted, room, strict=True)]
        rows = [row for row, want in enumerate(wanted) if want > 0]
        missing = [list(text[known:]) for text, known in zip(request.texts, self.cached_lengths, strict=True)]
        while rows and (not buffer.num_drafted or should_continue(buffer.confidence)):
            token_rows = [part if row in rows else [] for row, part in enumerate(missing)]
            tokens = self.draft_step(token_rows, buffer, wanted)
            missing = [new[-1:] for new in tokens]
            rows = [row for row in rows if wanted[row] > len(buffer.tokens[row])]
        return buffer.to_drafts()

    def draft_step(self, token_rows: list[list[int]], buffer: DraftBuffer, wanted: Sequence[int]) -> list[list[int]]:
        """Read these tokens and draw what follows: one token of every row, or `tokens_per_step`."""
        if self.compiled_loop:
            return self.draft_compiled(token_rows, buffer, wanted)
        at = buffer.num_drafted
        new = sample_draft(
            self.sampling_params, self.forward_tokens(token_rows), buffer.request.uniforms[:, at], buffer.seen
        )
        q = None if new.q is None else new.q[:, None]
        return buffer.append(new.tokens[:, None], new.confidence[:, None], q, wanted)

    def forward_tokens(self, token_rows: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Logits after each row's last token."""
        hidden = forward_hidden(self.model, token_rows, self.cached_lengths, self.kv_cache, self.device)
        self.cached_lengths = [known + len(part) for known, part in zip(self.cached_lengths, token_rows, strict=True)]
        return fit_vocabulary(self.model.head(hidden[:, -1]), self.vocab_size)

    def draft_compiled(
        self, token_rows: list[list[int]], buffer: DraftBuffer, wanted: Sequence[int]
    ) -> list[list[int]]:
        assert self.compiled_loop is not None, "asked for where there is one"
        if max(map(len, token_rows)) > MAX_UNREAD_TOKENS:  # after a rest
            old = [part[:-1] for part in token_rows]
            self.forward_tokens(old)
            token_rows = [part[-1:] for part in token_rows]
        at, stride = buffer.num_drafted, self.tokens_per_step
        ends = [len(text) + want - 1 for text, want in zip(buffer.request.texts, wanted, strict=True)]
        tokens, positions = pad_left(token_rows, width=MAX_UNREAD_TOKENS)
        starts = torch.tensor(self.cached_lengths)[:, None]
        places = (
            tokens.to(self.device),
            torch.where(positions < 0, -1, positions + starts).to(self.device),
            torch.tensor(ends, device=self.device)[:, None],
        )
        uniforms = buffer.request.uniforms[:, at : at + stride].clone()
        new = self.compiled_loop(
            self.model, *places, self.kv_cache, self.sampling_params, uniforms, buffer.seen, self.vocab_size
        )
        self.cached_lengths = [
            min(known + len(part) + stride - 1, end) if part else known
            for known, part, end in zip(self.cached_lengths, token_rows, ends, strict=True)
        ]
        return buffer.append(*new, wanted)

    @torch.inference_mode()
    def update(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], num_taken: Sequence[int]) -> None:
        to = [min(known, max(len(text) - 1, 0)) for known, text in zip(self.cached_lengths, texts, strict=True)]
        if to != self.cached_lengths or (self.compiled_loop and keeps_history(self.kv_cache)):
            self.cached_lengths = self.kv_cache.rewind(to)

    def keep_rows(self, rows: Tensor) -> None:
        self.kv_cache.batch_select_indices(rows)
        self.cached_lengths = [self.cached_lengths[row] for row in rows.tolist()]


def fit_vocabulary(logits: Float[Tensor, "*batch W"], vocab_size: int) -> Float[Tensor, "*batch V"]:
    """The draft's logits over the target's vocabulary: cut, or filled with -inf."""
    return torch.nn.functional.pad(logits, (0, vocab_size - logits.shape[-1]), value=-torch.inf)


def draft_loop(
    model: Decoder,
    tokens: Int[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    ends: Int[Tensor, "B 1"],
    cache: Cache,
    sampling_params: SamplingParams,
    uniforms: Float[Tensor, "B c"],
    seen: Bool[Tensor, "B V"] | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Several steps of drafting as one graph: tokens (B,c), the confidence of each (B,c), and the distributions they
    were drawn from (B,c,V). ends: a row reads nothing at this position or later, so that none runs out of its cache."""
    drafted = []
    for column in uniforms.unbind(dim=1):
        tokens = tokens.clamp(max=model.config.vocab_size - 1)
        logits = fit_vocabulary(
            model.head(model.hidden_states(tokens, Scope(positions, cache=cache))[:, -1]), vocab_size
        )
        drafted.append(new := sample_draft(sampling_params, logits, column, seen))
        tokens = new.tokens[:, None]
        seen = None if seen is None else seen.scatter(1, tokens, True)
        here = positions[:, -1:]
        positions = torch.where((here < 0) | (here + 1 >= ends), -1, here + 1)
    return stack_draft_samples(drafted)


def forward_hidden(
    model: Decoder, token_rows: Sequence[Sequence[int]], starts: Sequence[int], cache: Cache, device: torch.device
) -> Float[Tensor, "B T D"]:
    """Append each row's tokens (perhaps none) to the cache; hidden states, rows ending in the last column."""
    if not any(map(len, token_rows)):
        return torch.zeros(len(token_rows), 1, model.config.hidden_size, device=device)
    tokens, positions = pad_left(token_rows)
    tokens = tokens.clamp(max=model.config.vocab_size - 1)  # an id of the target that the draft model does not have
    positions = torch.where(positions < 0, -1, positions + torch.tensor(list(starts))[:, None])
    return model.hidden_states(tokens.to(device), continuation_scope(token_rows, starts, positions.to(device), cache))
