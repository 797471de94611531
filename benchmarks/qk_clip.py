"""What QK-Clip costs: whole training steps (forward, loss, backward, clip, fused AdamW, and QK-Clip's look and clip)
with and without, in turn, in one process, on the same tokens. tau is low enough that every step clips.

python -m benchmarks.qk_clip [--shape 11m-llama] [--bf16] [--rows 8] [--length 256] [--pairs 5]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import llm_quest as quest
from benchmarks.pairs import race
from benchmarks.training import CONFIG
from llm_quest.data.batch import TokenBatch
from llm_quest.models.gpt2 import Config as GPT2
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.train.optimizers import make_adamw

STEPS = 2
TAU = 0.05
SHAPES: dict[str, Any] = {
    "11m-llama": CONFIG,
    "11m-gpt2": GPT2(
        vocab_size=4096,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=1024,
    ),
}


class Runner:
    """One contestant: `TIMED_STEPS` optimizer steps a call."""

    def __init__(self, config: Any, clip: QKClip | None, *, rows: int, length: int, bf16: bool):
        model = quest.build(config).train()
        self.model = model if clip is None else clip(model)
        self.clip, self.bf16 = clip, bf16
        self.objective, self.optimizer = NextTokenLoss(self.model), make_adamw(self.model, lr=1e-4)
        tokens = torch.randint(0, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        self.batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])

    def __call__(self) -> None:
        for step in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.objective(self.batch)
            (loss.total / loss.count).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.clip is not None:
                self.clip.on_step_end(self.model, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    size: dict[str, Any] = {"rows": options.rows, "length": options.length, "bf16": options.bf16}
    for shape in [options.shape] if options.shape else list(SHAPES):
        runners = {
            "plain": Runner(SHAPES[shape], None, **size),
            "QK-Clip": Runner(SHAPES[shape], QKClip(tau=TAU), **size),
        }
        plain, clipped = race(runners, pairs=options.pairs)
        more, least, most = (1 / ratio - 1 for ratio in (clipped.times_reference, clipped.high, clipped.low))
        kind = "bf16" if options.bf16 else "fp32"
        print(
            f"{shape}, {kind}, {options.rows} x {options.length}: {plain.seconds / STEPS:.3f} s a plain step; ", end=""
        )
        print(f"QK-Clip costs {more:+.1%} ({least:+.1%} to {most:+.1%})", flush=True)


if __name__ == "__main__":
    main()
