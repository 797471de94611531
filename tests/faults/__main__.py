"""`python -m tests.faults` fuzzes everything that reads input; `files` lets every call fail that writes a file; `kills`
kills and resumes training runs; `signals` stops them in every phase; `ci` does a little of each. Each has `--help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from tests.machine import use_kept_profile


def fuzz(words: Sequence[str]) -> int:
    """`python -m tests.faults [KIND ...] --count 1000 --start 0`: fuzz the targets whose name begins so."""
    from tests.faults.all_targets import ALL_TARGETS as TARGETS
    from tests.faults.fuzz import run_target

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=", ".join(target.name for target in TARGETS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="how often all targets get COUNT further inputs")
    arguments = parser.parse_args(words)
    wanted = [one for one in TARGETS if not arguments.kinds or any(one.name.startswith(k) for k in arguments.kinds)]
    total = inputs = 0
    for number in range(arguments.rounds):
        for target in wanted:
            begin = time.process_time()
            faults = run_target(target, arguments.count, arguments.start + number * arguments.count)
            total, inputs = total + len(faults), inputs + arguments.count
            took = time.process_time() - begin
            print(
                f"{target.name}: {arguments.count:,} inputs, {len(faults)} faults, {took:.1f} CPU seconds", flush=True
            )
            for fault in faults:
                repeat = f"python -m tests.faults '{target.name}' --count 1 --start {fault.seed}"
                print(f"  {fault}\n  repeat: {repeat}", flush=True)
        print(f"round {number + 1}: {inputs:,} inputs so far, {total} faults", flush=True)
    return int(total > 0)


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for a busy core spin, and the time is counted
    use_kept_profile()
    if sys.argv[1:3] == ["files", "recipes"]:
        from tests.faults.recipe_files import main as recipe_files

        return recipe_files(sys.argv[3:])
    if sys.argv[1:2] == ["files"]:
        from tests.faults.writers import main as files

        return files(sys.argv[2:])
    if sys.argv[1:2] == ["ci"]:
        from tests.faults.ci import main as ci

        return ci(sys.argv[2:])
    if sys.argv[1:2] == ["signals"]:
        from tests.faults.signals import main as stop

        return stop(sys.argv[2:])
    if sys.argv[1:2] == ["kills"]:
        from tests.faults.kills import main as kills

        return kills(sys.argv[2:])
    return fuzz(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
