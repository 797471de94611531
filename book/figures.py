"""Figures of the book, each a function that draws it from the package's own code. They take the colors of the page."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from book.source import AnchorError
from llm_quest.report.plots import INK, SERIES, figure_to_svg, new_figure

Line = tuple[str, list[float], list[float]]


@functools.cache
def draw(name: str) -> str:
    """A figure as HTML, with its caption."""
    if name not in FIGURES:
        raise AnchorError(f"there is no figure {name!r}; known: {', '.join(FIGURES)}")
    caption, make = FIGURES[name]
    said = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure class="plot" id="figure-{name}">{make(caption)}{said}</figure>'


def curves(title: str, lines: list[Line], x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> str:
    """Lines with a legend above them, narrow enough to be read on a phone."""
    with new_figure(title, 4.9, 3.3) as (figure, axes):
        for number, (label, xs, ys) in enumerate(lines):
            axes.plot(xs, ys, label=label, color=SERIES[number % len(SERIES)])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        if len(lines) > 1:
            axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return figure_to_svg(figure, title)


def mask_picture(title: str, masks: dict[str, Tensor]) -> str:
    """Masks (T,S) bool, two in a row: a filled square where the query of a row sees the key of a column."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.color": INK, "axes.edgecolor": INK}):
        height = math.ceil(len(masks) / 2)
        figure = Figure(figsize=(4.4, 2.4 * height), layout="tight")
        for number, (name, mask) in enumerate(masks.items()):
            axes = figure.add_subplot(height, 2, number + 1)
            rows, columns = mask.shape
            for i in range(rows):
                for j in range(columns):
                    color = SERIES[0] if mask[i, j] else "none"
                    axes.add_patch(mpl.patches.Rectangle((j, i), 1, 1, facecolor=color, edgecolor=INK, linewidth=0.4))
            axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
            axes.set_title(name, fontsize=10, color=INK)
            axes.set_xlabel("keys", color=INK)
            axes.set_ylabel("" if number % 2 else "queries", color=INK)
        return figure_to_svg(figure, title)


def masks(title: str) -> str:
    from llm_quest.scope import Scope

    whole = torch.arange(8)[None]
    packed = Scope(torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]), segment_ids=torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]))
    padded = Scope(torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5]]))
    drawn = {
        "causal": full_mask(Scope(whole), None),
        "window of 3": full_mask(Scope(whole), 3),
        "padded left": full_mask(padded, None) & (padded.position_ids >= 0)[0][:, None],
        "three documents": full_mask(packed, None),
    }
    return mask_picture(title, drawn)


def full_mask(scope: object, window: int | None) -> Tensor:
    found: Tensor = scope.build_mask(scope.position_ids, scope.segment_ids, window)  # type: ignore[attr-defined]
    return found.reshape(found.shape[-2:])


def rotary(title: str) -> str:
    from llm_quest.layers.rotary import Llama3Scaling, YaRNScaling, default_inv_freq

    plain = default_inv_freq(128, 500_000.0)
    pairs = [float(i) for i in range(len(plain))]
    llama3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    yarn = YaRNScaling(factor=8.0, original_max_position_embeddings=8192)
    ratio = {"Llama 3.1": llama3.inv_freq(128, 500_000.0) / plain, "YaRN": yarn.inv_freq(128, 500_000.0) / plain}
    lines: list[Line] = [("no scaling", pairs, [1.0] * len(pairs))]
    lines += [(name, pairs, values.tolist()) for name, values in ratio.items()]
    return curves(title, lines, "pair of dimensions", "rotation, of the original")


def wavelengths(title: str) -> str:
    from llm_quest.layers.rotary import default_inv_freq

    lines = []
    for theta in (10_000.0, 500_000.0):
        lengths = 2 * math.pi / default_inv_freq(128, theta)
        lines.append((f"theta {theta:,.0f}", [float(i) for i in range(64)], lengths.tolist()))
    return curves(title, lines, "pair of dimensions", "tokens in one turn", log_y=True)


def cache(title: str) -> str:
    from llm_quest.cli.models import find_config
    from llm_quest.cost.flops import ModelCost

    lines = []
    for name in ("gpt2-xl", "llama3.1-8b", "gemma3-12b", "deepseek-v3", "qwen3-next-80b-a3b"):
        config = find_config(name)[1]
        cost = ModelCost.from_config(config)
        contexts = [2**k for k in (9, 10, 12, 15, 17) if 2**k <= config.max_position_embeddings]
        sizes = [cost.cache_bytes(n)[2] / 2**20 for n in contexts]
        lines.append((name, [float(n) for n in contexts], sizes))
    return curves(title, lines, "tokens", "MiB, bfloat16", log_x=True, log_y=True)


def latent(title: str) -> str:
    """Boxes of DeepSeek-V3's attention: x, y, width, name, size; those that the cache keeps are filled."""
    from llm_quest.cli.models import find_config

    config: Any = find_config("deepseek-v3")[1]
    heads, rope, latent_dim = config.num_attention_heads, config.qk_rope_head_dim, config.kv_lora_rank
    plain, values = f"{heads} x {config.qk_nope_head_dim}", f"{heads} x {config.v_head_dim}"
    boxes = [
        (100, 2, 200, "token's vector", f"{config.hidden_size:,}", False),
        (2, 92, 190, "latent vector c", str(latent_dim), True),
        (198, 92, 94, "rotary key", str(rope), True),
        (298, 92, 100, "query latent", f"{config.q_lora_rank:,}", False),
        (2, 182, 92, "values", values, False),
        (100, 182, 92, "keys", plain, False),
        (198, 182, 94, "all heads", f"share the {rope}", False),
        (298, 182, 100, "queries", f"{heads} x {config.qk_nope_head_dim + rope}", False),
        (2, 272, 396, "attention of each head", f"scores / sqrt({config.qk_nope_head_dim + rope})", False),
    ]
    down = [(48, 48), (146, 146), (245, 245), (348, 348)]
    return draw_boxes(title, boxes, [[(150, 97), (220, 245), (270, 348)], down, down], 322)


def preference(title: str) -> str:
    """Losses of one comparison against its margin, at beta 1."""
    from llm_quest.objectives.preference_losses import DPO, IPO, Hinge, LogRatios

    margin = torch.linspace(-4, 4, 81)
    pairs = LogRatios(margin, torch.zeros(81), torch.zeros(81))
    named = {"DPO: -log sigmoid(m)": DPO(1.0), "hinge: max(0, 1 - m)": Hinge(1.0), "IPO: (m - 1/2)^2": IPO(1.0)}
    lines = [(name, margin.tolist(), loss(pairs).clamp(max=6).tolist()) for name, loss in named.items()]
    return curves(title, lines, "margin m", "loss")


def clipping(title: str) -> str:
    from llm_quest.objectives.surrogates import ClippedSurrogate, SurrogateInputs

    ratio = torch.linspace(0.4, 1.8, 141)
    lines: list[Line] = []
    for advantage in (1.0, -1.0):
        signs = torch.full((1, 141), advantage)
        terms = SurrogateInputs(ratio.log()[None], ratio.log()[None], signs, signs != 0)
        value, _ = ClippedSurrogate()(terms)
        lines.append((f"advantage {advantage:+.0f}", ratio.tolist(), value[0].tolist()))
    return curves(title, lines, "ratio pi / pi_old", "surrogate")


def schedules(title: str) -> str:
    from llm_quest.train.optimizers import make_lr_schedule

    steps = range(101)
    named = {"cosine to 10 %": "cosine", "warm-up, stable, decay (wsd)": "wsd"}
    lines = []
    for name, shape in named.items():
        rate = make_lr_schedule(100, warmup_steps=10, shape=shape, min_lr_ratio=0.1)
        lines.append((name, [float(step) for step in steps], [rate(step) for step in steps]))
    return curves(title, lines, "% of the run", "rate")


def softcaps(title: str) -> str:
    x = torch.linspace(-120, 120, 121)
    lines = [("no cap", x.tolist(), x.tolist())]
    lines += [(f"cap {cap}", x.tolist(), (cap * torch.tanh(x / cap)).tolist()) for cap in (50, 30)]
    return curves(title, lines, "logit", "capped")


def draw_boxes(
    title: str, boxes: list[tuple[int, int, int, str, str, bool]], rows: list[list[tuple[int, int]]], height: int
) -> str:
    """Boxes (x, y, width, name, size, kept) of 46 pixels and, between them, rows of arrows (from x, to x)."""
    parts = []
    for x, y, width, name, size, kept in boxes:
        look = 'fill="var(--soft)" stroke="var(--s1)" stroke-width="3"' if kept else 'fill="none" stroke="var(--line)"'
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="46" rx="4" {look}/>')
        for line, text in ((19, name), (37, size)):
            parts.append(f'<text x="{x + width // 2}" y="{y + line}">{html.escape(text)}</text>')
    for number, row in enumerate(rows):
        top = 90 * number + 48
        parts += (
            f'<path d="M{a} {top}L{b} {top + 42}m-5 -7l5 7l5 -7" fill="none" stroke="var(--ink)"/>' for a, b in row
        )
    return (
        f'<svg viewBox="0 0 400 {height}" role="img" aria-label="{html.escape(title)}" font-size="13" '
        f'fill="var(--ink)" text-anchor="middle" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


FIGURES: dict[str, tuple[str, Callable[[str], str]]] = {
    "masks": (
        "Which keys (columns) a query (row) sees; all four follow from positions and segments.",
        masks,
    ),
    "rotary": (
        "How far each pair of dimensions turns per token after scaling to 8 times the context: fast pairs are left "
        "alone, slow pairs turn 8 times slower.",
        rotary,
    ),
    "wavelengths": ("Tokens in one full turn of each pair, for a head of 128 dimensions.", wavelengths),
    "cache": (
        "The cache of one sequence. Grouped queries, windows, latent vectors and recurrent states each bend the curve.",
        cache,
    ),
    "latent": (
        "Latent attention with DeepSeek-V3's numbers. The two marked boxes are all that the cache keeps of a token.",
        latent,
    ),
    "preference": ("Three losses of a preference margin.", preference),
    "clipping": ("PPO's clipped surrogate with epsilon 0.2: the gradient ends where the line is flat.", clipping),
    "schedules": ("Two schedules of the learning rate.", schedules),
    "softcap": ("cap tanh(x / cap) bounds a logit and leaves small ones alone.", softcaps),
}
"""Name -> (caption, the function that draws it)."""
