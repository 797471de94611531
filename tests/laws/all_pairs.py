"""`python -m tests.laws.all_pairs [PYTEST OPTIONS]`: the laws of test_techniques.py for every technique on every
family, of which the suite judges every third pair; about a CPU minute and a half."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(*options: str) -> int:
    command = [sys.executable, "-m", "pytest", "tests/laws/test_techniques.py", *options]
    return subprocess.call(command, cwd=Path(__file__).parents[2], env=os.environ | {"LLM_QUEST_ALL_PAIRS": "1"})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
