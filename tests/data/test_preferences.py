"""Preferences: every form of row, what is dropped and why, how they are cut, and which rows are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.document import DropReport
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.messages import Message
from llm_quest.data.preference_pairs import PreferenceDataset, collate_preferences
from llm_quest.data.preferences import (
    Preference,
    TokenizedPreference,
    parse_preference,
    read_preferences,
    tokenize_preferences,
)
from llm_quest.data.records import Record
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError

ASKED = {"role": "user", "content": "2+2?"}


def say(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASKED], "chosen": [say("4")], "rejected": [say("5")]},
        {"chosen": [ASKED, say("4")], "rejected": [ASKED, say("5")]},
        {"instruction": "2+2?", "input": "", "output": "x", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "ranked": ["4", "5"]},
    ],
)
def test_every_form_of_row_is_one_preference(row):
    found = read_preferences([Record({**row, "margin": 2}, "f:1")], DropReport())[0]
    assert (found.question, found.answers, found.margin) == ((Message("user", "2+2?"),), ("4", "5"), 2.0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "keys prompt, chosen; expected those of one form: prompt, ranked; .*prompt, chosen, rejected",
        ),
        ({"chosen": "b", "rejected": "c"}, "the text begins with 'b'; expected 'Human:"),
        (
            {"prompt": "q", "chosen": [{"role": "user", "content": "another"}, say("a")], "rejected": "b"},
            "answers another question",
        ),
        ({"chosen": [ASKED, say("a")], "rejected": [say("b")]}, "do not begin with the same question"),
        ({"prompt": "a", "chosen": [ASKED], "rejected": "b"}, "an answer is one message of the assistant"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' is 'much'"),
        ({"prompt": "a", "ranked": ["b"]}, "'ranked' is no list of two"),
        ({"prompt": [say("x")], "chosen": "b", "rejected": "c"}, "the roles are assistant, assistant"),
    ],
)
def test_a_row_that_is_wrong_stops_with_file_and_line(row, said):
    with pytest.raises(DataError, match=f"^f:7.*{said}"):
        parse_preference(Record(row, "f:7"))


def test_what_tells_nothing_is_dropped_and_counted():
    ledger = DropReport()
    answers = [("a", "b"), ("a", " a\n"), ("", "a"), ("a", "")]
    kept = read_preferences([Record({"prompt": "q", "chosen": c, "rejected": r}, "f") for c, r in answers], ledger)
    assert len(kept) == 1
    assert {name: count for name, (count, _) in ledger.dropped.items()} == {
        "chosen and rejected are the same": 1,
        "empty answer": 2,
    }


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(train_bpe(["user assistant\n"] * 9, 290))


def tokenize_ranked(
    chat: ChatTemplate, question: str, *answers: str, length: int, ledger: DropReport
) -> list[TokenizedPreference]:
    return tokenize_preferences(
        chat,
        read_preferences([Record({"prompt": question, "ranked": list(answers)}, "f:1")], DropReport()),
        length,
        ledger,
    )


def test_answers_end_and_the_question_is_the_same_for_all(chat):
    one = tokenize_ranked(chat, "why?", "yes", "no no", length=200, ledger=DropReport())[0]
    assert chat.tokenizer.decode(one.prompt, keep_special_tokens=True).endswith("<|im_start|>assistant\n")
    told = [chat.tokenizer.decode(answer, keep_special_tokens=True) for answer in one.answers]
    assert told == ["yes<|im_end|>", "no no<|im_end|>"]


def test_a_question_is_cut_on_its_left_alike_for_all_answers_and_no_answer_is_cut(chat):
    ledger = DropReport()
    whole = tokenize_ranked(chat, "why " * 50, "yes", "no no no", length=900, ledger=ledger)[0]
    assert not ledger.notes
    cut = tokenize_ranked(chat, "why " * 50, "yes", "no no no", length=40, ledger=ledger)[0]
    assert cut.length == 40
    assert np.array_equal(cut.prompt, whole.prompt[-len(cut.prompt) :])
    assert all(map(np.array_equal, cut.answers, whole.answers))
    assert ledger.notes == ["1 questions are cut on their left to fit into 40 tokens with their answers"]


def test_an_answer_longer_than_a_row_drops_its_pair_and_is_counted(chat):
    ledger = DropReport()
    long = read_preferences(
        [Record({"prompt": "q", "chosen": "a" * n, "rejected": "b"}, "f") for n in (5, 30)], DropReport()
    )
    assert len(tokenize_preferences(chat, long, 20, ledger)) == 1
    assert ledger.dropped == {"an answer alone is longer than a row of 20 tokens": [1, 0]}
    with pytest.raises(DataError, match="no answer fits into 4 tokens"):
        tokenize_preferences(chat, long, 4, DropReport())


def test_two_elements_on_a_blackboard():
    batch = collate_preferences([
        TokenizedPreference(np.array([1, 2]), (np.array([3, 4]), np.array([5])), 0.5),
        TokenizedPreference(np.array([6]), (np.array([7]), np.array([8]), np.array([9]))),
    ])  # fmt: skip
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 0, 0], [6, 8, 0, 0], [6, 9, 0, 0]]
    assert batch.targets.tolist()[:3] == [[-100, 3, 4, -100], [-100, 5, -100, -100], [7, -100, -100, -100]]
    assert batch.position_ids.tolist()[:3] == [[0, 1, 2, 3], [0, 1, 2, -1], [0, 1, -1, -1]]
    assert list(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)) == [(0, 1), (2, 3), (2, 4), (3, 4)]
    assert batch.weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert batch.margins.tolist() == pytest.approx([0.5, 0, 0, 0])
    assert batch.num_tokens == batch.to("cpu").num_tokens == 13


def test_a_step_is_a_function_of_seed_and_step_for_any_split_and_the_reference_rides_along():
    random = np.random.default_rng(0)
    many = [
        TokenizedPreference(random.integers(0, 9, 3), (random.integers(0, 9, n % 5 + 1), np.array([n])))
        for n in range(20)
    ]
    reference = [np.array([n, -n], dtype=np.float32) for n in range(20)]

    def find_rejected(micro: int, world: int) -> list[tuple[int, float]]:
        shares = [DataShard(rank, world) for rank in range(world)]
        feeds = [
            ShardedLoader(PreferenceDataset(many), batch_size=4, micro_batch_size=micro, seed=1, shard=share)
            for share in shares
        ]
        for feed in feeds:
            feed.source.reference_log_probs = reference
        batches = [batch for feed in feeds for batch in feed.batches(7)]
        return sorted(
            (int(batch.targets[row][batch.targets[row] >= 0][0]), float(batch.reference_log_probs[row]))
            for batch in batches
            for row in batch.rejected.tolist()
        )

    assert find_rejected(4, 1) == find_rejected(1, 1) == find_rejected(2, 2)
    assert all(number == -known for number, known in find_rejected(4, 1))
    epoch = [
        batch
        for step in range(5)
        for batch in ShardedLoader(PreferenceDataset(many), batch_size=4, micro_batch_size=4, seed=1).batches(step)
    ]
    asked = torch.cat([batch.targets[batch.rejected].max(dim=1).values for batch in epoch])
    assert sorted(asked.tolist()) == list(range(20))


def test_an_answer_with_reasoning_and_one_without_share_the_prompt_that_both_follow():
    tokenizer = train_bpe(["words of text"], 300)
    thinking = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
        "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><think>{% endif %}"
    )
    pair = Preference((("user", "of"),), ("<think>text</think>words", "words"))
    found = tokenize_preferences(ChatTemplate(tokenizer, thinking), [pair], 64, DropReport())[0]
    texts = [tokenizer.decode(ids.tolist(), keep_special_tokens=True) for ids in (found.prompt, *found.answers)]
    assert texts == ["<|im_start|>of<|im_end|>", "<think>text</think>words<|endoftext|>", "words<|endoftext|>"]


def test_a_preference_that_the_chat_template_refuses_is_dropped_and_counted():
    tokenizer, report = train_bpe(["words of text"], 300), DropReport()
    picky = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"  # fmt: skip # noqa: E501
    pairs = [Preference((("user", "of"),), ("words", worse), where="p:1") for worse in ("bad", "text")]
    assert len(tokenize_preferences(ChatTemplate(tokenizer, picky), pairs, 64, report)) == 1
    assert report.dropped == {"refused by the chat template: ValueError: no": [1, 0]}
    with pytest.raises(DataError, match=r"^p:1: ValueError: no"):
        tokenize_preferences(ChatTemplate(tokenizer, picky), pairs[:1], 64, DropReport())
