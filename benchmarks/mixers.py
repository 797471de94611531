"""The fast paths of the family tree against their plain forms and against transformers, forward and backward where they
train.

python -m benchmarks.mixers [moe] [delta] [latent] [window] [--pairs 5]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.pairs import race, table
from llm_quest.layers.initialize import init_normal_
from llm_quest.scope import Scope, SlidingWindow


def moe(pairs: int) -> None:
    """One training step (forward, backward) of a sparse model: E 64, top 8, D 256, expert width 128, T 256, batch 8, 2
    layers."""
    import transformers

    import llm_quest as quest
    from llm_quest.layers.experts import Experts, run_experts_for_loop, run_experts_grouped_mm
    from llm_quest.layers.rotary import RotaryEmbedding
    from llm_quest.models.qwen3 import FAMILY, Config, MoEConfig

    config = Config(512, 256, 2, 4, 2, 64, 512, 256, RotaryEmbedding(64, 1e6), False, MoEConfig(64, 8, 128))
    tokens = torch.randint(0, 512, (8, 257))
    published = {
        name: value
        for name, value in FAMILY.publish(config).items()
        if name not in ("rope_scaling", "num_local_experts")
    }
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**published)).float().train()

    def step(model: nn.Module, logits: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            model.zero_grad()

        return run

    contestants = {"transformers, its default experts": step(theirs, lambda t: theirs(t, use_cache=False).logits)}
    for name, work in {
        "ours, grouped": run_experts_grouped_mm,
        "ours, loop (unbind)": run_experts_for_loop,
        "ours, loop that indexes": indexed_loop,
    }.items():
        model = quest.build(config).train()
        for module in model.modules():
            if isinstance(module, Experts):
                module.run_experts = work
        contestants[name] = step(model, model)
    print("\n## Mixture of experts, training step\n\n" + table(race(contestants, pairs=pairs), 8 * 256, "tokens/s"))


def indexed_loop(x, gate_up, down, experts, weights, inner):
    """The per-expert loop as it is usually written: `weight[e]`, whose backward builds a full-size gradient per
    expert."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(experts == expert)
        y = F.linear(inner(F.linear(x[token], gate_up[expert])), down[expert])
        out = out.index_add(0, token, y * weights[token, slot, None])
    return out


def delta(pairs: int) -> None:
    """The delta rule alone: B 2, H 8, T 1024, d 64, forward and backward."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    from llm_quest.layers.delta_rule import chunk_gated_delta_rule, l2norm, recurrent_gated_delta_rule

    q, k, v = (torch.randn(2, 1024, 8, 64, requires_grad=True) for _ in range(3))
    g, beta = (-torch.rand(2, 1024, 8)).requires_grad_(), torch.rand(2, 1024, 8, requires_grad=True)
    state = torch.zeros(2, 8, 64, 64)

    def theirs() -> torch.Tensor:
        return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    def ours(rule: Callable) -> Callable[[], torch.Tensor]:
        return lambda: rule(l2norm(q) * 64**-0.5, l2norm(k), v, g, beta, state)[0]

    forms = {
        "transformers, torch chunks": theirs,
        "ours, chunked": ours(chunk_gated_delta_rule),
        "ours, recurrent": ours(recurrent_gated_delta_rule),
    }
    for title, backward in (("forward", False), ("forward and backward", True)):

        def run(form: Callable[[], torch.Tensor], backward: bool = backward) -> None:
            with torch.set_grad_enabled(backward):
                out = form()
            if backward:
                out.sum().backward()

        contestants = {name: (lambda form=form: run(form)) for name, form in forms.items()}
        print(f"\n## Gated DeltaNet, {title}\n\n" + table(race(contestants, pairs=pairs), 2048, "tokens/s"))


@torch.inference_mode()
def latent(pairs: int) -> None:
    """One decoding step of MLA at context 4096: absorbed against expanded (16 heads, ranks and widths of
    DeepSeek-V3)."""
    from llm_quest.layers.kv_cache import Cache
    from llm_quest.layers.latent_attention import MultiHeadLatentAttention
    from llm_quest.layers.rotary import RotaryEmbedding
    from llm_quest.layers.scaled_dot_product import ScaledDotProduct

    widths = {
        "num_attention_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip
    mixer = MultiHeadLatentAttention(
        1024, **widths, rotary=RotaryEmbedding(64, 1e4, interleaved=True), attend=ScaledDotProduct(192**-0.5)
    ).eval()
    init_normal_(mixer, std=0.02, out_std=0.02)
    x, context = torch.randn(1, 4096, 1024), 4096
    cache = Cache([mixer.new_cache(1, context + 1)], 1, context + 1)
    mixer(x, Scope.unpadded(x[..., 0], cache=cache).for_layer(0))
    token = torch.randn(1, 1, 1024)

    def decode(absorb: bool) -> None:
        mixer.is_absorbed_cheaper = lambda queries, keys: absorb  # type: ignore[method-assign]
        mixer(token, Scope.unpadded(token[..., 0], cache=cache, start=context).for_layer(0))

    rows = race({"expanded": lambda: decode(False), "absorbed": lambda: decode(True)}, pairs=max(pairs, 9))
    print("\n## MLA, one decoding step at context 4096\n\n" + table(rows, 1, "steps/s"))


def window(pairs: int) -> None:
    """Prefill at T 4096 with a window of 256: blocks of the band against one kernel call under the full mask."""
    q, k, v = attention_inputs()
    full = Scope(torch.arange(4096)[None]).attention_mask(256)
    from llm_quest.layers.scaled_dot_product import fused_attention

    def run(visible: object) -> Callable[[], object]:
        return lambda: fused_attention(q, k, v, visible, scale=0.125)

    with torch.inference_mode():
        rows = race({"full mask": run(full), "band": run(SlidingWindow(256))}, pairs=pairs)
    print("\n## Sliding window, prefill at T 4096, W 256\n\n" + table(rows, 4096, "tokens/s"))
    extra = {}
    for form in ("full", "band"):
        out = subprocess.run(
            [sys.executable, "-m", "benchmarks.mixers", "--peak", form], capture_output=True, text=True, check=True
        )
        extra[form] = json.loads(out.stdout.splitlines()[-1])
    share = extra["band"] / extra["full"]
    print(f"\nextra peak memory: full mask {extra['full']:.0f} MB, band {extra['band']:.0f} MB ({share:.2f} x)")


def attention_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4096, 8, 64, generator=generator)
    return q, torch.randn(1, 4096, 2, 64, generator=generator), torch.randn(1, 4096, 2, 64, generator=generator)


def peak_of(form: str) -> None:
    """Extra resident memory of one prefill, mask and all, in a process of its own; prints MB."""
    from llm_quest.layers.scaled_dot_product import fused_attention

    inputs = attention_inputs()
    small = [part[:, :128] for part in inputs]
    with torch.inference_mode():
        fused_attention(*small, SlidingWindow(64), scale=0.125)
        before = fresh_peak()
        visible = SlidingWindow(256) if form == "band" else Scope(torch.arange(4096)[None]).attention_mask(256)
        fused_attention(*inputs, visible, scale=0.125)
    print(json.dumps((peak_now() - before) / 1024))


def fresh_peak() -> int:
    """Forget the process's peak so far (Linux), and say where it stands, kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_now()


def peak_now() -> int:
    """Peak resident memory, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


PARTS = {"moe": moe, "delta": delta, "latent": latent, "window": window}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peak", default="")
    options = parser.parse_args()
    if options.peak:
        peak_of(options.peak)
        return
    for part in options.parts or PARTS:
        PARTS[part](options.pairs)


if __name__ == "__main__":
    main()
