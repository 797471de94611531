from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llm_quest.data.problems import Problem, draw_problem, make_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.problems import evaluate_problems, sample_answers
from llm_quest.generation.sampling import SamplingParams
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder

TASK = make_task("addition")


@pytest.fixture(scope="module")
def pair() -> tuple[Decoder, Tokenizer]:
    tokenizer = character_tokenizer(TASK.alphabet)
    config = replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size)
    return build(config, seed=1), tokenizer


def encoder(tokenizer: Tokenizer):
    return lambda problem: [tokenizer.start_token_id, *tokenizer.encode(problem.prompt)]


def test_samples_hold_what_was_drawn_and_are_the_same_alone_or_among_others(pair: tuple[Decoder, Tokenizer]) -> None:
    model, tokenizer = pair
    problems = [draw_problem(TASK, "test", index) for index in range(5)]
    settings = {"encode_prompt": encoder(tokenizer), "max_new_tokens": 6, "n": 3, "seed": 4}
    groups = sample_answers(model, tokenizer, problems, SamplingParams(), **settings)  # type: ignore[arg-type]
    assert [len(group) for group in groups] == [3] * 5
    for problem, group in zip(problems, groups, strict=True):
        (alone,) = sample_answers(model, tokenizer, [problem], SamplingParams(), **settings)  # type: ignore[arg-type]
        assert [one.completion_ids for one in alone] == [one.completion_ids for one in group]
        for one in group:
            assert one.text == tokenizer.decode(one.completion_ids)
            assert tokenizer.decode(one.prompt_ids[1:]) == problem.prompt
            assert (one.finish_reason == "eos") == (one.completion_ids[-1] == tokenizer.eos_token_id)


def test_a_model_that_always_answers_seven_is_right_where_seven_is_right(pair: tuple[Decoder, Tokenizer]) -> None:
    tokenizer = pair[1]
    model = build(
        replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False), seed=0
    )
    seven, end = tokenizer.token_to_id("7"), tokenizer.eos_token_id
    with (
        torch.no_grad()
    ):  # the embedding of the last token read decides what comes next: 7 after anything, an end after 7
        for block in model.blocks:
            block.mixer.layer.out.weight.zero_()
            block.feed_forward.layer.down.weight.zero_()
        model.embed.token.weight.zero_()
        model.embed.token.weight[:, 0] = 1.0
        model.embed.token.weight[seven] = 0.0
        model.embed.token.weight[seven, 1] = 1.0
        model.head.weight.zero_()
        model.head.weight[seven, 0] = model.head.weight[end, 1] = 50.0
    problems = [Problem(f"{a}+3=", str(a + 3), "number", str(a)) for a in range(3, 7)]
    found = evaluate_problems(model, tokenizer, problems, num_samples=4, ks=(1, 4, 8), max_new_tokens=4)
    assert found.outcomes == {"right": 1, "wrong": 3, "unscorable": 0}
    assert (found.greedy_accuracy.share, found.mean_at_k, found.pass_at_k) == (0.25, 0.25, {1: 0.25, 4: 0.25})
    assert (found.truncated, found.mean_tokens) == (0.0, 2.0)
    short = evaluate_problems(model, tokenizer, problems, max_new_tokens=1)
    assert (short.greedy_accuracy.share, short.truncated) == (0.0, 1.0), "an answer that was cut off is not right"
    assert any("4+3=7" in line and "+" in line for line in found.lines())


def test_nothing_to_evaluate_and_nothing_to_score_are_told(pair: tuple[Decoder, Tokenizer]) -> None:
    model, tokenizer = pair
    with pytest.raises(UsageError, match="no problem"):
        evaluate_problems(model, tokenizer, [])
    with pytest.raises(UsageError, match="none of 1 answers could be scored"):
        evaluate_problems(model, tokenizer, [Problem("1+1=", "?", "number", "")], max_new_tokens=2)
