"""`torch.compile(fullgraph=True)` gives the eager logits, and 64 decode steps are one graph, compiled once."""

from __future__ import annotations

import pytest

from tests.forked import run_forked
from tests.laws.compiled import SCOPE_READ_ALIKE, main, scope_readers
from tests.laws.subjects import EVERYBODY, shared


def names_that_hold(backend: str, *names: str) -> list[str]:
    """The names for which the laws hold, judged in a fresh process."""
    return run_forked(main, backend, *names)


SHARES = 2


@pytest.mark.parametrize("share", range(SHARES))
def test_every_model_is_one_graph_and_64_decode_steps_recompile_nothing(share: int):
    """Graphs and recompilation are the tracer's affair: a back-end that runs graphs as they are judges for all."""
    names = EVERYBODY[share::SHARES]
    assert names_that_hold("eager", *names) == list(names)


def test_every_kind_of_layer_that_reads_the_scope_is_traced_with_whole_rows_too():
    traced = [scope_readers(shared(name)) for name in EVERYBODY if name not in SCOPE_READ_ALIKE]
    for name in SCOPE_READ_ALIKE:
        assert scope_readers(shared(name)) <= set.union(*traced), name


GENERATED = ("gpt2-tiny", "gemma3-tiny", "qwen3.5-tiny")


def test_the_code_generated_for_a_decode_step_gives_the_eager_logits():
    """Code generation takes tens of seconds a model, so one model of each kind stands for all: learned positions;
    rotary positions with rings beside full slots; states. `python -m tests.laws.compiled inductor NAME` judges
    others."""
    assert names_that_hold("inductor", *GENERATED) == list(GENERATED)
