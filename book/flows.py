"""Pictures of how the package is built: what happens to a batch, to a token and to a rollout. Each step names its code,
which must be there, and what goes out of it."""

from __future__ import annotations

import html
from dataclasses import dataclass

from book.api import module_name
from book.source import find

WIDTH, HEIGHT, GAP = 400, 46, 30


@dataclass(frozen=True)
class FlowStep:
    """anchor: the class or function that does it; out: what it hands on."""

    said: str
    anchor: str
    out: str = ""


FLOWS: dict[str, tuple[str, tuple[FlowStep, ...]]] = {
    "batch": (
        "A batch, from the command to the update.",
        (
            FlowStep("the command finds its recipe", "cli/train.py:start_training", "YAML and key=value"),
            FlowStep("settings are checked, all mistakes at once", "recipes/config.py:parse_config", "a frozen config"),
            FlowStep("the recipe builds its parts", "recipes/recipe.py:Job", "objective, loader, evaluators"),
            FlowStep("the loader gives the rows of a step", "data/loader.py:ShardedLoader", "ids, targets (B, T)"),
            FlowStep("the objective makes a sum and a count", "contracts.py:Loss", "sum, count, metrics"),
            FlowStep("gradients are added over processes", "train/data_parallel.py:GradientReducer", "sum / count"),
            FlowStep("a step that is not finite is left out", "train/guards.py:NonFiniteGuard", "gradients"),
            FlowStep("the optimizer moves the weights", "train/optimizers.py:Muon", "weights"),
            FlowStep("all that a resume needs is saved", "train/checkpoint.py:CheckpointSaver", "a checkpoint"),
        ),
    ),
    "token": (
        "A token, through a model.",
        (
            FlowStep("ids become vectors", "layers/embedding.py:TokenEmbedding", "x (B, T, D)"),
            FlowStep("positions say who sees whom", "scope.py:Scope", "masks, rotations, slots"),
            FlowStep("each block adds what it computes", "layers/block.py:Block", "x + mixer(norm(x))"),
            FlowStep("queries, keys, values", "layers/attention.py:GroupedQueryAttention", "q, k, v"),
            FlowStep("keys and values are kept", "layers/kv_cache.py:KVCache", "all slots so far"),
            FlowStep("attention", "layers/scaled_dot_product.py:ScaledDotProduct", "(B, T, H, dv)"),
            FlowStep("the feed-forward layer, or experts", "layers/feed_forward.py:GatedMLP", "x + mlp(norm(x))"),
            FlowStep("the last norm", "layers/norm.py:RMSNorm", "(B, T, D)"),
            FlowStep("the head", "layers/linear.py:LMHead", "logits (B, T, V)"),
            FlowStep("one token is drawn", "generation/sampling.py:SamplingParams", "a token, its log-probability"),
        ),
    ),
    "rollout": (
        "A rollout, through GRPO.",
        (
            FlowStep("prompts of a task, of rows or of an environment", "rollouts/sampler.py:PolicyPrompt", "prompts"),
            FlowStep("the policy writes a group for each", "rollouts/sampler.py:RolloutSampler", "log-probabilities"),
            FlowStep("rewards, NaN where nothing can be said", "rollouts/rewards.py:SafeReward", "a number each"),
            FlowStep("rewards become advantages", "rollouts/advantages.py:RewardPipeline", "(r - mean) / std"),
            FlowStep("rows of like length share a micro-batch", "rollouts/rollouts.py:RolloutLoader", "rows"),
            FlowStep("the surrogate, clipped", "objectives/surrogates.py:ClippedSurrogate", "a term for each token"),
            FlowStep("the loss, with its penalties", "objectives/policy_gradient.py:PolicyGradientLoss", "sum, count"),
            FlowStep("a run that cannot learn is told so", "rollouts/diagnostics.py:Diagnostics", "advice"),
        ),
    ),
}  # fmt: skip


def draw_flow(name: str, root: str = "../") -> str:
    """A flow as HTML. root: from the page to the site's first folder."""
    caption, steps = FLOWS[name]
    height = len(steps) * (HEIGHT + GAP) + 4
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(caption)}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="13">'
    ]
    for number, step in enumerate(steps):
        parts.append(draw_step(step, 2 + number * (HEIGHT + GAP), root))
    return f'<figure class="flow">{"".join(parts)}</svg><figcaption>{html.escape(caption)}</figcaption></figure>'


def draw_step(step: FlowStep, top: int, root: str) -> str:
    """A box that links to its code, and the arrow under it with what goes out."""
    find(step.anchor)
    file, _, name = step.anchor.partition(":")
    address = f"{root}api/{module_name(file)}.html#{name}"
    middle, bottom = WIDTH // 2, top + HEIGHT
    box = (
        f'<a href="{address}"><rect x="2" y="{top}" width="{WIDTH - 4}" height="{HEIGHT}" rx="4" fill="var(--soft)" '
        f'stroke="var(--line)"/><text x="16" y="{top + 20}" fill="var(--ink)">{html.escape(step.said)}</text>'
        f'<text x="16" y="{top + 37}" fill="var(--link)" font-family="ui-monospace, monospace" font-size="11">'
        f"{html.escape(file)}: {html.escape(name)}</text></a>"
    )
    out = f'<text x="{middle + 12}" y="{bottom + 19}" fill="var(--ink)">{html.escape(step.out)}</text>'
    head = f"M{middle} {bottom}V{bottom + GAP - 2}m-5 -6l5 6l5 -6"
    return box + f'<path d="{head}" fill="none" stroke="var(--s1)" stroke-width="2"/>' + out
