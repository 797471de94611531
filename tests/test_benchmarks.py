"""The benchmarks run: each imports, and ours and transformers compute the same text in the generation race."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.generation import contestants
from llm_quest.models.build import preset

MODULES = sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_imports(name: str):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("name", ["llama3.2-tiny", "gpt2-tiny"])
def test_the_generation_race_has_equal_weights_and_equal_texts(name: str):
    config = replace(preset(name).config, max_position_embeddings=128)  # more than the race's prompts
    forms = contestants(config, batch=2, dtype=torch.float32, new=4, compiled=False)
    texts = [run() for run in forms.values()]
    assert texts[0] == texts[1]
    assert [len(row) for row in texts[0]] == [4, 4]


def test_a_test_begins_with_one_thread():
    """Importing the benchmarks sets the threads to all cores, while tests are collected."""
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1", "for the processes that tests start"
