"""`python -m tests.faults [KIND ...] --count 1000 --start 0`: fuzz the targets whose name begins so."""

from __future__ import annotations

import argparse
import time

from tests.faults.fuzz import run_target
from tests.faults.targets import TARGETS

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("kinds", nargs="*", help=", ".join(target.name for target in TARGETS))
parser.add_argument("--count", type=int, default=1000)
parser.add_argument("--start", type=int, default=0)
arguments = parser.parse_args()
total = 0
for target in TARGETS:
    if arguments.kinds and not any(target.name.startswith(kind) for kind in arguments.kinds):
        continue
    begin = time.monotonic()
    faults = run_target(target, arguments.count, arguments.start)
    total += len(faults)
    print(
        f"{target.name}: {arguments.count:,} inputs, {len(faults)} faults, {time.monotonic() - begin:.0f} s", flush=True
    )
    for fault in faults:
        print(f"  {fault}")
raise SystemExit(total > 0)
