"""What ends a text is asked in one place: whatever generates, evaluates or samples ends an answer at the tokens of
generation_config.json and at those of the tokenizer."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_quest.cli.generation_options import GENERATE_DEFAULTS, GenerationOptions
from llm_quest.data.problems import draw_problem, parse_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.eval.evaluators import TextSampler
from llm_quest.eval.problems import evaluate_problems
from llm_quest.generation.generate import generate, generate_completions
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.recipes.grpo import GrpoConfig
from llm_quest.recipes.policy_setup import policy_sampler
from llm_quest.rollouts.sampler import PolicyPrompt
from llm_quest.train.parallel import DistributedContext
from tests.laws.subjects import randomize_

PACKAGE = Path(__file__).parents[2] / "llm_quest"
TASK = parse_task("addition:digits=1")
PROBLEM = draw_problem(TASK, "test", 0, 0)
BUDGET = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return character_tokenizer(TASK.alphabet)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    """A model whose greedy answer ends, by its generation config alone, at a token that its tokenizer calls no end."""
    numbers = replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    models = (randomize_(build(numbers), seed).eval() for seed in range(50))
    model, end = next((model, end) for model in models if (end := late_token(model, tokenizer)) is not None)
    model.generation_config = GenerationConfig(eos_token_ids=(end,))
    return model


def late_token(model: Decoder, tokenizer: Tokenizer) -> int | None:
    """A letter that a greedy answer first has in the middle."""
    ids, letters = greedy_tokens(model, prompt_ids(tokenizer), ()), tokenizer.encode(TASK.alphabet)
    return next((ids[n] for n in range(2, BUDGET - 1) if ids[n] not in ids[:n] and ids[n] in letters), None)


def prompt_ids(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.start_token_id, *tokenizer.encode(PROBLEM.prompt, add_special_tokens=False)]


def greedy_tokens(model: Decoder, prompt: list[int], ends: tuple[int, ...]) -> list[int]:
    return generate(model, [prompt], max_new_tokens=BUDGET, temperature=0.0, eos_token_id=ends)[0].tokens


def text_of(model: Decoder, tokenizer: Tokenizer) -> str:
    """The answer by hand, without its end."""
    ends = model.generation_config.eos_token_ids  # type: ignore[union-attr]
    ids = greedy_tokens(model, prompt_ids(tokenizer), ends)
    return tokenizer.decode_continuation(prompt_ids(tokenizer), ids[:-1])


def by_quest_generate(model: Decoder, tokenizer: Tokenizer, folder: Path) -> str:
    given = GenerationOptions(BUDGET, 0.0, None, None, None, None, (), False, 0)
    options = given.with_advice(None, GENERATE_DEFAULTS, lambda line: None)
    until = options.stopping_criteria(model, tokenizer)
    (done,) = generate_completions(model, [prompt_ids(tokenizer)], options.sampling, until)
    return done.text or ""


def by_eval_task(model: Decoder, tokenizer: Tokenizer, folder: Path) -> str:
    found = evaluate_problems(model, tokenizer, [PROBLEM], max_new_tokens=BUDGET)
    assert found.truncated == 0
    return found.examples[0][1]


def by_harness(model: Decoder, tokenizer: Tokenizer, folder: Path) -> str:
    if importlib.util.find_spec("lm_eval") is None:
        return text_of(model, tokenizer)
    from lm_eval.api.instance import Instance

    from llm_quest.eval.lm_eval_harness import LmEvalModel

    asked = Instance("generate_until", {}, (PROBLEM.prompt, {"until": [], "max_gen_toks": BUDGET}), 0)
    return LmEvalModel(model, tokenizer).generate_until([asked])[0]


def by_samples_of_a_run(model: Decoder, tokenizer: Tokenizer, folder: Path) -> str:
    TextSampler(tokenizer, folder, [PROBLEM.prompt], 1, BUDGET, 0.0, 0).evaluate(model, 1)
    (file,) = folder.glob("step-*.json")
    return str(json.loads(file.read_text())["samples"][0]["text"])


def by_rollouts(model: Decoder, tokenizer: Tokenizer, folder: Path) -> str:
    config = GrpoConfig.model_validate({"recipe": "grpo", "model": {"load": "x"}, "precision": "fp32"})
    config = config.model_copy(update={"max_new_tokens": BUDGET, "temperature": 1e-6})
    sampler = policy_sampler(config, model, tokenizer, DistributedContext())
    ((sample,),) = sampler(model, [PolicyPrompt(tuple(prompt_ids(tokenizer)), PROBLEM)], 1, 0)
    return sample.text


DOORS: tuple[Callable[[Decoder, Tokenizer, Path], str], ...] = (
    by_quest_generate, by_eval_task, by_harness, by_samples_of_a_run, by_rollouts,
)  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_an_answer_ends_at_the_same_token_everywhere(
    door: Callable[..., str], model: Decoder, tokenizer: Tokenizer, tmp_path: Path
):
    assert door(model, tokenizer, tmp_path) == text_of(model, tokenizer)


def calls_with_ends(file: Path) -> list[tuple[int, str]]:
    """(line, source) of every argument that names the ends of a text, but for those that are written to a file."""
    found = []
    for call in (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        name: Any = call.func
        if isinstance(name, ast.Name) and name.id == "GenerationConfig":
            continue
        for keyword in call.keywords:
            if keyword.arg in ("eos_token_id", "eos_token_ids"):
                found.append((keyword.value.lineno, ast.unparse(keyword.value)))
    return found


def test_no_caller_takes_the_ends_from_the_tokenizer_or_the_model_alone():
    wrong = [
        f"{file.relative_to(PACKAGE)}:{line}: {source}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in ("models", "hub")
        for line, source in calls_with_ends(file)
        if "tokenizer.eos_token_ids" in source or "generation_config" in source
    ]
    assert not wrong, "ask generation.stopping.end_token_ids"
