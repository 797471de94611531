"""Exporting a folder as a GGUF file beside copying as many bytes, in turn: seconds of the clock and of the processor
(user and system), and the memory of the process beyond the mapped weights.

OMP_NUM_THREADS=1 python -m benchmarks.gguf [--megabytes 1000] [--kinds f32 bf16] [--pairs 5]

Both write a new file, sync it and rename it over the one before, each first in every second pair: a copy that
overwrites its old file in place writes into memory that was just freed, which can be several times as fast. On a
quiet machine a run takes about a minute; q8_0 and q4_0, which compute, take longer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

import llm_quest as quest
from llm_quest.cli.export_gguf import export_gguf
from llm_quest.hub.load_save import save
from llm_quest.models.build import preset
from tests.gguf_judge import word_tokenizer
from tests.gguf_models import replace

WIDTH, VOCAB = 1024, 32_000


def write_folder(folder: Path, megabytes: int, dtype: str) -> None:
    """A Llama of about so many bytes."""
    config = preset("llama3.2-tiny").config
    per_layer = (2 * WIDTH * WIDTH + WIDTH * WIDTH // 2 + 3 * WIDTH * 4 * WIDTH) * (4 if dtype == "float32" else 2)
    layers = max(1, (megabytes * 10**6 - VOCAB * WIDTH * 4) // per_layer)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    config = replace(config, **sizes, **heads, rotary=replace(config.rotary, dim=64))
    save(quest.build(config, dtype=dtype), folder, tokenizer=word_tokenizer(VOCAB))


def copy_synced(source: Path, target: Path) -> None:
    """Copy to a new file, sync it and put it in the target's place."""
    stage = target.with_suffix(".stage")
    with source.open("rb") as one, stage.open("xb") as other:
        shutil.copyfileobj(one, other, 8 << 20)
        other.flush()
        os.fsync(other.fileno())
    stage.replace(target)


class Spent(NamedTuple):
    """Seconds of the clock, and of the processor for the program and for the system."""

    wall: float
    user: float
    system: float

    @property
    def processor(self) -> float:
        return self.user + self.system

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.user:.2f} + {self.system:.2f})"


def measure(action: Callable[[], object]) -> Spent:
    before, wall = os.times(), time.perf_counter()
    action()
    wall, after = time.perf_counter() - wall, os.times()
    return Spent(wall, after.user - before.user, after.system - before.system)


def median(column: Sequence[Spent]) -> Spent:
    return Spent(*(statistics.median(values) for values in zip(*column, strict=True)))


def peak_memory(action: Callable[[], object]) -> int:
    """Bytes of the process's own memory (mapped files do not count) beyond those before, sampled every 5 ms."""
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def own() -> int:
        seen = process.memory_info()
        return int(seen.rss - seen.shared)

    before = own()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return peak[0]


def compare(kind: str, megabytes: int, pairs: int, folder: Path) -> str:
    dtype = "bfloat16" if kind == "bf16" else "float32"
    source, target = folder / dtype, folder / "model.gguf"
    if not source.exists():
        write_folder(source, megabytes, dtype)
    quantize = kind if kind.startswith("q") else None

    def export() -> None:
        export_gguf(source, target, quantize=quantize, overwrite=True)

    export()
    copy_synced(target, folder / "copy")
    size = target.stat().st_size
    rounds = []
    for number in range(pairs):
        actions = (export, lambda: copy_synced(target, folder / "copy"))
        spent = [measure(action) for action in (actions if number % 2 == 0 else actions[::-1])]
        rounds.append(spent if number % 2 == 0 else spent[::-1])
    clock = statistics.median(ours.wall / copy.wall for ours, copy in rounds)
    processor = statistics.median(ours.processor / copy.processor for ours, copy in rounds)
    ours, copy = (median(column) for column in zip(*rounds, strict=True))
    memory = peak_memory(export)
    return f"| {kind} | {size:,} | {ours} | {copy} | **{clock:.2f}** | {processor:.2f} | {memory / 1e6:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    print("| type | bytes | export: clock (user + system) | copy | ratio by the clock | by the processor | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            print(compare(kind, options.megabytes, options.pairs, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
