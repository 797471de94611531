"""Techniques under torch.compile, and QK-Clip over two processes that share the matrices (FSDP2)."""

from __future__ import annotations

from pathlib import Path

from tests.forked import run_forked
from tests.recipes.two import together
from tests.techniques.processes import clip_sharded, compiled


def test_a_training_pass_is_one_graph_with_the_eager_loss():
    names = ["QK-Clip, DyT, lookahead, hyper-connections", "caps, taps, mHC-lite"]
    assert run_forked(compiled) == names


def test_two_processes_clip_as_one(tmp_path: Path):
    file = tmp_path / "judged.txt"
    together(clip_sharded, str(file))
    assert file.read_text().split() == ["gpt2-tiny", "deepseek-v3-tiny"]
