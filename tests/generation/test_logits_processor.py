"""Logits processors: transformers' own on the same logits, and whole texts, drafted or not."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate
from llm_quest.generation.logits_processor import LogitsProcessor, find_ngram_ends
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import GeneratedSequence, StoppingCriteria
from llm_quest.models.build import build
from tests.later import Later

transformers = Later("transformers")

V = 12
HISTORIES = [[1, 2, 3, 1, 2], [4, 4, 4, 4, 4], [7, 8, 9, 10, 11]]


def process(logits: torch.Tensor, prompt_length: int, *, min_new_tokens: int = 0, **options) -> torch.Tensor:
    """The logits of HISTORIES after all processors."""
    params = SamplingParams(**options)
    criteria = StoppingCriteria(max_new_tokens=50, eos_token_ids=(0, 5), min_new_tokens=min_new_tokens)
    processor = LogitsProcessor(params, criteria, V, torch.device("cpu"))
    rows = []
    for history in HISTORIES:
        row = GeneratedSequence(0, history[:prompt_length], criteria, 100)
        row.token_ids += history[prompt_length:]
        rows.append(row)
    seen = torch.zeros(3, V, dtype=torch.bool).scatter(1, torch.tensor(HISTORIES), True)
    return params.apply_penalties(processor.add_bias(logits), seen, processor.history_offsets(rows))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("minimum", [0, 2, 3, 4])
def test_transformers_processors_give_the_same_logits(generator, n, minimum):
    logits, history = torch.randn(3, V, generator=generator) * 3, torch.tensor(HISTORIES)
    bias = ((2, 1.5), (7, -4.0))
    theirs = [
        transformers.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias]),
        transformers.RepetitionPenaltyLogitsProcessor(1.4),
        transformers.NoRepeatNGramLogitsProcessor(n),
        transformers.MinNewTokensLengthLogitsProcessor(2, minimum, [0, 5], device="cpu"),
    ]
    expected = logits.clone()
    for processor in theirs:
        expected = processor(history, expected)
    ours = process(logits, 2, min_new_tokens=minimum, repetition_penalty=1.4, no_repeat_ngram_size=n, logit_bias=bias)
    assert torch.equal(ours, expected)


def test_presence_and_frequency_count_what_was_generated():
    """By hand: of [1, 2 | 3, 1, 2] each new token once, of [4, 4 | 4, 4, 4] one three times."""
    made = process(torch.zeros(3, V), 2, presence_penalty=0.5, frequency_penalty=0.25)
    assert made[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert made[0, 1:4].tolist() == [-0.75] * 3
    assert made[1].tolist() == [0.0] * 4 + [-1.25] + [0.0] * 7


def test_the_ends_of_repeated_ngrams():
    assert list(find_ngram_ends([1, 2, 3, 1, 2], 3)) == [3]
    assert list(find_ngram_ends([1, 2, 1, 3, 1], 2)) == [2, 3]
    assert list(find_ngram_ends([1, 2], 3)) == []
    assert list(find_ngram_ends([5, 6], 1)) == [5, 6]


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_keep_the_promises_drafted_or_not(draft, temperature):
    model = build("llama3.2-tiny", seed=1).eval()
    source = build("llama3.2-tiny", seed=2).eval() if draft == "model" else draft
    eos = [int(generate(model, [[1, 2, 3]], max_new_tokens=1, temperature=0.0)[0].tokens[0])]
    options = {
        "max_new_tokens": 20, "min_new_tokens": 9, "no_repeat_ngram_size": 2, "logit_bias": {7: -float("inf"), 9: 6.0},
        "frequency_penalty": 0.7, "repetition_penalty": 1.1, "eos_token_id": eos, "temperature": temperature,
    }  # fmt: skip
    rows = generate(model, [[1, 2, 3], [4]], draft=source, n=2, **options)
    for prompt, row in zip([[1, 2, 3], [1, 2, 3], [4], [4]], rows, strict=True):
        text = prompt + row.tokens
        pairs = list(itertools.pairwise(text))
        assert len(set(pairs)) == len(pairs)
        assert 7 not in row.tokens
        assert not set(eos) & set(row.tokens[:9])
    if temperature == 0.0:
        assert [row.tokens for row in rows] == [row.tokens for row in generate(model, [[1, 2, 3], [4]], n=2, **options)]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size is 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"logit_bias": {10_000_000: 1.0}}, "logit_bias names token 10000000"),
        ({"logit_bias": {1: float("inf")}}, "finite number"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9"),
    ],
)
def test_mistakes_are_named(choice, message):
    with pytest.raises(UsageError, match=message):
        generate(build("gpt2-tiny", seed=1).eval(), [[1]], max_new_tokens=3, **choice)


def test_a_text_that_may_not_go_on_says_so():
    criteria = StoppingCriteria(max_new_tokens=9)
    processor = LogitsProcessor(SamplingParams(no_repeat_ngram_size=1), criteria, 3, torch.device("cpu"))
    assert processor.row_offsets([0, 1], 1) == {0: -float("inf"), 1: -float("inf")}
    with pytest.raises(UsageError, match="no_repeat_ngram_size=1 forbids every token after 2 new ones"):
        processor.row_offsets([0, 1, 2], 1)
