"""Places looked at in batches, against one after another; and the table's sums by hand."""

from __future__ import annotations

import pytest
import torch

from llm_quest.data.problems import parse_task
from llm_quest.generation.generate import generate
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.build import build
from llm_quest.recipes.rpt.documents import encode_problem, unique_problems
from llm_quest.recipes.rpt.evaluation import NextTokenReasoningEval, PositionResult, summarize_buckets
from llm_quest.recipes.rpt.positions import sample_per_bucket
from llm_quest.recipes.rpt.prompts import Position, PrefixMatchReward, make_prompt_builder
from llm_quest.recipes.rpt.start_model import reasoning_tokenizer
from llm_quest.rollouts.sampler import Sample, Sampler


def position_result(
    entropy: float, plain: bool, thought: bool, said: str | None = "a", several: bool = False
) -> PositionResult:
    return PositionResult(Position(0, 1, entropy), plain, thought, said, "", 4, several)


def test_the_table_by_hand():
    found = [
        position_result(0.1, True, False),
        position_result(0.7, True, True),
        position_result(1.2, False, True),
        position_result(1.3, False, False, None),
    ]
    table = summarize_buckets([*found, position_result(1.9, False, True, "ab", True)])
    rows = {
        one.name: (
            one.count,
            one.direct_accuracy.share,
            one.reasoned_accuracy.share,
            one.no_answer_rate,
            one.multi_token_rate,
        )
        for one in table.buckets
    }
    assert rows == {
        "trivial": (1, 1, 0, 0, 0),
        "easy": (1, 1, 1, 0, 0),
        "medium": (2, 0, 0.5, 0.5, 0),
        "hard": (1, 0, 1, 0, 1),
    }
    assert [(one.name, one.count) for one in table.nested_buckets] == [("H > 0.5", 4), ("H > 1", 3), ("H > 1.5", 1)]
    assert table.nested_buckets[0].reasoned_accuracy.share == 0.75
    assert table.metrics()["thought_medium"] == 0.5
    assert [one.name for one in summarize_buckets(found[:1]).buckets] == ["trivial"], "an empty bucket has no share"
    assert len(table.lines()) == 4


def test_each_bucket_gives_as_many_places_as_it_has_up_to_the_number():
    found = [Position(n, 1, entropy) for n, entropy in enumerate([0.1] * 9 + [0.6] * 2 + [1.9] * 9)]
    some = sample_per_bucket(found, 4, 1)
    assert [one.entropy for one in some] == [0.1] * 4 + [0.6] * 2 + [1.9] * 4
    assert some == sample_per_bucket(found, 4, 1) != sample_per_bucket(found, 4, 2)


@pytest.fixture(scope="module")
def subjects():
    task = parse_task("registers:longest=3")
    tokenizer = reasoning_tokenizer(task)
    model = build(llama.Config(tokenizer.vocab_size, 32, 1, 2, 2, 16, 64, 64, RotaryEmbedding(16, 1e4), True), seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    documents = [encode_problem(one, tokenizer) for one in unique_problems(task, "validation", 12)]
    places = [Position(n, place, 1.0) for n, ids in enumerate(documents) for place in range(1, len(ids) - 1)]
    asking = make_prompt_builder(tokenizer, documents, prefix="", suffix="<think>", max_target_tokens=3)
    writer = Sampler(tokenizer=tokenizer, eos_token_ids=tuple(tokenizer.eos_token_ids), max_new_tokens=5)
    return model, tokenizer, NextTokenReasoningEval(documents, places, asking, writer, PrefixMatchReward("<think>"))


def test_straight_off_is_the_likeliest_token_of_a_pass_that_sees_no_more(subjects):
    model, _, foretelling = subjects
    found = foretelling.evaluate_positions(model.train())
    assert model.training, "it does not notice"
    model.eval()
    for one in found[::7]:
        ids, place = foretelling.documents[one.position.document], one.position.place
        likeliest = int(model(torch.tensor([ids[:place]]))[0, -1].argmax())
        assert one.direct_correct == (likeliest == ids[place])
    assert 0 < sum(one.direct_correct for one in found) < len(found)


def test_a_thought_is_the_greedy_text_behind_the_prompt(subjects):
    model, tokenizer, foretelling = subjects
    found = foretelling.evaluate_positions(model)
    for one in found[::11]:
        ids = [*foretelling.documents[one.position.document][: one.position.place], tokenizer.encode("<think>")[-1]]
        alone = generate(model.eval(), [ids], max_new_tokens=5, temperature=0.0, eos_token_id=tokenizer.eos_token_ids)[
            0
        ]
        assert one.text == tokenizer.decode(t for t in alone.tokens if t not in tokenizer.eos_token_ids)
        assert one.num_tokens == len(alone.tokens)


def test_what_is_right_after_thinking_is_what_the_reward_pays_for(subjects):
    _, tokenizer, foretelling = subjects
    truth = tokenizer.decode(foretelling.documents[0][1:])
    told = [
        f"x</think><answer>{truth[0]}</answer>",
        f"</think><answer>{truth[:2]}</answer>",
        f"</think><answer>{truth[0]}?</answer>",
        "no answer",
    ]
    question = foretelling.prompt_builder.build_prompt(foretelling.documents[0], 1)
    samples = [Sample(question.prompt_ids, (1, 2), (0.0, 0.0), "eos", text, question.problem) for text in told]
    found = [foretelling.score_position(foretelling.positions[0], True, sample) for sample in samples]
    assert [(one.reasoned_correct, one.multi_token, one.answer is None) for one in found] == [
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, False, True),
    ]
