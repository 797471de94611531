"""What ragged prompts cost: the prefill of rows of unlike lengths, and the same rows read alone, in turn.

python -m benchmarks.ragged [--pairs 5] [--shape 124m-llama] [--dtype bfloat16]
python -m benchmarks.ragged --training      forward and backward of padded and of packed rows, blocks against a mask
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

import llm_quest as quest
from benchmarks.generation import SHAPES
from benchmarks.pairs import Row, race
from llm_quest import scope
from llm_quest.generation.decoding import prefill
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

PROMPTS: dict[str, tuple[int, ...]] = {
    "2 of about 4,096": (4096, 3950),
    "4 of 128 to 1,024": (1024, 128, 700, 350),
    "8 of 200 to 256": (256, 200, 231, 245, 211, 250, 208, 222),
    "32 of 40 to 71": tuple(40 + 11 * n % 32 for n in range(32)),
}


@torch.inference_mode()
def read_together(model: Decoder, windows: Sequence[Sequence[int]]) -> Tensor:
    return prefill(model, windows, max(map(len, windows)) + 1, torch.device("cpu"))[1]


def prefill_row(model: Decoder, lengths: Sequence[int], pairs: int) -> Row:
    """The rows together against each alone (the reference)."""
    draw = torch.Generator().manual_seed(0)
    windows = [torch.randint(model.config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    alone = torch.cat([read_together(model, [window]) for window in windows])
    torch.testing.assert_close(read_together(model, windows).float(), alone.float(), rtol=0.02, atol=0.02)
    forms: dict[str, Callable[[], object]] = {
        "alone": lambda: [read_together(model, [window]) for window in windows],
        "together": lambda: read_together(model, windows),
    }
    return race(forms, pairs=pairs)[1]


def training_rows(model: Decoder, pairs: int) -> list[tuple[str, Row]]:
    """A forward and a backward pass over 4 rows of 1,024 tokens, with the mask as blocks against as a tensor."""
    tokens = torch.randint(model.config.vocab_size, (4, 1024), generator=torch.Generator().manual_seed(0))
    row = torch.arange(1024)
    padded = torch.stack([torch.where(row < n, row, -1) for n in (1024, 700, 512, 600)])
    packed, segments = (row % 128).expand(4, -1).contiguous(), (row // 128).expand(4, -1).contiguous()

    def step(positions: Tensor, documents: Tensor | None, scores_per_block: int) -> None:
        with patch.object(scope, "SCORES_PER_BLOCK", scores_per_block):
            model(tokens, Scope(positions, segment_ids=documents)).sum().backward()

    rows = []
    for name, positions, documents in (("padded", padded, None), ("packed, 128 each", packed, segments)):
        forms: dict[str, Callable[[], object]] = {
            "mask": lambda p=positions, d=documents: step(p, d, 1 << 60),  # type: ignore[misc]
            "blocks": lambda p=positions, d=documents: step(p, d, scope.SCORES_PER_BLOCK),  # type: ignore[misc]
        }
        rows.append((name, race(forms, pairs=pairs)[1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="11m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--training", action="store_true")
    options = parser.parse_args()
    model = quest.build(SHAPES[options.shape][1], dtype=getattr(torch, options.dtype))
    if options.training:
        print("| 4 rows of 1,024 tokens | seconds | speed, times that of a mask (range) |\n| --- | --- | --- |")
        for name, row in training_rows(model.train(), options.pairs):
            print(f"| {name} | {row.seconds:.2f} | {row.times_reference:.2f} ({row.low:.2f}-{row.high:.2f}) |")
        return
    print("| prompts | seconds | time, times that of each alone (range) |\n| --- | --- | --- |")
    for name, lengths in PROMPTS.items():
        row = prefill_row(model, lengths, options.pairs)
        slower = f"{1 / row.times_reference:.2f} ({1 / row.high:.2f}-{1 / row.low:.2f})"
        print(f"| {name} | {row.seconds:.2f} | {slower} |", flush=True)


if __name__ == "__main__":
    main()
