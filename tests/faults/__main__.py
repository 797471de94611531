"""`python -m tests.faults` fuzzes everything that reads input; `files` lets every call fail that writes a file; `kills`
kills and resumes training runs. Each has `--help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence


def fuzz(words: Sequence[str]) -> int:
    """`python -m tests.faults [KIND ...] --count 1000 --start 0`: fuzz the targets whose name begins so."""
    from tests.faults.all_targets import ALL_TARGETS as TARGETS
    from tests.faults.fuzz import run_target

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=", ".join(target.name for target in TARGETS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args(words)
    total = 0
    for target in TARGETS:
        if arguments.kinds and not any(target.name.startswith(kind) for kind in arguments.kinds):
            continue
        begin = time.monotonic()
        faults = run_target(target, arguments.count, arguments.start)
        total += len(faults)
        took = time.monotonic() - begin
        print(f"{target.name}: {arguments.count:,} inputs, {len(faults)} faults, {took:.0f} s", flush=True)
        for fault in faults:
            print(f"  {fault}")
    return int(total > 0)


def main() -> int:
    if sys.argv[1:2] == ["files"]:
        from tests.faults.writers import main as files

        return files(sys.argv[2:])
    if sys.argv[1:2] == ["kills"]:
        from tests.faults.kills import main as kills

        return kills(sys.argv[2:])
    return fuzz(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
