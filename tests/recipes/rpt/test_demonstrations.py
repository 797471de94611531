"""Documents that a computation ends, a teacher's thoughts about a few of them, and whole documents as a feed."""

from __future__ import annotations

import pytest
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.data.loader import ShardedLoader, epoch_indices
from llm_quest.data.problems import SPLIT_NAMES, Problem, parse_task
from llm_quest.data.problems.registers import parse_assignments
from llm_quest.data.whole_documents import WholeDocuments, collate_documents
from llm_quest.errors import DataError, UsageError
from llm_quest.recipes.rpt.documents import unique_problems
from llm_quest.recipes.rpt.start_model import ReasoningLoader, reasoning_tokenizer, teacher_reasoning

TASK = parse_task("registers:longest=3")


def test_a_chain_is_worked_by_hand():
    short = parse_task("registers:shortest=2,longest=2")
    found = {p.key: p for part in SPLIT_NAMES for p in unique_problems(short, part, 400)}
    problem = found["a2b*3c-3"]
    assert problem == Problem("a2b*3c-3:", "3", "marked", "a2b*3c-3", (7, 2), ("a2", "b*3=6", "c-3=3"))
    assert teacher_reasoning(TASK, problem, 0, 0) == ("a2b*3=6c-3=3", "3")
    assert parse_assignments("a3b*2c+10:") == [("b", ("*", 2)), ("c", ("+", 10))]
    with pytest.raises(UsageError, match="give 1 to 25"):
        parse_task("registers:longest=26")


def test_documents_are_what_their_seed_and_index_say_and_parts_share_none():
    train, held = unique_problems(TASK, "train", 500, 1), unique_problems(TASK, "validation", 500, 1)
    assert train == unique_problems(TASK, "train", 500, 1)
    assert train[:20] == unique_problems(TASK, "train", 40, 1)[:20]
    assert len({p.key for p in train}) == len(train)
    assert not {p.key for p in train} & {p.key for p in held}
    assert not {p.key for p in unique_problems(TASK, "train", 500, 9)} & {p.key for p in held}, "whatever the seeds"


def test_a_task_without_steps_is_told_without_a_thought():
    problem = unique_problems(parse_task("addition"), "train", 1)[0]
    assert teacher_reasoning(parse_task("addition"), problem, 0, 0) == ("", problem.answer)


def test_thoughts_stand_at_the_answer_and_nothing_is_thought_elsewhere():
    tokenizer = reasoning_tokenizer(TASK)
    problems = unique_problems(TASK, "train", 30)
    feed = ReasoningLoader(TASK, problems, tokenizer, num_examples=10, batch_size=8, seed=3)
    shown, plain = feed.batches(1)
    assert len(feed.problems) == 10
    assert shown.input_ids.shape[0] == 8 + 2
    assert plain.input_ids.shape[0] == 2
    for index in range(12):
        problem = problems[index % 10]
        prompt, told = feed.reasoning_example(index)
        thought, said = teacher_reasoning(TASK, problem, index % 10, 3)
        assert tokenizer.decode(prompt) == f"{problem.prompt}<think>"
        assert tokenizer.decode(told) == f"{thought}</think><answer>{said}</answer>"
        assert told[-1] == tokenizer.eos_token_id
        prompt, told = feed.direct_example(index)
        before = tokenizer.decode(prompt).removesuffix("<think>")
        said = tokenizer.decode(told).removeprefix("</think><answer>").removesuffix("</answer>")
        assert (problem.prompt + problem.answer).startswith(before + said)
        assert len(said) == 1
        assert len(before) + 1 <= len(problem.prompt)
    with pytest.raises(ValueError, match="other demonstrations"):
        feed.load_state_dict({**feed.state_dict(), "seed": 4})


def test_a_tag_is_one_token_and_text_like_any_other():
    tokenizer = reasoning_tokenizer(TASK)
    ids = tokenizer.encode("a1<think>b</think>", add_special_tokens=False)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "a1<think>b</think>"


def test_whole_rows_learn_everything_or_the_chosen_places():
    documents = [[1, 5, 6, 7], [1, 8]]
    batch = collate_documents(documents)
    assert batch.input_ids.tolist() == [[1, 5, 6], [1, 0, 0]]
    assert batch.targets.tolist() == [[5, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.num_tokens == 4
    some = collate_documents(documents, [[2], [1]])
    assert some.targets.tolist() == [[IGNORE_INDEX, 6, IGNORE_INDEX], [8, IGNORE_INDEX, IGNORE_INDEX]]


def test_every_document_once_an_epoch_shared_by_processes_and_small_passes():
    documents = [[1, *range(10, 10 + n)] for n in range(1, 8)]
    source = WholeDocuments(documents)
    orders = [epoch_indices(7, 5, range(epoch * 7, epoch * 7 + 7)) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]
    sizes = {"batch_size": 4, "micro_batch_size": 4, "seed": 5}
    alone = ShardedLoader(source, **sizes).batches(3)[0]
    shares = [ShardedLoader(source, **sizes, shard=DataShard(rank, 2)).batches(3)[0] for rank in range(2)]
    assert int((alone.targets != IGNORE_INDEX).sum()) == sum(
        int((part.targets != IGNORE_INDEX).sum()) for part in shares
    )
    small = ShardedLoader(WholeDocuments(documents, max_micro_batch_tokens=8), **sizes).batches(3)
    assert len(small) > 1
    assert torch.cat([part.targets.flatten() for part in small]).sort().values[-5:].tolist() == (
        alone.targets.flatten().sort().values[-5:].tolist()
    )
    with pytest.raises(DataError, match="no document"):
        WholeDocuments([])
    with pytest.raises(UsageError, match="multiple"):
        ShardedLoader(source, batch_size=3, micro_batch_size=3, seed=0, shard=DataShard(0, 2))
    with pytest.raises(DataError, match="another stream of data: data was"):
        ShardedLoader(source, **sizes).load_state_dict(
            ShardedLoader(WholeDocuments(documents[1:]), **sizes).state_dict()
        )
