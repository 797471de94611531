"""What a test has judged in a forked process is told whole, and an error there is an error here."""

from __future__ import annotations

import sys

import pytest

from tests.forked import run_forked


def judge(*names: str) -> int:
    import torch

    from llm_quest.layers.norm import RMSNorm

    print(*names)
    print(hasattr(RMSNorm.forward, "__wrapped__"), torch.get_num_threads())
    if "wrong" in names:
        raise AssertionError("the judged thing is wrong")
    return names.count("bad")


def test_the_function_is_called_where_shapes_are_not_checked_and_on_one_thread():
    assert hasattr(sys.modules["llm_quest.layers.norm"].RMSNorm.forward, "__wrapped__"), "here they are"
    assert run_forked(judge, "é", "b") == ["é b", "False 1"]


@pytest.mark.parametrize(
    ("name", "message"), [("wrong", "AssertionError: the judged thing is wrong"), ("bad", "code 1")]
)
def test_an_error_or_an_exit_code_of_the_process_fails(name: str, message: str):
    with pytest.raises(AssertionError, match=message):
        run_forked(judge, name)
