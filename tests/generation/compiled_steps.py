"""Run by test_compiled.py in a process of its own, without the import hook that checks shapes: prints what it
counted."""

from __future__ import annotations

import functools
import gc
import json
import sys
import weakref

import torch
from torch._dynamo.utils import counters

from llm_quest.generation import compiled as compilation
from llm_quest.generation.generate import generate
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from tests.laws.subjects import keep_block_kinds_

MODELS: dict[str, Decoder] = {}
RAGGED = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4]]


def same_texts(name: str, prompts: list[list[int]], **choice: object) -> bool:
    """The compiled step against the eager one, on the same model."""
    model = MODELS[name]
    eager = generate(model, prompts, **choice)
    compiled = generate(model, prompts, compile=True, **choice)
    close = all(
        abs(a - b) < 1e-4
        for x, y in zip(eager, compiled, strict=True)
        for a, b in zip(x.logprobs, y.logprobs, strict=True)
    )
    return close and [(row.tokens, row.finish_reason) for row in eager] == [
        (row.tokens, row.finish_reason) for row in compiled
    ]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def report(name: str) -> dict[str, object]:
    """64 steps and many ways to call: how many graphs, and are the texts the same?"""
    before = graphs()
    same = [
        same_texts(name, RAGGED, max_new_tokens=57, temperature=0.0),
        same_texts(name, RAGGED, max_new_tokens=50, seed=1, top_p=0.9),
        same_texts(name, [[1, 2], [3, 4], [5, 6]], max_new_tokens=40, eos_token_id=list(range(0, 97, 7)), seed=2),
        same_texts(name, [[1, 2]], n=3, max_new_tokens=40, repetition_penalty=1.2, seed=3),
    ]
    for choice in (
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"logit_bias": dict.fromkeys(range(0, 97, 9), 9.0)},
    ):
        same.append(same_texts(name, [[1, 2]], n=3, max_new_tokens=8, temperature=0.0, **choice))
    if name == "gpt2-tiny":
        same.append(
            same_texts(name, RAGGED, max_new_tokens=150, temperature=0.0, on_full_context="slide", eos_token_id=(3, 4))
        )
    same.append(same_texts(name, [[5, 9, 2]], n=2, num_beams=3, max_new_tokens=30, temperature=0.0))
    first = graphs() - before
    ends = {"eos_token_id": list(range(0, 97, 5)), "early_stopping": True}
    beams = same_texts(name, RAGGED, n=2, num_beams=4, max_new_tokens=30, temperature=0.0, min_new_tokens=2, **ends)
    return {"same": same, "graphs": first, "beams": beams, "graphs_of_beams": graphs() - before - first}


def count_checked_steps(name: str) -> dict[str, int]:
    """How many of the steps of a text are checked by dynamo's guards: with keys and values, and with a cache that is
    taken for a recurrent one."""
    calls, keeps = [], compilation.keeps_history
    compile_step = compilation.compile_for_model

    def count_steps(function, model):
        compiled = compile_step(function, model)
        return lambda *arguments: (calls.append(1), compiled(*arguments))[1]

    found = {}
    compilation.compile_for_model = count_steps
    for kind, answer in (("slots", keeps), ("recurrent", lambda cache: True)):
        compilation.keeps_history, before = answer, len(calls)
        generate(MODELS[name], RAGGED, max_new_tokens=9, temperature=0.0, eos_token_id=(), compile=True)
        found[kind] = len(calls) - before
    compilation.compile_for_model, compilation.keeps_history = compile_step, keeps
    return found


def follows_the_model(name: str) -> bool:
    """Whether a text is that of the model as it is now, and not as it was compiled."""
    model, choice = MODELS[name], {"max_new_tokens": 20, "temperature": 0.0}
    before = [row.logprobs for row in generate(model, RAGGED, **choice)]
    for block in model.blocks:
        block.mixer.layer.attend.scale *= 3
    return same_texts(name, RAGGED, **choice) and before != [row.logprobs for row in generate(model, RAGGED, **choice)]


def main(backend: str, *names: str) -> None:
    if backend != "inductor":
        torch.compile = functools.partial(torch.compile, backend=backend)
    MODELS.update({name: keep_block_kinds_(build(name, seed=1)) for name in names})
    reports = {name: report(name) for name in MODELS}
    checked, follows = count_checked_steps(names[0]), follows_the_model(names[0])
    gone = [weakref.ref(model) for model in MODELS.values()]
    MODELS.clear()
    gc.collect()
    leaked = sum(model() is not None for model in gone)
    found = {"reports": reports, "breaks": len(counters["graph_break"]), "leaked": leaked}
    print(json.dumps(found | {"checked": checked, "follows": follows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
