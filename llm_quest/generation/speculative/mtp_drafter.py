"""The drafter that is the model itself: its multi-token prediction modules (`layers/multi_token_prediction.py`). Module
k stands one token further on than module k-1: at position j it reads the output of module k-1 at j-1 and token j, and
predicts token j+1.

      known to the target   a b c            d is drawn, not yet read
      module 1 reads          b c d          predicts e'        from h(a) h(b) h(c), each verified
      module 2 reads            c d e'       predicts f'        e' is a guess: read again when it is known

So each cycle begins with what the target has verified: every module reads the tokens taken since, then the guesses of
the modules before it. Entries made from guesses need not be taken back: nobody sees a later position than its own, and
by then the entry has been written again.

Commonly got wrong: module k has nothing to say of a text's first k + 1 tokens; each module reads
the output of the one before for the token before, so a cycle begins with an output that the last one kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.compiled import compile_for_model, round_up_capacity
from llm_quest.generation.decoding import pad_right
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


class ModuleInput(NamedTuple):
    """The input of a module: tokens (B,T) at their positions, each with the output of the module before it (or the
    input of the target's head) for the token before. The verified ones come first, padded at their end, then one column
    for each draft."""

    h: Float[Tensor, "B T D"]
    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]

    def concatenate(self, more: ModuleInput) -> ModuleInput:
        """Both, padding at the end."""
        h, tokens, positions = (torch.cat(pair, dim=1) for pair in zip(self, more, strict=True))
        order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)
        return ModuleInput(
            h.gather(1, order[..., None].expand_as(h)), tokens.gather(1, order), positions.gather(1, order)
        )

    def pad_to(self, width: int) -> ModuleInput:
        """Pad to so many columns, in new memory (a compiled graph depends on the layout)."""
        batch, length, width_h = self.h.shape
        h, tokens = self.h.new_zeros(batch, width, width_h), self.tokens.new_zeros(batch, width)
        positions = self.positions.new_full((batch, width), -1)
        h[:, :length], tokens[:, :length], positions[:, :length] = self
        return ModuleInput(h, tokens, positions)

    @property
    def last_column(self) -> Int[Tensor, " B"]:
        """The column of each row's last token."""
        return (self.positions >= 0).sum(dim=1).sub(1).clamp(min=0)


class MTPDrafter:
    """Drafts with the model's multi-token prediction modules. compile: all modules as one graph (`run_mtp_chain`),
    which reads at most as many verified tokens as a cycle can bring."""

    context_only = False

    def __init__(self, target_model: Decoder, sampling_params: SamplingParams, *, compile: bool = False):
        if not len(target_model.mtp_modules):
            raise UsageError(
                "this model has no multi-token prediction modules to draft with: take a smaller model or 'ngram', "
                "or train it with modules (techniques: multi_token)"
            )
        self.model = target_model
        self.sampling_params = sampling_params
        self.device = next(target_model.parameters()).device
        self.compiled_chain = compile_for_model(run_mtp_chain, target_model) if compile else None
        self.max_draft_tokens = len(target_model.mtp_modules)
        self.tokens_per_step = self.max_draft_tokens if compile else 1
        own = sum(p.numel() for p in target_model.mtp_modules.parameters()) / self.max_draft_tokens
        own += target_model.head.weight.numel()  # type: ignore[operator, union-attr]
        self.relative_cost = relative_pass_cost(
            own, count_weights(target_model), 1, len(target_model.blocks), compiled=compile
        )

    @torch.inference_mode()
    def prefill(self, windows: Sequence[Sequence[int]], rows_per_window: int, capacity: int) -> None:
        rows = len(windows) * rows_per_window
        slots = capacity + MAX_DRAFT_TOKENS
        slots = round_up_capacity(slots) if self.compiled_chain else slots
        self.caches = [
            Cache([module.block.new_cache(rows, slots, MAX_DRAFT_TOKENS + 1)], rows, slots)  # type: ignore[union-attr, operator]
            for module in self.model.mtp_modules
        ]
        like = self.model.head.weight
        shape = (rows, 1, self.model.config.hidden_size)
        self.previous_outputs: list[Tensor] = [like.new_zeros(shape) for _ in self.caches]  # type: ignore[operator]
        self.unread_inputs: list[ModuleInput] = []

    def update(self, hidden: Float[Tensor, "B T D"], texts: Sequence[Sequence[int]], num_taken: Sequence[int]) -> None:
        """Keep the hidden states of the tokens that were accepted, for the next draft."""
        length = max(num_taken)
        if not length:
            return
        starts = [len(text) - count for text, count in zip(texts, num_taken, strict=True)]
        fed = [text[start:] for text, start in zip(texts, starts, strict=True)]
        self.unread_inputs.append(ModuleInput(hidden[:, :length], *pad_right(fed, starts, length, self.device)))

    def merge_unread(self) -> ModuleInput:
        """All that was verified since the last draft."""
        first, *others = self.unread_inputs
        for more in others:
            first = first.concatenate(more)
        return first

    @torch.inference_mode()
    def propose(self, request: DraftRequest, should_continue: ShouldContinue) -> DraftTokens:
        buffer = DraftBuffer(request)
        if not self.unread_inputs:
            return buffer.to_drafts()
        module_input = self.merge_unread()
        self.unread_inputs = []
        wanted = [want if len(text) > 1 else 0 for want, text in zip(request.wanted, request.texts, strict=True)]
        ends = torch.tensor([len(text) for text in request.texts], device=self.device)[:, None]
        if self.compiled_chain and module_input.tokens.shape[1] <= self.max_draft_tokens + 1:
            num_wanted = torch.tensor(wanted, device=self.device)[:, None]
            uniforms = request.uniforms[:, : self.max_draft_tokens].clone()
            tokens, sure, q, self.previous_outputs = self.compiled_chain(
                self.model,
                module_input.pad_to(self.max_draft_tokens + 1),
                (ends, num_wanted),
                self.previous_outputs,
                self.caches,
                self.sampling_params,
                uniforms,
                buffer.seen,
            )
            buffer.append(tokens, sure, q, wanted)
            return buffer.to_drafts()
        at, verified = module_input.last_column, module_input.tokens.shape[1]
        for k, cache in enumerate(self.caches):
            out = run_mtp_module(self.model, k, module_input, cache)
            guess = torch.zeros_like(module_input.tokens[:, 0])
            if k and max(wanted) > k and not should_continue(buffer.confidence):
                wanted = [min(want, k) for want in wanted]
            if max(wanted) > k:
                logits = self.model.head(last_hidden(out, at, k))
                guess, sure, q = sample_draft(self.sampling_params, logits, request.uniforms[:, k], buffer.seen)
                buffer.append(guess[:, None], sure[:, None], None if q is None else q[:, None], wanted)
            guessing = torch.tensor([want > k for want in wanted], device=self.device)[:, None]
            place = torch.where(guessing, ends + k, -1)
            module_input, self.previous_outputs[k] = next_module_input(
                module_input, out, at, verified, self.previous_outputs[k], guess, place
            )
        return buffer.to_drafts()

    def keep_rows(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.batch_select_indices(rows)
        self.previous_outputs = [before[rows] for before in self.previous_outputs]
        self.unread_inputs = [ModuleInput(*(part[rows] for part in each)) for each in self.unread_inputs]


def run_mtp_module(model: Decoder, k: int, module_input: ModuleInput, cache: Cache) -> Float[Tensor, "B T D"]:
    """Run module k (from 0); it has no proposal for the first k+1 tokens of a text."""
    scope = Scope(torch.where(module_input.positions > k, module_input.positions, -1), cache=cache).for_layer(0)
    return model.mtp_modules[k](module_input.h, model.embed(module_input.tokens, scope), scope)


def last_hidden(out: Float[Tensor, "B T D"], at: Int[Tensor, " B"], k: int) -> Float[Tensor, "B D"]:
    """The output of module k for the last token: the last verified one, or the draft after it."""
    return (gather_column(out, at) if k == 0 else out[:, -1:])[:, 0]


def next_module_input(
    module_input: ModuleInput,
    out: Float[Tensor, "B T D"],
    at: Int[Tensor, " B"],
    verified: int,
    before: Float[Tensor, "B 1 D"],
    guess: Int[Tensor, " B"],
    place: Int[Tensor, "B 1"],
) -> tuple[ModuleInput, Float[Tensor, "B 1 D"]]:
    """The input of the next module: the same tokens and the draft, each with this module's output one token before; and
    the part of that output with which the next cycle begins."""
    after = gather_column(out, at)
    h = torch.cat((before, out[:, : verified - 1], after, out[:, verified:]), dim=1)
    tokens = torch.cat((module_input.tokens, guess[:, None]), dim=1)
    positions = torch.cat((module_input.positions, place), dim=1)
    nothing_read = (module_input.positions[:, :1] < 0)[:, :, None]
    return ModuleInput(h, tokens, positions), torch.where(nothing_read, before, after)


def run_mtp_chain(
    model: Decoder,
    module_input: ModuleInput,
    lengths_and_wanted: tuple[Int[Tensor, "B 1"], Int[Tensor, "B 1"]],
    before: list[Tensor],
    caches: list[Cache],
    sampling: SamplingParams,
    uniforms: Float[Tensor, "B m"],
    seen: Bool[Tensor, "B V"] | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """All modules as one graph: drafts (B,m), the confidence of each (B,m), the distributions they were drawn from
    (B,m,V), and what the next cycle begins with. lengths_and_wanted: each text's length, and how many drafts it wants.
    """
    at, verified = module_input.last_column, module_input.tokens.shape[1]
    ends, wanted = lengths_and_wanted
    drafted, kept = [], []
    for k, cache in enumerate(caches):
        out = run_mtp_module(model, k, module_input, cache)
        drafted.append(new := sample_draft(sampling, model.head(last_hidden(out, at, k)), uniforms[:, k], seen))
        seen = None if seen is None else seen.scatter(1, new.tokens[:, None], True)
        place = torch.where(wanted > k, ends + k, -1)
        module_input, after = next_module_input(module_input, out, at, verified, before[k], new.tokens, place)
        kept.append(after)
    return *stack_draft_samples(drafted), kept


def gather_column(x: Float[Tensor, "B T D"], at: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
    """One column of each row."""
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[2]))
