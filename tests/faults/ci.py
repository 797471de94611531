"""What CI runs of the campaigns: a little of each, others every day. A fault is shown with the command that repeats it.

`python -m tests.faults ci [--seed N]`: fuzzed inputs of every reader, a kill in every recipe, failing disks in every
writer and in one recipe, signals in every phase of another."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

from llm_quest.recipes import RECIPES


def parts(seed: int) -> list[list[str]]:
    """The arguments of each part."""
    names = list(RECIPES)
    first, second = (names[(2 * seed + place) % len(names)] for place in range(2))
    return [
        ["--count", "16", "--start", str(1_000_000 + 16 * seed)],
        ["kills", "--count", "1", "--seed", str(seed)],
        ["files", "--calls", "1", "--seed", str(seed)],
        ["files", "recipes", "--recipe", first, "--calls", "1"],
        ["signals", "--recipe", second],
    ]


def run_part(words: Sequence[str], limit: float) -> bool:
    """Run a part; show what it says where it fails. Whether it holds."""
    command, begin = ["python", "-m", "tests.faults", *words], processor_seconds()
    try:
        done = subprocess.run(
            [sys.executable, *command[1:]], timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = 124, error.stdout or b""
    print(f"{' '.join(command)}: exit code {code}, {processor_seconds() - begin:.0f} s of the processor", flush=True)
    if code:
        print(said.decode("utf-8", "replace")[-8000:], flush=True)
    return code == 0


def processor_seconds() -> float:
    """Of the processes that have ended, without those of `kills`, which another process starts."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults ci", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time() // 86_400), help="default: the day")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of each part, by the clock")
    args = parser.parse_args(words)
    seed = args.seed
    failed = [words for words in parts(seed) if not run_part(words, args.limit)]
    for words in failed:
        print(f"repeat: python -m tests.faults {' '.join(words)}")
    print(f"campaigns: seed {seed}, {len(failed)} parts with faults, {processor_seconds():.0f} s of the processor")
    return int(bool(failed))
