"""`torch.compile(fullgraph=True)` gives the eager logits, and 64 decode steps are one graph, compiled once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.laws.subjects import EVERYBODY

ROOT = Path(__file__).parents[2]


def holding(backend: str, *names: str) -> list[str]:
    """The names for which the laws hold, judged in a fresh process."""
    command = [sys.executable, "-m", "tests.laws.compiled", backend, *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.parametrize("share", [0, 1, 2])
def test_every_model_is_one_graph_and_64_decode_steps_recompile_nothing(share: int):
    """Graphs and recompilation are the tracer's affair: a back-end that runs graphs as they are judges for all."""
    names = EVERYBODY[share::3]
    assert holding("eager", *names) == list(names)


GENERATED = ("gpt2-tiny", "llama3.2-tiny", "gemma3-tiny", "qwen3.5-tiny")


def test_the_code_generated_for_a_decode_step_gives_the_eager_logits():
    """Code generation takes tens of seconds a model, so one model of each kind stands for all: learned positions,
    rotary positions, rings beside full slots, states. `python -m tests.laws.compiled inductor RECORD_NAME` judges
    others."""
    assert holding("inductor", *GENERATED) == list(GENERATED)
