"""Run by test_compiled_speculation.py in a process of its own, without the import hook that checks shapes: prints what
it found. `python -m tests.generation.compiled_speculation BACKEND`"""

from __future__ import annotations

import copy
import functools
import json
import sys

import torch
from torch._dynamo.utils import counters

from llm_quest.generation.generate import generate, generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.speculative.draft_length import SpeculationStats
from llm_quest.generation.speculative.draft_model import DraftModelDrafter
from llm_quest.generation.speculative.drafters import DraftRequest
from llm_quest.generation.speculative.mtp_drafter import MTPDrafter
from llm_quest.generation.speculative.target_model import TargetModel
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from tests.laws.subjects import keep_block_kinds_

RAGGED = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4]]
GREEDY = SamplingParams(temperature=0.0)


@functools.cache
def target(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model with lookahead modules and weights large enough that tokens matter; made once, for its graphs stay.
    (In float64, where guesses are the model's own to the last; those with a ring or a state in float32.)"""
    model, generator = build(name, seed=1), torch.Generator().manual_seed(0)
    model = model if len(model.mtp_modules) else MultiTokenPrediction(2)(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 * 1.5, generator=generator)
    return keep_block_kinds_(model).to(dtype).eval()


@functools.cache
def perturb(model: Decoder) -> Decoder:
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return draft


def same_texts(model: Decoder, draft: Decoder | str, prompts: list[list[int]], **choice: object) -> bool:
    """Drafted in compiled passes against plain and eager."""
    plain = generate(model, prompts, temperature=0.0, **choice)
    fast = generate(model, prompts, temperature=0.0, draft=draft, compile=True, **choice)
    close = all(
        abs(a - b) < 1e-4 for x, y in zip(plain, fast, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)
    )
    return close and [(row.tokens, row.finish_reason) for row in plain] == [
        (row.tokens, row.finish_reason) for row in fast
    ]


def texts() -> dict[str, bool]:
    llama, gemma, qwen = (
        target("llama3.2-tiny"),
        *(target(name, torch.float32) for name in ("gemma3-tiny", "qwen3.5-tiny")),
    )
    draft, found = perturb(llama), {}
    for kind in ("model", "mtp", "ngram"):
        found[f"llama, {kind}"] = same_texts(llama, draft if kind == "model" else kind, RAGGED, max_new_tokens=40)
        eos = {"max_new_tokens": 40, "eos_token_id": list(range(0, 97, 11))}
        found[f"llama, {kind}, eos"] = same_texts(llama, draft if kind == "model" else kind, RAGGED, **eos)
    found["gemma, a ring, mtp"] = same_texts(gemma, "mtp", RAGGED, max_new_tokens=40)
    found["qwen, recurrent, mtp"] = same_texts(qwen, "mtp", RAGGED, max_new_tokens=24)
    return found


def ends() -> dict[str, bool]:
    """A draft that is never wrong runs up to the last place of the context, and not beyond."""
    model = target("gpt2-tiny")
    context = model.config.max_position_embeddings
    prompts = [list(range(context - 3)), list(range(context - 9)), list(range(context - 30))]
    return {
        beyond: same_texts(model, model, prompts, max_new_tokens=40, on_full_context=beyond)
        for beyond in ("stop", "slide")
    }


def last_place() -> list[bool]:
    """A lookahead of several tokens where one is wanted: the others are not read, for they have no place. (Three rows,
    as in `ends`, whose graphs serve here.)"""
    model = target("gpt2-tiny")
    text = [number % 97 for number in range(model.config.max_position_embeddings - 1)]
    drafters = [DraftModelDrafter(model, model, GREEDY, compile=compile) for compile in (False, True)]
    found = []
    for length in (len(text), len(text) - 1, len(text) - 2):
        texts = [text[:length]] * 3
        task = DraftRequest(texts, [len(text) + 2 - length] * 3, torch.zeros(3, 8), None)
        for drafter in drafters:
            drafter.prefill(texts, 1, model.config.max_position_embeddings)
        eager, fast = (drafter.propose(task, lambda confidence: True).tokens for drafter in drafters)
        found.append(eager == fast and drafters[0].cached_lengths == drafters[1].cached_lengths)
    return found


def acceptance_counts() -> dict[str, list[int]]:
    """The model as its own draft, in float64: every guess that is tested is accepted. (Greedy by the model of `ends`,
    whose graphs serve here.)"""
    found, sampled = {}, SamplingParams(top_p=0.9, repetition_penalty=1.2)
    for name, sampling in {"gpt2-tiny": GREEDY, "llama3.2-tiny": sampled}.items():
        model, tally = target(name), SpeculationStats()
        generate_completions(
            model, RAGGED, sampling, StoppingCriteria(max_new_tokens=24), draft=model, compile=True, stats=tally
        )
        found[name] = [tally.num_accepted_tokens, tally.num_tested_tokens]
    return found


def modules() -> list[bool]:
    """What compiled modules guess is what eager ones do, over cycles with rejections and a rest."""
    model = target("llama3.2-tiny")
    sides, drafters = (
        [TargetModel(model) for _ in range(2)],
        [MTPDrafter(model, GREEDY, compile=compile) for compile in (False, True)],
    )
    texts, same = [list(prompt) for prompt in RAGGED], []
    for side, drafter in zip(sides, drafters, strict=True):
        hidden = side.prefill(texts, 1, 50, slack=5)
        drafter.prefill(texts, 1, 50)
        drafter.update(hidden, texts, [len(text) - 1 for text in texts])
    for cycle, taken in enumerate([[1, 3, 2], [2, 1, 3], [3, 3, 1], [1, 1, 1], [2, 1, 3], [1, 2, 1]]):
        task = DraftRequest(texts, [2] * 3, torch.zeros(3, 8), None)
        both = [] if cycle in (2, 3) else [drafter.propose(task, lambda confidence: True) for drafter in drafters]
        same += [both[0].tokens == both[1].tokens] if both else []
        after = [[*text, *[31, 32, 33][: count - 1], 60 + count] for text, count in zip(texts, taken, strict=True)]
        for side, drafter in zip(sides, drafters, strict=True):
            hidden, _ = side.score_drafts(texts, [text[len(old) :] for text, old in zip(after, texts, strict=True)])
            side.rewind_to(after)
            drafter.update(hidden, after, taken)
        texts = after
    return same


def graphs() -> list[int]:
    """Graphs that many calls of one shape made, and how many more the same calls made again."""
    model, counts = target("llama3.2-tiny"), []
    draft = perturb(model)
    for _ in range(2):
        before = counters["stats"]["unique_graphs"]
        for seed in range(3):
            generate(model, RAGGED, max_new_tokens=40, draft=draft, compile=True, seed=seed, eos_token_id=[seed])
        counts.append(counters["stats"]["unique_graphs"] - before)
    return counts


def main(backend: str) -> None:
    if backend != "inductor":
        torch.compile = functools.partial(torch.compile, backend=backend)
    found = {
        "graphs": graphs(),  # first: it counts those of a model that has none
        "texts": texts(),
        "ends": ends(),
        "last_place": last_place(),
        "judged": acceptance_counts(),
        "modules": modules(),
    }
    print(json.dumps(found | {"breaks": len(counters["graph_break"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
