"""What CI runs of the campaigns: a little of each, others every day. A fault is shown with the command that repeats it.

`python -m tests.faults ci [--seed N]`: fuzzed inputs of every reader, a kill in every recipe, failing disks in every
writer and in one recipe, signals in every phase of another."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from llm_quest.recipes import RECIPES
from tests.faults.kills import IMPORTED_BY_TRAINING


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
    """Run a part, in a process that is forked from this one; show what it says where it fails. Whether it holds."""
    begin, until = processor_seconds(), time.monotonic() + limit
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            run_forked_part(words, output.fileno())
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        code = os.waitstatus_to_exitcode(ended[1])
        output.seek(0)
        said = output.read()
    command = " ".join(["python", "-m", "tests.faults", *words])
    print(f"{command}: exit code {code}, {processor_seconds() - begin:.0f} s of the processor", flush=True)
    if code:
        print(said.decode("utf-8", "replace")[-8000:], flush=True)
    return code == 0


def run_forked_part(words: Sequence[str], output: int) -> NoReturn:
    """The process of a part: what it prints goes to a file."""
    from tests.faults.__main__ import main as run_faults

    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["tests.faults", *words]
        code = run_faults()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


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
    for name in (*IMPORTED_BY_TRAINING, "tests.faults.all_targets", "tests.faults.signals", "tests.faults.writers"):
        importlib.import_module(name)  # once, and not in the process of each part
    gc.freeze()
    failed = [words for words in parts(seed) if not run_part(words, args.limit)]
    for words in failed:
        print(f"repeat: python -m tests.faults {' '.join(words)}")
    print(f"campaigns: seed {seed}, {len(failed)} parts with faults, {processor_seconds():.0f} s of the processor")
    return int(bool(failed))
