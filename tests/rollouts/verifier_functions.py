"""Verifiers that hang or are slow to load, for processes of their own: this file imports no torch, as a process that
judges answers does not either."""

from __future__ import annotations

import time

from llm_quest.data.problems import Problem


def hanging(problem: Problem, text: str) -> float:
    if text == "hang":
        time.sleep(1000)
    if text == "raise":
        raise ValueError(text)
    return float(text == problem.answer)


LOADED: list[str] = []


def slow_to_load(problem: Problem, text: str) -> float:
    if not LOADED:
        time.sleep(3)
    LOADED.append(text)
    return float(text == problem.answer)
