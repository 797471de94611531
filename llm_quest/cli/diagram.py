"""Draws a model as text: the residual stream runs down the left side; sublayers branch off and are added back.

┣━▶ norm   RMSNorm 48             the sublayer reads the stream through a norm,
┃   feed_forward GatedMLP         computes,
⊕◀━        96 → down 48           and is added to the stream
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.axial_rotary import AxialRotary, MultimodalRotary
from llm_quest.layers.block import Residual, Sublayer
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.multi_token_prediction import MTPModule
from llm_quest.layers.rotary import NoRotary
from llm_quest.layers.vision import ImageEmbedding
from llm_quest.models.decoder import Decoder
from llm_quest.models.dual_encoder import CLIPModel, TextEncoder
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.multimodal import VisionLanguageModel


def draw_model(model: Decoder | ImageEncoder | TextEncoder | CLIPModel | VisionLanguageModel) -> list[str]:
    """The model from top to bottom. A sublayer leaves the residual stream at ┣ and is added to it at ⊕. Equal blocks
    are drawn once."""
    if isinstance(model, VisionLanguageModel):
        return draw_vision_language(model)
    if isinstance(model, CLIPModel):
        end = ["", "  logits (M,N): exp(logit_scale) times the cosine of every image and text"]
        return [*draw_model(model.image_encoder), "", *draw_model(model.text_encoder), *end]
    if isinstance(model, ImageEncoder):
        output = "image_embeds (B,P)" if getattr(model.config, "projection_dim", 0) else "logits (B,V)"
        return [*draw_encoder(model, len(model.blocks)), *draw_end(model, "class", output)]
    drawn = ["  tokens (B,T)", "  │", f"  ├── embed  {describe_layer(model.embed)}", "  │", *draw_blocks(model.blocks)]
    if isinstance(model, TextEncoder):
        return [*drawn, *draw_end(model, "end", "text_embeds (B,P)")]
    tied = model.embed.token.weight is model.head.weight  # type: ignore[union-attr]
    head = f"{type(model.head).__name__} {model.head.in_features:,} → {model.head.out_features:,}"
    head += ", tied to the embedding" if tied else ", not tied"
    drawn += [f"  ├── norm   {describe_layer(model.norm)}", "  │", f"  ├── head   {head}", "  │", "  logits (B,T,V)"]
    return [*drawn, *multi_token_modules(model.mtp_modules)]


def draw_end(model: Any, token: str, output: str) -> list[str]:
    """The final norm and the head of an encoder, which reads one token."""
    norm = [f"  ├── norm   {describe_layer(model.norm)}", "  │"]
    if isinstance(model.head, nn.Identity):
        return [*norm, f"  the {token} token's vector (B,D)"]
    return [*norm, f"  ├── head   {describe_layer(model.head)}", "  │", f"  {output}"]


def multi_token_modules(modules: Iterable[nn.Module]) -> list[str]:
    """The multi-token prediction modules in order, equal ones drawn once. Each takes the hidden states of the one
    before it (the first: of the model) and the embedding of a later token; the model's head is applied to its
    output."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, module in enumerate(modules, 1):
        assert isinstance(module, MTPModule), "all multi-token modules have one class"
        embed_norm, hidden_norm = describe_layer(module.embed_norm), describe_layer(module.hidden_norm)
        norms = f"{embed_norm} of the embedding, {hidden_norm} of the hidden state"
        lines = (
            f"  ├── norm   {norms}",
            f"  ├── join   {module.join.in_features:,} → {module.join.out_features:,}",
            "  │",
            "  ┢━ block ━━━",
            *(f"  {line}" for line in draw_block(module.block)),
            "  ┡━━━",
            "  │",
            f"  ├── norm   {describe_layer(module.norm)}",
            "  │",
            "  the same head: logits (B,T,V) of a later token",
        )
        kinds.setdefault(lines, []).append(number)
    drawn = []
    for lines, numbers in kinds.items():
        name = describe_layer_range(numbers).replace("block", "multi-token module", 1)
        drawn += ["", f"  {name}: the hidden state before the head and the embedding of a later token", "  │", *lines]
    return drawn


def draw_vision_language(model: VisionLanguageModel) -> list[str]:
    """The image encoder, the projector and the decoder."""
    blocks: Any = model.get_submodule("tower.blocks")
    read = [layer for layer in range(len(blocks)) if f"tower.blocks.{layer}" not in model.unused]
    seen = draw_encoder(model.tower, len(read))  # type: ignore[arg-type]
    described = f"  ├── adapter  {type(model.adapter).__name__}"
    inside = [f"  │          {line}" for line in describe_projections(model.adapter)]
    end = [f"  {nominal_image_tokens(model.config)} vectors, in place of as many placeholder tokens", ""]
    return [*seen, described, *inside, "  │", *end, *draw_model(model.decoder)]


def nominal_image_tokens(config: Any) -> int:
    """The vectors of a square image of the size that the encoder was made for."""
    side = config.vision_config.image_size
    return int(config.num_image_tokens(side, side))


def draw_encoder(model: ImageEncoder, depth: int) -> list[str]:
    """An image encoder up to its block number `depth`."""
    drawn = ["  images (B,C,H,W)", "  │", f"  ├── embed  {describe_layer(model.embed)}"]
    if not isinstance(model.enter, nn.Identity):
        drawn += ["  │", f"  ├── enter  {describe_layer(model.enter)}"]
    return [*drawn, "  │", *draw_blocks(model.blocks[:depth])]


def draw_blocks(blocks: Iterable[nn.Module]) -> list[str]:
    """Blocks in order, equal ones drawn once."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer, block in enumerate(blocks):
        kinds.setdefault(tuple(draw_block(block)), []).append(layer)
    drawn = []
    for lines, layers in kinds.items():
        drawn += [f"  ┢━ {describe_layer_range(layers)} ━━━", *(f"  {line}" for line in lines), "  ┡━━━", "  │"]
    return drawn


def describe_layer_range(layers: Sequence[int]) -> str:
    """block 3; blocks 0 to 15, 16 alike; blocks 0 to 4, 6 to 10, 12 to 16, ..., 22 alike"""
    if len(layers) == 1:
        return f"block {layers[0]}"
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    described = [f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
    return f"blocks {', '.join(described[:4])}{', ...' if len(described) > 4 else ''}, {len(layers)} alike"


def draw_block(block: nn.Module) -> list[str]:
    """The sublayers of a block in order: norm, layer, and how it is added to the stream."""
    lines = []
    for name, branch in block.named_children():
        assert isinstance(branch, Sublayer), "a block consists of sublayers"
        norm, post_norm = (
            [] if isinstance(one, nn.Identity) else [f"norm   {describe_layer(one)}"]
            for one in (branch.norm, branch.post_norm)
        )
        inside = [*norm, f"{name:<6} {describe_layer(branch.layer)}"]
        inside += [f"       {line}" for line in describe_projections(branch.layer)] + post_norm
        kind = "" if isinstance(branch.residual, Residual) else f"   by {type(branch.residual).__name__}"
        lines += ["┃", f"┣━▶ {inside[0]}", *(f"┃   {line}" for line in inside[1:-1]), f"⊕◀━ {inside[-1]}{kind}"]
    return [*lines, "┃"]


def describe_layer(layer: nn.Module) -> str:
    """A layer in one line: its class and its sizes."""
    kind = type(layer).__name__
    if isinstance(layer, GroupedQueryAttention):
        shared = (
            f"{layer.num_attention_heads} query heads share {layer.num_key_value_heads} key/value heads"
            if layer.num_key_value_heads < layer.num_attention_heads
            else f"{layer.num_attention_heads} heads"
        )
        window = "" if layer.sliding_window is None else f", sliding window {layer.sliding_window:,}"
        return f"{kind}: {shared} of {layer.head_dim}{window}"
    if isinstance(layer, ImageEmbedding):
        side, pixels = layer.patches.patch_size, f"{layer.patches.in_features:,} → {layer.patches.out_features:,}"
        return (
            f"{kind}: patches of {side} × {side} pixels, {pixels}; one more token; {len(layer.positions):,} positions"
        )
    own = (
        layer.named_children() if any(isinstance(table, nn.Embedding) for table in layer.children()) else [("", layer)]
    )
    submodules = [
        (name, describe_shape(inner)) for name, inner in own if not isinstance(inner, nn.Identity | nn.Dropout)
    ]
    return f"{kind} {' and '.join(f'{name} {shape}'.strip() for name, shape in submodules)}".strip()


def describe_shape(layer: nn.Module) -> str:
    """The shape of a layer's weight: 128,256 × 2,048, or 768 with bias."""
    own = dict(layer.named_parameters(recurse=False))
    matrix = " × ".join(f"{n:,}" for n in own["weight"].shape) if "weight" in own else ""
    return matrix + (" with bias" if "bias" in own else "")


def describe_projections(layer: nn.Module) -> list[str]:
    """The linear layers inside a layer, in order, and the rotary embedding of queries and keys."""
    lines = []
    for name, inner in layer.named_modules():
        own = isinstance(inner, nn.Linear) and inner.bias is not None
        if isinstance(inner, PackedLinear):
            parts = " + ".join(f"{part} {rows:,}" for part, rows in inner.parts.items())
            lines.append(f"{inner.in_features:,} → {parts}{', with biases' if own else ''}")
        elif isinstance(inner, nn.Linear):
            lines.append(f"{inner.in_features:,} → {name} {inner.out_features:,}{', with bias' if own else ''}")
        else:
            matrices = [(key, weight) for key, weight in inner.named_parameters(recurse=False) if weight.ndim > 1]
            lines += [f"{name} {key} {' × '.join(f'{n:,}' for n in weight.shape)}".lstrip() for key, weight in matrices]
    if isinstance(layer, GroupedQueryAttention):
        rotary = (
            "without rotary positions"
            if isinstance(layer.rotary, NoRotary)
            else f"with rotary positions, {describe_rotary(layer.rotary)}"
        )
        lines.insert(1, f"q and k {rotary}")
    return lines


def describe_rotary(rotary: Any) -> str:
    """base 500,000, Llama3 x32"""
    if isinstance(rotary, MultimodalRotary):
        return f"{describe_rotary(rotary.base)}, of time, row and column"
    if isinstance(rotary, AxialRotary):
        return f"base {rotary.rope_theta:,.0f}, of row and column"
    scaling = rotary.scaling
    stretched = "" if scaling is None else f", {type(scaling).__name__} x{scaling.factor:g}"
    return f"base {rotary.rope_theta:,.0f}{stretched}"
