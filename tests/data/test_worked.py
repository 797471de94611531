"""Documents that a computation ends, a teacher's thoughts about a few of them, and whole documents as a feed."""

from __future__ import annotations

import pytest
import torch

from llm_quest.contracts import Share
from llm_quest.data.batch import IGNORE
from llm_quest.data.problems import PARTS, Problem, spelled
from llm_quest.data.problems.registers import operations
from llm_quest.data.whole import WholeFeed, whole_rows
from llm_quest.data.worked import ThinkingFeed, thought_of, worked, worked_tokenizer
from llm_quest.errors import DataError, UsageError

TASK = spelled("registers:longest=3")


def test_a_chain_is_worked_by_hand():
    short = spelled("registers:shortest=2,longest=2")
    found = {p.key: p for part in PARTS for p in worked(short, part, 400)}
    problem = found["a2b*3c-3"]
    assert problem == Problem("a2b*3c-3:", "3", "marked", "a2b*3c-3", (7, 2), ("a2", "b*3=6", "c-3=3"))
    assert thought_of(TASK, problem, 0, 0) == ("a2b*3=6c-3=3", "3")
    assert operations("a3b*2c+10:") == [("b", ("*", 2)), ("c", ("+", 10))]
    with pytest.raises(UsageError, match="give 1 to 25"):
        spelled("registers:longest=26")


def test_documents_are_what_their_seed_and_index_say_and_parts_share_none():
    train, held = worked(TASK, "train", 500, 1), worked(TASK, "validation", 500, 1)
    assert train == worked(TASK, "train", 500, 1)
    assert train[:20] == worked(TASK, "train", 40, 1)[:20]
    assert len({p.key for p in train}) == len(train)
    assert not {p.key for p in train} & {p.key for p in held}
    assert not {p.key for p in worked(TASK, "train", 500, 9)} & {p.key for p in held}, "whatever the seeds"


def test_a_task_without_steps_is_told_without_a_thought():
    problem = worked(spelled("addition"), "train", 1)[0]
    assert thought_of(spelled("addition"), problem, 0, 0) == ("", problem.answer)


def test_thoughts_stand_at_the_answer_and_nothing_is_thought_elsewhere():
    tokenizer = worked_tokenizer(TASK)
    problems = worked(TASK, "train", 30)
    feed = ThinkingFeed(TASK, problems, tokenizer, examples=10, rows=8, seed=3)
    shown, plain = feed.at(1)
    assert len(feed.problems) == 10
    assert shown.tokens.shape[0] == 8 + 2
    assert plain.tokens.shape[0] == 2
    for index in range(12):
        problem = problems[index % 10]
        prompt, told = feed.thoughtful(index)
        thought, said = thought_of(TASK, problem, index % 10, 3)
        assert tokenizer.decode(prompt) == f"{problem.prompt}<think>"
        assert tokenizer.decode(told) == f"{thought}</think><answer>{said}</answer>"
        assert told[-1] == tokenizer.end_id
        prompt, told = feed.quick(index)
        before = tokenizer.decode(prompt).removesuffix("<think>")
        said = tokenizer.decode(told).removeprefix("</think><answer>").removesuffix("</answer>")
        assert (problem.prompt + problem.answer).startswith(before + said)
        assert len(said) == 1
        assert len(before) + 1 <= len(problem.prompt)
    with pytest.raises(ValueError, match="other demonstrations"):
        feed.resume({**feed.bookmark(), "seed": 4})


def test_a_tag_is_one_token_and_text_like_any_other():
    tokenizer = worked_tokenizer(TASK)
    ids = tokenizer.encode("a1<think>b</think>", template=False)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "a1<think>b</think>"


def test_whole_rows_learn_everything_or_the_chosen_places():
    documents = [[1, 5, 6, 7], [1, 8]]
    batch = whole_rows(documents)
    assert batch.tokens.tolist() == [[1, 5, 6], [1, 0, 0]]
    assert batch.targets.tolist() == [[5, 6, 7], [8, IGNORE, IGNORE]]
    assert batch.num_tokens == 4
    some = whole_rows(documents, [[2], [1]])
    assert some.targets.tolist() == [[IGNORE, 6, IGNORE], [8, IGNORE, IGNORE]]


def test_every_document_once_an_epoch_shared_by_processes_and_small_passes():
    documents = [[1, *range(10, 10 + n)] for n in range(1, 8)]
    feed = WholeFeed(documents, rows=7, seed=5)
    orders = [[feed.number(epoch * 7 + place) for place in range(7)] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]
    alone = WholeFeed(documents, rows=4, seed=5).at(3)[0]
    shares = [WholeFeed(documents, rows=4, seed=5, share=Share(rank, 2)).at(3)[0] for rank in range(2)]
    assert int((alone.targets != IGNORE).sum()) == sum(int((part.targets != IGNORE).sum()) for part in shares)
    small = WholeFeed(documents, rows=4, seed=5, micro_tokens=8).at(3)
    assert len(small) > 1
    assert torch.cat([part.targets.flatten() for part in small]).sort().values[-5:].tolist() == (
        alone.targets.flatten().sort().values[-5:].tolist()
    )
    with pytest.raises(DataError, match="no document"):
        WholeFeed([], rows=1, seed=0)
    with pytest.raises(UsageError, match="multiple"):
        WholeFeed(documents, rows=3, seed=0, share=Share(0, 2))
    with pytest.raises(DataError, match="other documents"):
        feed.resume(WholeFeed(documents[1:], rows=7, seed=5).bookmark())
