"""Reproductions of papers, one file each: the claim, a small experiment with a control, and the rule that turns its
numbers into a verdict. `quest papers` lists them; `quest reproduce NAME` measures one again and writes its card.

To add a paper, write its file and add its name here. A paper is imported when it is loaded: it imports models and
training."""

from __future__ import annotations

import difflib
import importlib

from llm_quest.errors import UsageError
from llm_quest.papers.paper import Paper

PAPERS: tuple[str, ...] = (
    "muon",
    "qk_clip",
    "dyt",
    "hyper_connections",
    "yarn",
    "multi_token",
    "expert_bias",
    "number_token",
    "lora",
    "noisy_teacher",
    "reverse",
    "variants",
    "process",
    "label_noise",
    "overoptimization",
    "countdown",
    "memorizes",
)


def load_paper(name: str) -> Paper:
    """The paper of that name. UsageError names the nearest."""
    if name not in PAPERS:
        near = difflib.get_close_matches(name, PAPERS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no paper is called {name!r}{hint}; known: {', '.join(PAPERS)}")
    found: Paper = importlib.import_module(f"llm_quest.papers.{name}").PAPER
    return found
