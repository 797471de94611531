"""Places looked at in batches, against one after another; and the table's sums by hand."""

from __future__ import annotations

import pytest
import torch

from llm_quest.data.problems import spelled
from llm_quest.data.worked import as_document, worked, worked_tokenizer
from llm_quest.generation.generate import generate
from llm_quest.layers.rotary import Rotary
from llm_quest.models import llama
from llm_quest.models.build import build
from llm_quest.rollouts.buckets import Foretelling, Foretold, evenly, tabled
from llm_quest.rollouts.foretelling import asking_of
from llm_quest.rollouts.positions import Position
from llm_quest.rollouts.prefix_match import PrefixMatch
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.writer import Writer


def told(entropy: float, plain: bool, thought: bool, said: str | None = "a", several: bool = False) -> Foretold:
    return Foretold(Position(0, 1, entropy), plain, thought, said, "", 4, several)


def test_the_table_by_hand():
    found = [told(0.1, True, False), told(0.7, True, True), told(1.2, False, True), told(1.3, False, False, None)]
    table = tabled([*found, told(1.9, False, True, "ab", True)])
    rows = {one.name: (one.count, one.plain.share, one.thought.share, one.unread, one.several) for one in table.buckets}
    assert rows == {
        "trivial": (1, 1, 0, 0, 0),
        "easy": (1, 1, 1, 0, 0),
        "medium": (2, 0, 0.5, 0.5, 0),
        "hard": (1, 0, 1, 0, 1),
    }
    assert [(one.name, one.count) for one in table.nested] == [("H > 0.5", 4), ("H > 1", 3), ("H > 1.5", 1)]
    assert table.nested[0].thought.share == 0.75
    assert table.numbers()["thought_medium"] == 0.5
    assert [one.name for one in tabled(found[:1]).buckets] == ["trivial"], "an empty bucket has no share"
    assert len(table.lines()) == 4


def test_each_bucket_gives_as_many_places_as_it_has_up_to_the_number():
    found = [Position(n, 1, entropy) for n, entropy in enumerate([0.1] * 9 + [0.6] * 2 + [1.9] * 9)]
    some = evenly(found, 4, 1)
    assert [one.entropy for one in some] == [0.1] * 4 + [0.6] * 2 + [1.9] * 4
    assert some == evenly(found, 4, 1) != evenly(found, 4, 2)


@pytest.fixture(scope="module")
def looked():
    task = spelled("registers:longest=3")
    tokenizer = worked_tokenizer(task)
    model = build(llama.Config(tokenizer.vocab_size, 32, 1, 2, 2, 16, 64, 64, Rotary(16, 1e4), True), seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    documents = [as_document(one, tokenizer) for one in worked(task, "validation", 12)]
    places = [Position(n, place, 1.0) for n, ids in enumerate(documents) for place in range(1, len(ids) - 1)]
    asking = asking_of(tokenizer, documents, before="", after="<think>", ahead=3)
    writer = Writer(tokenizer=tokenizer, eos=tuple(tokenizer.eos_ids), new_tokens=5)
    return model, tokenizer, Foretelling(documents, places, asking, writer, PrefixMatch("<think>"))


def test_straight_off_is_the_likeliest_token_of_a_pass_that_sees_no_more(looked):
    model, _, foretelling = looked
    found = foretelling.of(model.train())
    assert model.training, "it does not notice"
    model.eval()
    for one in found[::7]:
        ids, place = foretelling.documents[one.position.document], one.position.place
        likeliest = int(model(torch.tensor([ids[:place]]))[0, -1].argmax())
        assert one.plain == (likeliest == ids[place])
    assert 0 < sum(one.plain for one in found) < len(found)


def test_a_thought_is_the_greedy_text_behind_the_prompt(looked):
    model, tokenizer, foretelling = looked
    found = foretelling.of(model)
    for one in found[::11]:
        ids = [*foretelling.documents[one.position.document][: one.position.place], tokenizer.encode("<think>")[-1]]
        alone = generate(model.eval(), [ids], max_new_tokens=5, temperature=0.0, eos=tokenizer.eos_ids)[0]
        assert one.text == tokenizer.decode(t for t in alone.tokens if t not in tokenizer.eos_ids)
        assert one.tokens == len(alone.tokens)


def test_what_is_right_after_thinking_is_what_the_reward_pays_for(looked):
    _, tokenizer, foretelling = looked
    truth = tokenizer.decode(foretelling.documents[0][1:])
    told = [
        f"x</think><answer>{truth[0]}</answer>",
        f"</think><answer>{truth[:2]}</answer>",
        f"</think><answer>{truth[0]}?</answer>",
        "no answer",
    ]
    question = foretelling.asking.question(foretelling.documents[0], 1)
    samples = [Sample(question.prompt, (1, 2), (0.0, 0.0), "eos", text, question.problem) for text in told]
    found = [foretelling.judged(foretelling.positions[0], True, sample) for sample in samples]
    assert [(one.thought, one.several, one.said is None) for one in found] == [
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, False, True),
    ]
