"""The compiled step is the eager one, as one graph per model and shape."""

from __future__ import annotations

import json

import pytest
import torch

from llm_quest.generation.compiled import compile_options, round_up_capacity, vector_options
from llm_quest.models import FAMILIES
from tests.forked import run_forked
from tests.generation.compiled_steps import main

FAMILIES = [
    name for name in ("gpt2-tiny", "llama3.2-tiny") if any(name == p.name for page in FAMILIES for p in page.presets)
]


def run_steps(backend: str, *names: str) -> dict:
    """What tests/generation/compiled_steps.py prints."""
    return json.loads(run_forked(main, backend, *names)[-1])


def test_many_calls_of_one_shape_are_one_graph_without_a_break_and_no_model_is_kept():
    """Greedy, sampled, ragged, grouped, with rows that end early, and sliding: the same step serves them all."""
    found = run_steps("aot_eager", *FAMILIES)
    for name, report in found["reports"].items():
        assert all(report["same"]), name
        assert report["graphs"] == 1, name
        assert report["beams"], name
        assert report["graphs_of_beams"] == 1, "prompts that are done leave the batch as large as it was"
    assert found["breaks"] == 0
    assert found["leaked"] == 0
    assert found["checked"] == {"slots": 1, "recurrent": 8}, "the guards of a text's first step stand for all"
    assert found["follows"], "a text begins with all guards"


def test_capacities_share_steps():
    assert [round_up_capacity(n) for n in (1, 64, 65, 190)] == [64, 64, 128, 192]


def test_code_generated_for_other_vectors_is_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch):
    """Compiled for wider vectors than it was generated for, it writes beyond its buffers."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    keys = set()
    for capability, width in (("AVX2", 256), ("AVX512", 512)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert vector_options() == {"cpp.simdlen": width}
        with config.patch(compile_options()["options"]):
            keys.add(str(config.save_config_portable(ignore_private_configs=False)))  # what the cache's names contain
            assert pick_vec_isa().bit_width() in (0, width), "0: this processor has no such vectors"
    assert len(keys) == 2
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert vector_options() == {}
    with config.patch({"cpp.simdlen": 256}):
        assert vector_options() == {}, "what the user has set stays"
