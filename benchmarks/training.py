"""Training speed at the 11M Llama shape (V 4096, D 384, 6 layers, 6/2 heads, F 1024, T 256, batch 8): a whole optimizer
step (forward, loss, backward, clip, fused AdamW) of transformers, litgpt and ours, in turn, in one process, on the same
batches.

python -m benchmarks.training [--pairs 7] [--no-compile] [--only eager-fp32]
litgpt pins older dependencies; `make bench-peers` puts it beside the environment in .bench/, and this file looks there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

import llm_quest as quest
from benchmarks.pairs import race
from llm_quest.data.batch import TokenBatch
from llm_quest.generation.compiled import vector_options
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.llama import FAMILY, Config
from llm_quest.objectives.next_token import NextTokenLoss

VOCAB, LENGTH, BATCH, STEPS = 4096, 256, 8, 3
MATRICES = 12_588_000 - VOCAB * 384
"""Parameters that are multiplied: all but the input embedding. Causal attention adds 2 T D forward a layer and
token."""
CONFIG = Config(
    VOCAB, 384, 6, 6, 2, 64, 1024, LENGTH, RotaryEmbedding(64, 500_000.0), tie_word_embeddings=False, rms_norm_eps=1e-5
)


def ours() -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    objective = NextTokenLoss(quest.build(CONFIG).train())

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        made = objective(TokenBatch(tokens[:, :-1], tokens[:, 1:], None, None))
        return made.total / made.count

    return objective, loss


def transformers() -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    published = {name: value for name, value in FAMILY.publish(CONFIG).items() if name != "rope_scaling"}
    model = LlamaForCausalLM(LlamaConfig(**published)).float().train()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


def litgpt() -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    sys.path.insert(0, str(Path(__file__).parent.parent / ".bench"))
    from litgpt.config import Config as LitConfig
    from litgpt.model import GPT

    sizes = {
        "block_size": LENGTH,
        "vocab_size": VOCAB,
        "padded_vocab_size": VOCAB,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
    }
    kind = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False, "bias": False}
    rest = {
        "n_query_groups": 2,
        "rotary_percentage": 1.0,
        "intermediate_size": 1024,
        "head_size": 64,
        "rope_base": 500_000,
    }
    model = GPT(LitConfig(name="11m", **sizes, **kind, **rest)).train()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


def batches(seed: int = 0) -> Iterator[torch.Tensor]:
    """Sequences with something to learn: a random walk over the vocabulary with few successors each."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, VOCAB, (VOCAB, 4), generator=generator)
    while True:
        tokens = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
        for _ in range(LENGTH):
            choice = torch.randint(0, 4, (BATCH,), generator=generator)
            tokens = torch.cat((tokens, successors[tokens[:, -1], choice][:, None]), dim=1)
        yield tokens


class Runner:
    """One contestant: `TIMED_STEPS` optimizer steps a call."""

    def __init__(self, make: Callable[[], tuple], *, bf16: bool, compiled: bool):
        torch.manual_seed(0)
        model, loss = make()
        self.model, self.bf16 = model, bf16
        self.loss = torch.compile(loss, options=vector_options()) if compiled else loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.feed = batches()
        self.losses: list[float] = []

    def __call__(self) -> None:
        for _ in range(STEPS):
            tokens = next(self.feed)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.loss(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())


def matmul_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the machine's large matrix product, now."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    a @ b
    start = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 2048**3 / (time.perf_counter() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    makers = {"transformers": transformers, "litgpt": litgpt, "ours": ours}
    flops = (6 * MATRICES + 3 * 2 * LENGTH * 384 * 6) * BATCH * LENGTH * STEPS
    everything: dict[str, Runner] = {}
    for setting in ("eager-fp32", "eager-bf16", "compiled-fp32", "compiled-bf16"):
        if (options.only and options.only not in (setting, "defaults")) or (
            options.no_compile and setting.startswith("compiled")
        ):
            continue
        runners = {}
        for name, make in makers.items():
            runners[f"{name} {setting}"] = Runner(make, bf16="bf16" in setting, compiled="compiled" in setting)
        everything |= runners
        if options.only == "defaults":
            continue
        rows = race(runners, pairs=options.pairs)
        peak = matmul_peak(torch.bfloat16 if "bf16" in setting else torch.float32)
        print(
            f"\n| {setting} | tokens/s | x transformers (range) | of the matmul peak ({peak:.0f} GFLOP/s) |\n"
            "| --- | --- | --- | --- |"
        )
        for row in rows:
            share = flops / row.seconds / 1e9 / peak
            ratio = f"{row.times_reference:.2f} ({row.low:.2f}-{row.high:.2f})"
            print(f"| {row.name} | {BATCH * LENGTH * STEPS / row.seconds:,.0f} | {ratio} | {share:.0%} |", flush=True)
    chosen = ["transformers eager-fp32", "ours eager-bf16", "ours compiled-bf16"]
    finals = {name: everything[name] for name in chosen if name in everything}
    if len(finals) > 1:
        print(
            "\n| our defaults against transformers' defaults | tokens/s | x (range) | loss after as many steps |\n"
            "| --- | --- | --- | --- |"
        )
        rows = race(finals, pairs=options.pairs)
        same = min(len(runner.losses) for runner in finals.values())
        for row in rows:
            last = sum(finals[row.name].losses[same - 10 : same]) / 10
            ratio = f"{row.times_reference:.2f} ({row.low:.2f}-{row.high:.2f})"
            print(f"| {row.name} | {BATCH * LENGTH * STEPS / row.seconds:,.0f} | {ratio} | {last:.4f} |")


if __name__ == "__main__":
    main()
