"""Our parameters as GGUF tensors, and back: names, order of rows, and changes of the numbers.

      ours                              in the file
      blocks.0.mixer.layer.qkv.weight   blk.0.attn_q.weight, attn_k, ...  rows of q, k in pairs (2i, 2i+1)
      blocks.0.mixer.norm.weight        blk.0.attn_norm.weight            + 1 where the norm scales by 1 + weight
      ...feed_forward.layer.experts.down   blk.0.ffn_down_exps.weight     (E,D,F)
      ...mixer.layer.kv_up.weight       blk.0.attn_k_b.weight, attn_v_b   (H,r,nope), (H,v,r)

Each place is a view of our parameter (`hub/weight_map.py`), so that one description serves both directions. A tensor of
several views (Qwen3-Next's attn_qkv) is these, one behind the other by rows.

Commonly got wrong: with the rows of q and k in the wrong order a model still writes fluent text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from llm_quest.hub.gguf_layouts import NEOX, NORM, Layout
from llm_quest.hub.weight_map import View, WeightView, packed_row_sizes, row_view
from llm_quest.layers.block import SingleBlock
from llm_quest.layers.delta_net import FlatProjection, GatedDeltaNet
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.moe import SigmoidRouter
from llm_quest.layers.norm import PerHeadLayerNorm, ZeroCenteredRMSNorm

PLUS_ONE, NEGATIVE_EXP = "plus one", "negative exp"
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    PLUS_ONE: (lambda x: x + 1, lambda x: x - 1),
    NEGATIVE_EXP: (lambda x: -x.exp(), lambda x: (-x).log()),
}
"""Changes of numbers, when they are written and when they are read."""


class Place(NamedTuple):
    """The view of our model that holds a tensor, or some of its rows. change: a key of CHANGES; empty: as they are."""

    view: WeightView
    change: str = ""


Places = dict[str, list[Place]]

OUTSIDE = {
    "embed.token": "token_embd",
    "embed.position": "position_embd",
    "norm": "output_norm",
    "head": "output",
}
MODULES = {
    "mixer.norm": "attn_norm",
    "mixer.post_norm": "post_attention_norm",
    "mixer.layer.out": "attn_output",
    "mixer.layer.q_norm": "attn_q_norm",
    "mixer.layer.k_norm": "attn_k_norm",
    "mixer.layer.attend.sink": "attn_sinks",
    "feed_forward.norm": "ffn_norm",
    "feed_forward.post_norm": "post_ffw_norm",
    "feed_forward.layer.up": "ffn_up",
    "feed_forward.layer.down": "ffn_down",
    "feed_forward.layer.router": "ffn_gate_inp",
    "feed_forward.layer.experts.down": "ffn_down_exps",
    "feed_forward.layer.shared.down": "ffn_down_shexp",
    "feed_forward.layer.shared_gate": "ffn_gate_inp_shexp",
}
SPLIT = {
    "mixer.layer.qkv": ("attn_q", "attn_k", "attn_v"),
    "feed_forward.layer.gate_up": ("ffn_gate", "ffn_up"),
    "feed_forward.layer.shared.gate_up": ("ffn_gate_shexp", "ffn_up_shexp"),
    "feed_forward.layer.experts.gate_up": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Parameters whose rows are several tensors of a file."""
LATENT = {
    "q_down": "attn_q_a", "q_norm": "attn_q_a_norm", "q_up": "attn_q_b", "kv_down": "attn_kv_a_mqa",
    "kv_norm": "attn_kv_a_norm", "out": "attn_output",
}  # fmt: skip
PARALLEL = (
    ("sublayer.layer.mixer_norm.", "mixer.norm."),
    ("sublayer.layer.feed_forward_norm.", "feed_forward.norm."),
    ("sublayer.layer.mixer.", "mixer.layer."),
    ("sublayer.layer.feed_forward.", "feed_forward.layer."),
    ("sublayer.norm.", "mixer.norm."),
)
"""Modules of parallel layers, and the same of layers in sequence."""
ALWAYS_FLOAT32 = re.compile(r"(.*norm|.*\.(ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d)|position_embd|rope_.*)\.weight")
"""Matrices that llama.cpp wants in float32."""


def gguf_places(model: Any, layout: Layout) -> Places:
    """Name in the file -> its places in this model, in the model's order."""
    sizes = packed_row_sizes(model)
    places: Places = {}
    for path, parameter in model.named_parameters():
        if not path.startswith("mtp_modules."):
            for name, place in parameter_places(model, layout, path, parameter, sizes.get(path, ())):
                places.setdefault(name, []).append(place)
    return places


def parameter_places(
    model: Any, layout: Layout, path: str, parameter: Tensor, sizes: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
    """The tensors of one parameter."""
    change = PLUS_ONE if isinstance(owner(model, path), ZeroCenteredRMSNorm) else ""
    if not path.startswith("blocks."):
        module, kind = split_kind(path.replace("norm.base.", "norm."))
        yield f"{OUTSIDE[module]}.{kind}", Place(WeightView(path, identity), change)
        return
    _, layer, inner = path.split(".", 2)
    prefix = f"blk.{layer}."
    mixer = mixer_of(model.blocks[int(layer)])
    short = short_path(inner)
    if isinstance(mixer, GatedDeltaNet) and short.startswith("mixer.layer."):
        places = delta_places(mixer, path, short.removeprefix("mixer.layer."))
    elif isinstance(mixer, MultiHeadLatentAttention) and short.startswith("mixer.layer."):
        places = latent_places(mixer, path, short.removeprefix("mixer.layer."))
    else:
        places = usual_places(layout, mixer, path, short, parameter, sizes)
    for name, place in places:
        kind = "exp_probs_b.bias" if isinstance(owner(model, path), SigmoidRouter) and path.endswith("bias") else name
        yield prefix + kind, place._replace(change=change or place.change)


def usual_places(
    layout: Layout, mixer: Any, path: str, short: str, parameter: Tensor, sizes: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
    """The tensors of attention and feed-forward layers."""
    module, kind = split_kind(short)
    whole = layout.names.get(module) or MODULES.get(module)
    if whole is not None:
        heads = isinstance(getattr(mixer, module.rpartition(".")[2], None), PerHeadLayerNorm)
        view = head_rows(mixer.head_dim) if heads else identity
        yield f"{whole}.{kind}", Place(WeightView(path, view))
        return
    experts = ".experts." in module
    sizes = (parameter.shape[1] // 2,) * 2 if experts else sizes
    start = 0
    for name, size in zip(SPLIT[module], sizes, strict=True):
        view, merged = (expert_rows(start, size), None) if experts else (row_view(start, size), None)
        if name in ("attn_q", "attn_k") and layout.rope:
            view, merged = rotation_order(view, layout, mixer, size)
        yield f"{name}.{kind}", Place(WeightView(path, view, merged))
        start += size


def rotation_order(view: View, layout: Layout, mixer: Any, rows: int) -> tuple[View, tuple[int, int] | None]:
    """The rows of q or k in the order in which llama.cpp rotates them."""
    rotary = getattr(mixer, "rotary", None)
    is_interleaved = bool(getattr(rotary, "interleaved", False))
    if layout.rope == (NORM if is_interleaved else NEOX):
        return view, None
    assert layout.rope == NORM, "no family of halves is stored in pairs"
    heads = rows // mixer.head_dim
    return (lambda parameter: view(parameter).unflatten(0, (heads, 2, -1)).transpose(1, 2)), (0, 2)


def latent_places(mixer: Any, path: str, inner: str) -> Iterator[tuple[str, Place]]:
    """The tensors of multi-head latent attention."""
    module, kind = split_kind(inner)
    heads, nope = mixer.num_attention_heads, mixer.qk_nope_head_dim
    if module == "kv_up":
        yield "attn_k_b.weight", Place(WeightView(path, lambda p: p.unflatten(0, (heads, -1))[:, :nope].mT))
        yield "attn_v_b.weight", Place(WeightView(path, lambda p: p.unflatten(0, (heads, -1))[:, nope:]))
        return
    direct = module == "q_up" and isinstance(mixer.q_down, nn.Identity)
    yield f"{'attn_q' if direct else LATENT[module]}.{kind}", Place(WeightView(path, identity))


def delta_places(mixer: GatedDeltaNet, path: str, inner: str) -> Iterator[tuple[str, Place]]:
    """The tensors of a Gated DeltaNet. Qwen3.5's value heads are stored by their number within a key head first."""
    key, value = mixer.num_k_heads * mixer.head_k_dim, mixer.num_v_heads * mixer.head_v_dim
    if isinstance(mixer.inputs, FlatProjection):
        yield from flat_delta_places(mixer, path, inner, key, value)
    elif inner == "inputs.qkvz.weight":
        starts = (0, mixer.head_k_dim, 2 * mixer.head_k_dim, 2 * mixer.head_k_dim + value // mixer.num_k_heads)
        for name, start, end in zip(("attn_qkv",) * 3 + ("attn_gate",), starts, (*starts[1:], None), strict=True):
            yield f"{name}.weight", Place(WeightView(path, key_head_rows(mixer.num_k_heads, start, end), (0, 1)))
    else:
        names = {"inputs.ba.weight": "ssm_ba.weight", "out.weight": "ssm_out.weight"} | DELTA_VECTORS
        view = squeeze_channel if inner == "conv" else identity
        yield names[inner], Place(WeightView(path, view), NEGATIVE_EXP if inner == "A_log" else "")


DELTA_VECTORS = {
    "conv": "ssm_conv1d.weight", "A_log": "ssm_a", "dt_bias": "ssm_dt.bias", "norm.weight": "ssm_norm.weight",
}  # fmt: skip


def flat_delta_places(mixer: GatedDeltaNet, path: str, inner: str, key: int, value: int) -> Iterator[tuple[str, Place]]:
    groups = (mixer.num_k_heads, mixer.num_v_heads // mixer.num_k_heads)

    def tiled(start: int, count: int, width: int, dim: int = 0) -> WeightView:
        def view(parameter: Tensor) -> Tensor:
            parts = parameter.narrow(dim, start, count).unflatten(dim, (*groups, width))
            return parts.transpose(dim, dim + 1)

        return WeightView(path, view, (dim, dim + 2))

    if inner in ("inputs.qkvz.weight", "conv"):
        name = "attn_qkv.weight" if inner != "conv" else DELTA_VECTORS["conv"]
        yield name, Place(WeightView(path, lambda p: squeeze_channel(p).narrow(0, 0, 2 * key)))
        part = tiled(2 * key, value, mixer.head_v_dim)
        yield name, Place(WeightView(path, lambda p: part.view(squeeze_channel(p)), part.merged))
        if inner != "conv":
            yield "attn_gate.weight", Place(tiled(2 * key + value, value, mixer.head_v_dim))
    elif inner == "inputs.ba.weight":
        yield "ssm_beta.weight", Place(tiled(0, mixer.num_v_heads, 1))
        yield "ssm_alpha.weight", Place(tiled(mixer.num_v_heads, mixer.num_v_heads, 1))
    elif inner == "out.weight":
        yield "ssm_out.weight", Place(tiled(0, value, mixer.head_v_dim, dim=1))
    elif inner == "norm.weight":
        yield DELTA_VECTORS[inner], Place(WeightView(path, identity))
    else:
        yield DELTA_VECTORS[inner], Place(tiled(0, mixer.num_v_heads, 1), NEGATIVE_EXP if inner == "A_log" else "")


def identity(parameter: Tensor) -> Tensor:
    return parameter


def squeeze_channel(parameter: Tensor) -> Tensor:
    """A convolution (C,1,K) as (C,K); anything else as it is."""
    return parameter[:, 0] if parameter.dim() == 3 else parameter


def head_rows(width: int) -> View:
    return lambda parameter: parameter.unflatten(0, (-1, width))


def expert_rows(start: int, size: int) -> View:
    """Some rows of every expert."""
    return lambda parameter: parameter.narrow(1, start, size)


def key_head_rows(heads: int, start: int, end: int | None) -> View:
    """Rows start to end of every key head."""
    return lambda parameter: parameter.unflatten(0, (heads, -1))[:, start:end]


def short_path(inner: str) -> str:
    """A parameter's path within its block, the same for layers in sequence and in parallel; norms of queries and keys
    without their wrappers; experts as modules."""
    for parallel, usual in PARALLEL:
        if inner.startswith(parallel):
            inner = usual + inner.removeprefix(parallel)
            break
    inner = re.sub(r"((?:q|k)_norm)\.(?:0\.)?norm\.", r"\1.", inner)
    inner = re.sub(r"(experts\.(?:gate_up|down))_bias$", r"\1.bias", inner)
    return re.sub(r"(experts\.(?:gate_up|down)|attend\.sink)$", r"\1.weight", inner)


def split_kind(path: str) -> tuple[str, str]:
    module, _, kind = path.rpartition(".")
    return module, kind


def owner(model: nn.Module, path: str) -> nn.Module:
    """The module that has a parameter."""
    return model.get_submodule(path.rpartition(".")[0])


def mixer_of(block: Any) -> Any:
    """The mixer (attention or recurrence) of a block."""
    return block.sublayer.layer.mixer if isinstance(block, SingleBlock) else block.mixer.layer


def file_shape(places: list[Place], parameters: dict[str, Tensor]) -> tuple[int, ...]:
    """A tensor's shape in the file: all its views by rows; a matrix of one row is a vector."""
    shapes = [place.view.shape(parameters[place.view.parameter]) for place in places]
    shape = (sum(one[0] for one in shapes), *shapes[0][1:])
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
