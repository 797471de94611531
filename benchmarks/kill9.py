"""Kill a training with SIGKILL at random moments, resume it, and compare the hashes of where it ends.

    python -m benchmarks.kill9 [--kills 20] [--seed 0]

Each round trains a fresh small model (dropout on, checkpoints every three steps) in a process of its own, kills it
once at a moment drawn from the length of the straight run, resumes it to the end and prints the SHA-256 of weights
and optimizer state. The exit code is 0 if every round ends with the straight run's bits.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm_quest.train.checkpoint import list_checkpoints
from tests.train.small import digest

STEPS, PAUSE = 60, 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, same, killed = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        assert start(root / "straight").wait() == 0
        expected = digest(last(root / "straight"))
        print(f"straight  {expected}")
        for number in range(args.kills):
            run = root / f"run-{number}"
            died, moment = kill(run, chance)
            found_at = [int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")]
            assert start(run).wait() == 0
            found = digest(last(run))
            killed, same = killed + died, same + (found == expected)
            word, verdict = "killed" if died else "finished before", "same" if found == expected else "DIFFERENT"
            print(f"{word} at {moment:.2f} s, checkpoints {found_at}  {found}  {verdict}", flush=True)
    print(f"{killed} of {args.kills} killed; {same} of {args.kills} ended with the straight run's bits")
    return 0 if same == args.kills else 1


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The small training of the engine's tests, in a process of its own."""
    command = [sys.executable, "-m", "tests.train.small", str(folder), "--steps", str(STEPS), "--pause", str(PAUSE)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def kill(folder: Path, chance: random.Random) -> tuple[bool, float]:
    """Whether the process died of it, and how long after its first row."""
    process = start(folder)
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.005)
    moment = chance.uniform(0, 0.9 * STEPS * PAUSE)
    time.sleep(moment)
    process.kill()
    return process.wait() == -signal.SIGKILL, moment


def last(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    return list_checkpoints(folder / "checkpoints")[-1]


if __name__ == "__main__":
    raise SystemExit(main())
