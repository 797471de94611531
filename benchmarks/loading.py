"""Loading a 124M folder: ours against transformers' `from_pretrained`.

    python -m benchmarks.loading [--pairs 5] [--json]

Time, in one process, taking turns (`pairs.race`): the load alone, and the load with the first logits of eight tokens.
transformers maps the file and leaves the reading to whoever touches the weights first; we map it too, but look at every
number, so the second is the fairer comparison. Memory, each load in a process of its own: VmHWM after it less the
resident size before it, over the size of the weights' file; mapped pages count. `fresh` are the times in those
processes. The last folder is written by transformers, in whose order q, k and v do not lie together: those are read.

`--verification` measures something else: a training checkpoint of 300 MB read with its hashes verified, over read
without, from the disk (its pages are dropped first) and from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import llm_quest as quest
from benchmarks.pairs import Row, race, table
from llm_quest import manifest
from llm_quest.layers.rotary import Llama3Scaling, RotaryEmbedding
from llm_quest.models.llama import Config
from llm_quest.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

CHILD = """
import json, sys, time
import torch
who, folder = sys.argv[1:]
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
if who == "ours":
    import llm_quest as quest
    load = quest.load
    import llm_quest.hub.load_save
else:
    import transformers
    from transformers import AutoConfig, GPT2LMHeadModel, LlamaForCausalLM
    transformers.logging.disable_progress_bar()
    kind = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[AutoConfig.from_pretrained(folder).model_type]
    load = kind.from_pretrained
tokens = torch.arange(8)[None]
before = status("VmRSS")
start = time.perf_counter()
model = load(folder)
loaded = time.perf_counter()
peak = status("VmHWM")
with torch.no_grad():
    out = model(tokens)
done = time.perf_counter()
found = {"load": loaded - start, "first": done - start, "peak": peak - before, "later": status("VmHWM") - before}
json.dump(found, sys.stdout)
"""


def measure(who: str, folder: Path) -> dict[str, float]:
    """One load in a fresh process."""
    done = subprocess.run([sys.executable, "-c", CHILD, who, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def memory(folder: Path, pairs: int) -> dict[str, float]:
    """Medians over the pairs; the first pair only warms the page cache."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rounds = []
    for i in range(pairs + 1):
        order = ("ours", "theirs") if i % 2 else ("theirs", "ours")
        rounds.append({who: measure(who, folder) for who in order})
    row = {}
    for who in ("ours", "theirs"):
        for field, unit in (("peak", size), ("later", size), ("load", 1), ("first", 1)):
            row[f"{who} {field}"] = statistics.median(r[who][field] / unit for r in rounds[1:])
    return row


def times(folder: Path, pairs: int) -> dict[str, list[Row]]:
    """transformers is the reference of both races."""
    kind = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[folder.name]
    tokens = torch.arange(8)[None]

    def logits(load: Callable[[Path], Any]) -> None:
        with torch.no_grad():
            load(folder)(tokens)

    loads = {
        "transformers": lambda: kind.from_pretrained(folder),
        "llm_quest": lambda: quest.load(folder),
    }
    first = {
        "transformers": lambda: logits(kind.from_pretrained),
        "llm_quest": lambda: logits(quest.load),
    }
    return {"load": race(loads, pairs=pairs), "load and first logits": race(first, pairs=pairs)}


def llama_124m() -> Config:
    """V 50257, D 768, 12 layers, 12 heads, F 2048, tied: 123.6M parameters."""
    rotary = RotaryEmbedding(
        64,
        500_000.0,
        Llama3Scaling(32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    )
    return Config(50257, 768, 12, 12, 12, 64, 2048, 131_072, rotary, tie_word_embeddings=True)


def drop_pages(folder: Path) -> None:
    """Have the next reader of these files go to the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verification(pairs: int) -> dict[str, list[Row]]:
    """Reading a training checkpoint, every number of it, with and without verifying it."""
    weights = {f"layer{n}": torch.randn(1000, 2500) for n in range(10)}
    moments = {f"{name}/{kind}": tensor + 1 for name, tensor in weights.items() for kind in ("exp_avg", "exp_avg_sq")}

    def read(folder: Path, *, cold: bool, verify: bool) -> None:
        if cold:
            drop_pages(folder)
        if verify:
            manifest._hash_at.cache_clear()
            assert not manifest.find_fault(folder)
        for tensors in map(load_checkpoint(folder).state_dict.get, ("model", "optimizer")):
            for tensor in tensors.values():
                tensor.clone()

    with tempfile.TemporaryDirectory() as place:
        folder = save_checkpoint(Path(place), Checkpoint(1, {"model": weights, "optimizer": moments}))
        return {
            name: race(
                {
                    "without verification": partial(read, folder, cold=cold, verify=False),
                    "with verification": partial(read, folder, cold=cold, verify=True),
                },
                pairs=pairs,
            )
            for name, cold in (("from the disk", True), ("from the page cache", False))
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verification", action="store_true")
    options = parser.parse_args()
    if options.verification:
        for name, rows in verification(options.pairs).items():
            print(f"\n## {name}\n\n{table(rows, 1, 'reads a second')}")
        return
    transformers.logging.disable_progress_bar()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, what in {"gpt2 124M": "gpt2", "llama 124M": llama_124m(), "llama 124M, their file": None}.items():
            folder = Path(place) / name / name.split()[0]
            if what is None:
                LlamaForCausalLM.from_pretrained(Path(place) / "llama 124M" / "llama").save_pretrained(folder)
            else:
                quest.save(quest.build(what), folder)
            raced = times(folder, options.pairs)
            in_memory = memory(folder, options.pairs)
            results[name] = {work: [asdict(row) for row in rows] for work, rows in raced.items()} | in_memory
            if not options.json:
                print(f"\n## {name}\n")
                for work, rows in raced.items():
                    print(f"{work}\n\n{table(rows, 1, 'loads a second')}\n")
                print("fresh processes (peak and later over the file's size, times in seconds)")
                print(", ".join(f"{key} {value:.3f}" for key, value in in_memory.items()))
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
