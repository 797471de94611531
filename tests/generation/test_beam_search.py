"""Beam search gives the tokens that transformers' gives, and is greedy decoding with one beam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import llm_quest as quest
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.beam_search import BeamSearchParams, BeamState, Extension, beam_search
from llm_quest.generation.generate import generate
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models.build import build
from tests import oracles
from tests.family_oracles import ORACLES

FAMILIES = {"llama": oracles.tiny_llama, "gpt2": oracles.tiny_gpt2} | {
    name: ORACLES[name] for name in ("gemma3", "qwen3_next", "deepseek_v3")
}
PROMPTS = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4]]
MANNERS = [
    {},
    {"length_penalty": 0.0, "early_stopping": True},
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"length_penalty": -1.0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model of theirs and the same in ours."""
    theirs = FAMILIES[request.param]().eval()
    folder = Path(tmp_path_factory.mktemp("beams")) / "model"
    return request.param, theirs, quest.load(oracles.save_published(theirs, folder))


def transformers_beams(theirs: Any, choice: dict[str, Any], **more: Any) -> list[list[int]]:
    """What transformers appends to PROMPTS, 96 behind an end. One prompt at a time where it matters: left padding is
    part of what its n-grams and its penalty read."""
    reads_padding = {"no_repeat_ngram_size", "repetition_penalty"} & choice.keys()
    appended = []
    for prompts in [[prompt] for prompt in PROMPTS] if reads_padding else [PROMPTS]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[96] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=4, num_return_sequences=2,
            pad_token_id=96, **choice, **more,
        )  # fmt: skip
        appended += found[:, longest:].tolist()
    return appended


@pytest.mark.parametrize("manner", range(len(MANNERS)))
def test_beam_search_finds_what_transformers_finds(pair, manner):
    """Of a ragged batch. Another model ends its texts in the same manner by other tokens."""
    name, theirs, ours = pair
    eos = [(), (11,), (11, 40, 63)][(manner + [*FAMILIES].index(name)) % 3]
    manner = MANNERS[manner]
    rows = generate(ours, PROMPTS, max_new_tokens=12, temperature=0.0, num_beams=4, n=2, eos_token_id=eos, **manner)
    expected = transformers_beams(theirs, manner, eos_token_id=list(eos) or None)
    for row, told in zip(rows, expected, strict=True):
        assert row.tokens == told[: len(row.tokens)]
        assert set(told[len(row.tokens) :]) <= {96}
        assert (row.finish_reason == "eos") == (row.tokens[-1] in eos)


def letters() -> tuple[Tokenizer, Any]:
    """A tokenizer of 97 tokens of one to three letters, ours and as transformers has it: a stop may end within a
    token, or lie across two."""
    pieces = [a + b + c for c in "x" for b in "abc" for a in "abcd"] + [a + b for a in "abcdefg" for b in "abcdefg"]
    pieces += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ")
    backend = Backend(models.WordLevel({piece: number for number, piece in enumerate(pieces[:97])}, unk_token="J"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    theirs = oracles.transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    return Tokenizer(backend, eos_tokens=()), theirs


@pytest.mark.parametrize("number", range(4))
def test_beams_that_reach_a_stop_string_end_as_in_transformers(pair, number):
    name, theirs, ours = pair
    stop = [("ab",), ("bc", "ga", "x"), ("k",), ("dd", "ee", "ff", "l", "j")][number]
    manner = MANNERS[(number + [*FAMILIES].index(name)) % 3]
    own, other = letters()
    rows = generate(
        ours, PROMPTS, max_new_tokens=12, temperature=0.0, num_beams=4, n=2, eos_token_id=(11,), stop=stop,
        tokenizer=own, **manner,
    )  # fmt: skip
    expected = transformers_beams(theirs, manner, eos_token_id=[11], stop_strings=list(stop), tokenizer=other)
    for row, told in zip(rows, expected, strict=True):
        assert row.tokens == told[: len(row.tokens)]
        assert set(told[len(row.tokens) :]) <= {96}
        text = own.decode(row.tokens)
        assert (row.finish_reason == "stop") == (any(one in text for one in stop) and row.tokens[-1] != 11)


def test_beams_end_at_a_stop_of_tokens(pair):
    """A completion that ends with it is one that ends with an eos, if the stop is one token."""
    _, _, ours = pair
    choice = {"max_new_tokens": 12, "temperature": 0.0, "num_beams": 4, "n": 2}
    by_stop = generate(ours, PROMPTS, stop=[[40]], eos_token_id=(), **choice)
    by_eos = generate(ours, PROMPTS, eos_token_id=(40,), **choice)
    assert [row.tokens for row in by_stop] == [row.tokens for row in by_eos]
    two = generate(ours, PROMPTS, stop=[[40, 63]], eos_token_id=(), **choice)
    assert all((row.finish_reason == "stop") == (row.tokens[-2:] == [40, 63]) for row in two)


def test_one_beam_is_greedy_decoding(pair):
    _, _, ours = pair
    criteria = StoppingCriteria(max_new_tokens=9)
    greedy = generate(ours, PROMPTS, max_new_tokens=9, temperature=0.0, eos_token_id=())
    found = beam_search(ours, PROMPTS, SamplingParams(temperature=0.0), criteria, BeamSearchParams(num_beams=1))
    assert [row.tokens for row in found] == [row.tokens for row in greedy]
    for one, other in zip(found, greedy, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_ends_beyond_the_first_ranks_is_not_finished():
    """Worked by hand: two beams, four extensions, 9 ends a text."""
    state = BeamState([1], 5, BeamSearchParams(num_beams=2), (9,))
    extensions = [Extension(-1.0, 0, 4), Extension(-2.0, 0, 9), Extension(-3.0, 0, 9), Extension(-4.0, 0, 5)]
    assert state.advance(extensions) == [0, 0]
    assert [(one.score, one.tokens) for one in state.finished] == [(-2.0, (9,))]
    assert [(one.score, one.tokens) for one in state.beams] == [(-1.0, (4,)), (-4.0, (5,))]
    assert not state.done
    state.advance([Extension(-1.5, 0, 9), Extension(-1.6, 0, 3), Extension(-4.5, 1, 2)])
    assert [one.score for one in state.finished] == [-0.75, -2.0]
    assert not state.done  # -1.6 / 2 is better than -2
    state.advance([Extension(-7.0, 0, 1), Extension(-7.5, 1, 1)])
    assert state.done  # -7 / 3 is not


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"temperature": 1.0}, "draws nothing"),
        ({"n": 4}, "raise num_beams"),
        ({"on_full_context": "slide"}, "of two contexts ranks nothing"),
        ({"early_stopping": "soon"}, "True, False or 'never'"),
        ({"num_beams": 0}, "at least 1"),
        ({"draft": "ngram"}, "guesses one text, not its alternatives"),
    ],
)
def test_options_that_mean_nothing_to_beams_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        generate(
            build("gpt2-tiny", seed=1), [[1]], **({"max_new_tokens": 3, "temperature": 0.0, "num_beams": 3} | choice)
        )
