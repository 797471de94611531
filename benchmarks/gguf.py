"""Exporting a folder as a GGUF file beside copying as many bytes, both synced to disk, in turn: time, and the memory of
the process beyond the mapped weights.

OMP_NUM_THREADS=1 python -m benchmarks.gguf [--megabytes 1000] [--kinds f32 bf16 q8_0] [--pairs 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import llm_quest as quest
from llm_quest.cli.export_gguf import export_gguf
from llm_quest.hub.load_save import save
from llm_quest.models.build import preset
from tests.gguf_judge import numbered_tokenizer
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
    save(quest.build(config, dtype=dtype), folder, tokenizer=numbered_tokenizer(VOCAB))


def copy_synced(source: Path, target: Path) -> None:
    with source.open("rb") as one, target.open("wb") as other:
        shutil.copyfileobj(one, other, 8 << 20)
        other.flush()
        os.fsync(other.fileno())


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


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
    size, rounds = target.stat().st_size, []
    for _ in range(pairs):
        rounds.append((timed(export), timed(lambda: copy_synced(target, folder / "copy"))))
    ratio = statistics.median(ours / copy for ours, copy in rounds)
    ours, copy = (statistics.median(column) for column in zip(*rounds, strict=True))
    memory = peak_memory(export)
    return f"| {kind} | {size:,} | {ours:.2f} s | {copy:.2f} s | **{ratio:.2f}** | {memory / 1e6:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=["f32", "bf16", "q8_0"])
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    print("| type | bytes | export | copy | ratio | memory |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            print(compare(kind, options.megabytes, options.pairs, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
