"""What happened inside a model while it wrote a text. A finished text is read once more, in one pass without a cache,
and hooks keep what the views show; the passes that serve requests are not touched.

    tokens      of each token: its probability, surprise, rank, and the alternatives after each step of sampling
    attention   the weights of one layer and head (T,T)
    lens        what the head says of the residual stream behind each layer (logit lens, nostalgebraist 2020)
    routing     the experts of each token and their weights, layer by layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import NEG_INF, SamplingParams, token_presence_mask
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.layers.moe import RouterOutput
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.serve.requests import Grammar
from llm_quest.techniques.attention_taps import RECORD_NAME, AttentionTap
from llm_quest.techniques.model_spec import Attention

MAX_TOKENS = 2048
"""The longest text that is read again: an attention matrix has its square of numbers."""
POSITIONS_PER_BLOCK = 64
"""For so many positions the logits are in memory at a time."""


@dataclass(frozen=True)
class WrittenText:
    """A finished text and how it was sampled. prompt_length: the tokens before it. copy: which choice of its request it
    is; choice: of the whole answer."""

    id: str
    choice: int
    token_ids: tuple[int, ...]
    prompt_length: int
    sampling_params: SamplingParams
    stopping_criteria: StoppingCriteria
    make_grammar: Callable[[], Grammar] | None = None
    seed: int = 0
    copy: int = 0


@dataclass(frozen=True)
class Alternative:
    """A token, and its probability after each step of sampling."""

    token: int
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class TokenView:
    """How a token was drawn. logprob: of the model itself; surprise: -log2 of its probability; entropy: of the model's
    distribution, in bits; rank: 1 for the most probable. steps: names of `Alternative.probabilities`."""

    token: int
    logprob: float
    surprise: float
    entropy: float
    rank: int
    steps: tuple[str, ...]
    alternatives: tuple[Alternative, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class TextInside:
    """The views of one text. UsageError for one that is too long."""

    def __init__(self, model: Decoder, text: WrittenText):
        if len(text.token_ids) > MAX_TOKENS:
            raise UsageError(f"the text has {len(text.token_ids)} tokens; at most {MAX_TOKENS} are shown")
        self.model, self.text = model, text
        self.device = next(model.parameters()).device
        self.ids = torch.tensor([text.token_ids], device=self.device)

    @torch.inference_mode()
    def tokens(self, count: int) -> list[TokenView]:
        """How each token of the text was drawn, with the `count` most probable ones beside it."""
        hidden, start = self.model.hidden_states(self.ids, self.scope())[0], self.text.prompt_length
        grammar = self.text.make_grammar() if self.text.make_grammar else None
        views = []
        for place in range(start, len(self.text.token_ids), POSITIONS_PER_BLOCK):
            end = min(place + POSITIONS_PER_BLOCK, len(self.text.token_ids))
            logits = self.model.head(hidden[None, place - 1 : end - 1])[0].float()
            views += [self.view_token(at, row, count, grammar) for at, row in enumerate(logits, place)]
        return views

    def view_token(self, place: int, logits: Float[Tensor, " V"], count: int, grammar: Grammar | None) -> TokenView:
        token, own = self.text.token_ids[place], logits.log_softmax(dim=-1)
        steps = list(self.sampling_steps(place, logits[None], grammar))
        if grammar is not None:
            grammar.consume(token)
        names = own.topk(min(count, len(own))).indices.tolist()
        names += [] if token in names else [token]
        table = torch.stack([probabilities for _, probabilities in steps])[:, names].T.tolist()
        logprob = float(own[token])
        return TokenView(
            token=token,
            logprob=logprob,
            surprise=-logprob / math.log(2),
            entropy=float(-(own.exp() * own.clamp(min=torch.finfo(own.dtype).min)).sum()) / math.log(2),
            rank=int((own > own[token]).sum()) + 1,
            steps=tuple(name for name, _ in steps),
            alternatives=tuple(Alternative(name, tuple(row)) for name, row in zip(names, table, strict=True)),
        )

    def sampling_steps(
        self, place: int, logits: Float[Tensor, "1 V"], grammar: Grammar | None
    ) -> Iterator[tuple[str, Float[Tensor, " V"]]]:
        """The distribution after each step of sampling that is in use; the last one was drawn from."""
        yield "model", logits[0].softmax(dim=-1)
        changed, in_use = self.penalize(place, logits, grammar)
        if in_use:
            yield "penalties", changed[0].softmax(dim=-1)
        for name, step in filter_steps(self.text.sampling_params):
            yield name, step.log_probs(changed)[0].exp()

    def penalize(
        self, place: int, logits: Float[Tensor, "1 V"], grammar: Grammar | None
    ) -> tuple[Float[Tensor, "1 V"], bool]:
        """The logits after bias, penalties and schema, and whether any of them is in use."""
        params, past = self.text.sampling_params, self.text.token_ids[:place]
        processor = LogitsProcessor(params, self.text.stopping_criteria, logits.shape[-1], self.device)
        offsets = processor.to_tensor([processor.row_offsets(past, self.text.prompt_length)])
        if grammar is not None:
            offsets = offsets.masked_fill(~grammar.token_mask().to(self.device), NEG_INF)
        seen = token_presence_mask([past], logits.shape[-1], self.device) if params.repetition_penalty != 1 else None
        in_use = seen is not None or processor.bias is not None or processor.reads_history or grammar is not None
        return params.apply_penalties(processor.add_bias(logits), seen, offsets), in_use

    @torch.inference_mode()
    def attention(self, layer: int, head: int) -> Float[Tensor, "T T"]:
        """The attention weights of a head: row t is where token t looks. UsageError for a layer without attention."""
        mixer = find_attention(self.model, layer)
        records: dict[str, list[Any]] = {}
        with hook(mixer.attend, AttentionTap(layer)):
            self.model.hidden_states(self.ids, self.scope(records))
        weights = records[RECORD_NAME][0].weights[0]
        if not 0 <= head < len(weights):
            raise UsageError(f"there is no head {head}: layer {layer} has heads 0 to {len(weights) - 1}")
        return weights[head].float()

    @torch.inference_mode()
    def lens(self, count: int) -> list[list[list[tuple[int, float]]]]:
        """For each layer and each token of the text, the `count` most probable tokens that the head reads from the
        residual stream behind that layer, with their probabilities. The last layer is the model's own answer."""
        streams: list[Tensor] = []
        with hook(self.model.blocks, lambda block, inputs, output: streams.append(output)):
            self.model.hidden_states(self.ids, self.scope())
        return [self.read_stream(stream, count) for stream in streams]

    def read_stream(self, stream: Tensor, count: int) -> list[list[tuple[int, float]]]:
        hidden, outputs = self.model.norm(self.model.leave(stream))[0], []
        for place in range(self.text.prompt_length - 1, len(self.text.token_ids) - 1, POSITIONS_PER_BLOCK):
            end = min(place + POSITIONS_PER_BLOCK, len(self.text.token_ids) - 1)
            top = self.model.head(hidden[None, place:end])[0].float().softmax(dim=-1).topk(count)
            rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            outputs += [list(zip(ids, values, strict=True)) for ids, values in rows]
        return outputs

    @torch.inference_mode()
    def routing(self) -> list[list[list[tuple[int, float]]]]:
        """For each layer and each token, prompt included, the chosen experts with their weights. A layer without
        experts has an empty list, and so has a model without any."""
        records: dict[str, list[Any]] = {}
        self.model.hidden_states(self.ids, self.scope(records))
        outputs: dict[nn.Module, RouterOutput] = {one.router: one for one in records.get("routing", [])}
        if not outputs:
            return []
        layers = ([outputs[part] for part in block.modules() if part in outputs] for block in self.model.blocks)
        return [[row for one in layer_routing for row in expert_weights(one)] for layer_routing in layers]

    def scope(self, records: dict[str, list[Any]] | None = None) -> Scope:
        return Scope.unpadded(self.ids, records=records)


def expert_weights(routing: RouterOutput) -> list[list[tuple[int, float]]]:
    """The chosen experts of each token with their weights."""
    pairs = zip(routing.topk_ids.tolist(), routing.topk_weights.tolist(), strict=True)
    return [list(zip(ids, weights, strict=True)) for ids, weights in pairs]


def filter_steps(params: SamplingParams) -> Iterator[tuple[str, SamplingParams]]:
    """The sampling parameters up to each filter that is in use."""
    if params.is_greedy:
        yield "greedy", params
        return
    step = replace(params, top_k=None, top_p=None, min_p=None)
    if params.temperature != 1:
        yield "temperature", step
    for name in ("top_k", "top_p", "min_p"):
        if (value := getattr(params, name)) is not None:
            step = replace(step, **{name: value})
            yield name, step


def find_attention(model: Decoder, layer: int) -> Any:
    """The attention of a layer. UsageError where it has none."""
    if not 0 <= layer < len(model.blocks):
        raise UsageError(f"there is no layer {layer}: this model has layers 0 to {len(model.blocks) - 1}")
    mixer = next((module for module in model.blocks[layer].modules() if isinstance(module, Attention)), None)
    if mixer is None:
        raise UsageError(f"layer {layer} has no attention weights")
    return mixer


def attention_heads(model: Decoder) -> list[int]:
    """How many heads each layer's attention has; 0 for a layer without attention weights."""
    heads = []
    for block in model.blocks:
        mixer = next((module for module in block.modules() if isinstance(module, Attention)), None)
        heads.append(0 if mixer is None else int(model.config.num_attention_heads))
    return heads


@contextmanager
def hook(modules: nn.Module, function: Any) -> Iterator[None]:
    """A forward hook on a module, or on each of a list, inside the block."""
    hooked: Sequence[nn.Module] = list(modules) if isinstance(modules, nn.ModuleList) else [modules]
    handles = [module.register_forward_hook(function) for module in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
