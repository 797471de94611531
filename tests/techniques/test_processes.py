"""Techniques under torch.compile, and QK-Clip over two processes that share the matrices (FSDP2)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.recipes.two import together
from tests.techniques.processes import sharded

ROOT = Path(__file__).parents[2]


def said(*command: str) -> list[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout.splitlines()


def test_a_training_pass_is_one_graph_with_the_eager_loss():
    names = ["QK-Clip, DyT, lookahead, hyper-connections", "caps, taps, mHC-lite"]
    assert said("-m", "tests.techniques.processes") == names


def test_two_processes_clip_as_one(tmp_path: Path):
    file = tmp_path / "judged.txt"
    together(sharded, str(file))
    assert file.read_text().split() == ["gpt2-tiny", "deepseek-v3-tiny"]
