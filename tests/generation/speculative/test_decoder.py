"""Speculation: the plain text token for token when greedy, exactly the model's law when sampled, whatever drafts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate, generate_completions, stream_tokens
from llm_quest.generation.sampling import SamplingParams, inverse_cdf
from llm_quest.generation.speculative.draft_length import DraftLengthController, SpeculationStats, min_useful_acceptance
from llm_quest.generation.speculative.draft_model import DraftModelDrafter
from llm_quest.generation.speculative.drafters import DraftBuffer, DraftRequest, DraftTokens
from llm_quest.generation.speculative.mtp_drafter import MTPDrafter
from llm_quest.generation.speculative.ngram_drafter import NgramTable
from llm_quest.generation.speculative.rejection_sampler import (
    RejectionSampler,
    acceptance_probability,
    residual_distribution,
)
from llm_quest.generation.speculative.target_model import TargetModel
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from tests.later import Later
from tests.laws.subjects import logits_of_rows

stats = Later("scipy.stats")

TINY = [preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny")]
KINDS = ["gpt2-tiny", "gemma3-tiny", "deepseek-v3-tiny", "qwen3.5-tiny"]
RAGGED = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4], [5, 9, 2, 7, 7, 1]]
DRAFTS = ["model", "mtp", "ngram"]


def enlarge_weights(model: Decoder) -> Decoder:
    """Weights large enough that tokens matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 * 1.5, generator=generator)
    return model.eval()


@functools.cache
def target(name: str, dtype: str = "float32") -> Decoder:
    """A model with lookahead modules, which no test changes."""
    model = build(name, seed=1)
    model = enlarge_weights(model if len(model.mtp_modules) else MultiTokenPrediction(2)(model))
    return model.to(getattr(torch, dtype)).requires_grad_(False)


@functools.cache
def perturb(model: Decoder, by: float = 0.1) -> Decoder:
    """A draft that often, and not always, agrees, which no test changes."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.add_(by * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return draft


def drafting(kind: str, model: Decoder) -> Decoder | str:
    return perturb(model) if kind == "model" else kind


def tokens_of(completions) -> list[list[int]]:
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("name", TINY)
def test_a_greedy_text_is_the_plain_one_token_for_token(name):
    model = target(name)
    plain = generate(model, RAGGED, max_new_tokens=12, temperature=0.0)
    for kind in DRAFTS:
        tally = SpeculationStats()
        rows = generate_completions(
            model,
            RAGGED,
            SamplingParams(temperature=0.0),
            StoppingCriteria(max_new_tokens=12),
            draft=drafting(kind, model),
            stats=tally,
        )
        assert tokens_of(rows) == tokens_of(plain), kind
        assert [row.finish_reason for row in rows] == ["length"] * 4
        for row, other in zip(rows, plain, strict=True):
            assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert tally.num_passes <= 12, "max_new_tokens is exact, and every pass writes at least a token in each row"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("choice", [{"top_p": 0.9, "repetition_penalty": 1.2}, {"top_k": 9, "temperature": 0.6}])
def test_a_sampled_row_is_the_same_alone_and_among_neighbors(name, kind, choice):
    model = target(name, "float64")
    draft = drafting(kind, model)
    together = generate(model, RAGGED, max_new_tokens=10, seed=3, draft=draft, **choice)
    for prompt, row in zip(RAGGED[:3], together, strict=False):
        (alone,) = generate(model, [prompt], max_new_tokens=10, seed=3, draft=draft, **choice)
        assert alone.tokens == row.tokens
        assert alone.logprobs == pytest.approx(row.logprobs, abs=2e-5)


@pytest.mark.parametrize("kind", DRAFTS)
def test_log_probabilities_are_the_targets(kind):
    model = target("llama3.2-tiny")
    sampling = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.3)
    (row,) = generate_completions(
        model, [[4, 2]], sampling, StoppingCriteria(max_new_tokens=30), seed=2, draft=drafting(kind, model)
    )
    text = [4, 2, *row.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([text[:-1]]))[0, 1:]
    seen = torch.zeros(30, 97, dtype=torch.bool)
    for step in range(30):
        seen[step, text[: step + 2]] = True
    again = sampling.log_probs(logits, seen).gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
    assert row.logprobs == pytest.approx(again.tolist(), abs=1e-4)


P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def test_spec_1_by_hand():
    """p = .5 .3 .2, q = .2 .5 .3: accepted 1, .6, 2/3; alpha .7; what is left is the first symbol."""
    assert acceptance_probability(P, Q).tolist() == pytest.approx([1.0, 0.6, 2 / 3])
    assert float((Q * acceptance_probability(P, Q)).sum()) == pytest.approx(0.7)
    assert residual_distribution(P, Q).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert output_distribution(P, Q).tolist() == pytest.approx(P.tolist(), abs=1e-15)


def output_distribution(p: Tensor, q: Tensor) -> Tensor:
    """The law of one judged token, all paths summed."""
    accepted = q * torch.where(q > 0, acceptance_probability(p, q), 0)
    return accepted + (1 - accepted.sum()) * residual_distribution(p, q)


def test_nothing_left_after_a_rejection_that_only_rounding_made_is_p():
    """B49: no 0/0."""
    assert torch.equal(residual_distribution(P, P), P)


def test_all_paths_of_three_guesses_sum_to_the_models_law():
    """Five symbols, each conditioned on the one before: the sum over all guesses and verdicts is the product of p's."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(6, 5, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    law: Counter[tuple[int, ...]] = Counter()
    for guesses in itertools.product(range(5), repeat=3):
        before = (5, *guesses[:2])
        chance = 1.0
        for at, guess in enumerate(guesses):
            row = before[at]
            accept = float(acceptance_probability(p[row, guess], q[row, guess]))
            drawn = chance * float(q[row, guess]) * (1 - accept)
            for token, left in enumerate(residual_distribution(p[row], q[row]).tolist()):
                rest = 1 / 5 ** (2 - at)  # the guesses after a rejection do not matter: each path shares it
                law[(*guesses[:at], token)] += drawn * left * rest
            chance *= float(q[row, guess]) * accept
        law[guesses] += chance
    exact = {(): 1.0}
    for _ in range(3):
        exact |= {
            (*head, token): exact[head] * float(p[head[-1] if head else 5, token])
            for head in [h for h in exact if len(h) == max(map(len, exact))]
            for token in range(5)
        }
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    for path in itertools.product(range(5), repeat=3):
        assert path_probability(law, path, p) == pytest.approx(exact[path], abs=1e-12)


def path_probability(law: Counter[tuple[int, ...]], path: tuple[int, ...], p: Tensor) -> float:
    """Paths that ended early go on by p."""
    total = 0.0
    for length in range(1, 4):
        mass, last = law.get(path[:length], 0.0), path[length - 1]
        for token in path[length:]:
            mass, last = mass * float(p[last, token]), token
        total += mass
    return total


@pytest.mark.parametrize(("kind", "samples"), [("model", 10_000), ("mtp", 4_000), ("ngram", 4_000)])
def test_thousands_of_samples_have_the_models_law(kind, samples):
    """The whole loop, five symbols, three tokens: 125 texts against their exact probabilities."""
    config = dataclasses.replace(
        preset("llama3.2-tiny").config, vocab_size=5, hidden_size=16, num_hidden_layers=1, max_position_embeddings=16
    )
    model = enlarge_weights(MultiTokenPrediction(2)(build(config, seed=1)))
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    sampling, prompt = SamplingParams(temperature=0.9), [1, 2, 3, 1, 2]
    draft = drafting(kind, model) if kind != "model" else perturb(model, by=0.8)
    tally = SpeculationStats()
    rows = generate_completions(
        model, [prompt], sampling, StoppingCriteria(max_new_tokens=3), n=samples, seed=5, draft=draft, stats=tally
    )
    assert 0.05 < tally.acceptance_rate < 0.98
    texts = list(itertools.product(range(5), repeat=3))
    with torch.no_grad():
        log_p = sampling.log_probs(model(torch.tensor([[*prompt, *text] for text in texts])))
    exact = torch.stack([log_p[:, 4 + at].gather(1, torch.tensor(texts)[:, at : at + 1]) for at in range(3)]).sum(0)
    expected = exact[:, 0].double().exp()
    counts = Counter(tuple(row.tokens) for row in rows)
    observed = [counts[text] for text in texts]
    assert stats.chisquare(observed, (samples * expected / expected.sum()).tolist()).pvalue > 1e-3


def test_the_judge_alone_has_the_models_law_where_p_and_q_differ_much():
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0]).expand(20_000, 1, 5)
    q = torch.tensor([0.05, 0.5, 0.2, 0.2, 0.05]).expand(20_000, 5)
    u, r, v = torch.rand(3, 20_000, 1, generator=generator)
    guesses = inverse_cdf(q, v[:, 0]).tolist()
    judge = RejectionSampler(SamplingParams(), u, r)
    verdict = judge(logits, DraftTokens(guesses, q[:, None], []), range(20_000), [0] * 20_000, None)
    counts = Counter(row[0] for row in verdict.tokens)
    p = logits[0, 0].double().softmax(-1)
    assert stats.chisquare([counts[token] for token in range(5)], (20_000 * p).tolist()).pvalue > 1e-3
    assert sum(verdict.num_accepted) / 20_000 == pytest.approx(float(torch.minimum(p, q[0]).sum()), abs=0.01)


def test_drafts_count_as_seen_for_the_penalty_of_the_next():
    seen = torch.zeros(1, 5, dtype=torch.bool)
    buffer = DraftBuffer(DraftRequest([[1]], [2], torch.zeros(1, 9), seen))
    buffer.append(torch.tensor([[3]]), torch.tensor([[0.5]]), None, [2])
    assert buffer.seen[0].nonzero().tolist() == [[3]]
    assert not seen.any(), "a draft that is rejected was never in the text"


FILTERED = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(), FILTERED])
@pytest.mark.parametrize("name", KINDS)
def test_a_draft_that_is_the_model_is_always_accepted(name, sampling):
    """So p and q are filtered alike."""
    model, tally = target(name, "float64"), SpeculationStats()
    generate_completions(model, RAGGED, sampling, StoppingCriteria(max_new_tokens=14), draft=model, stats=tally)
    assert tally.num_accepted_tokens == tally.num_tested_tokens >= 16, (
        "a draft as large as its target is given up after the first trial"
    )


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_eos_or_a_stop_inside_an_accepted_span_ends_the_row_there(kind, temperature):
    """B28: what was accepted after it is not part of the text."""
    model = target("gpt2-tiny")
    draft = model if kind == "model" else kind
    (free,) = generate(model, [[4, 4, 4]], max_new_tokens=40, temperature=temperature, draft=draft, eos_token_id=())
    for at in (1, 3, 6, 17):
        token = free.tokens[at]
        end = free.tokens.index(token)
        (row,) = generate(
            model, [[4, 4, 4]], max_new_tokens=40, temperature=temperature, draft=draft, eos_token_id=token
        )
        assert (row.tokens, row.finish_reason) == (free.tokens[: end + 1], "eos")
        stop = tuple(free.tokens[at - 1 : at + 1])
        (row,) = generate(
            model, [[4, 4, 4]], max_new_tokens=40, temperature=temperature, draft=draft, eos_token_id=(), stop=[stop]
        )
        assert row.finish_reason == "stop"
        assert row.tokens == free.tokens[: len(row.tokens)]
        assert tuple(row.tokens[-2:]) == stop


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("beyond", ["stop", "slide"])
def test_the_end_of_the_context_is_where_plain_decoding_finds_it(kind, beyond):
    model = target("gpt2-tiny", "float64")
    context = model.config.max_position_embeddings
    prompts = [list(range(context - 3)), list(range(context - 9)), [7, 3]]
    choice = {"max_new_tokens": 90, "temperature": 0.0, "on_full_context": beyond}
    plain = generate(model, prompts, **choice)
    rows = generate(model, prompts, draft=drafting(kind, model), **choice)
    assert [(row.tokens, row.finish_reason) for row in rows] == [(row.tokens, row.finish_reason) for row in plain]


def test_a_draft_with_a_shorter_context_falls_silent_at_its_end():
    model = target("llama3.2-tiny")
    config = dataclasses.replace(preset("llama3.2-tiny").config, max_position_embeddings=20)
    draft = enlarge_weights(build(config, seed=2))
    prompts = [[1, 2, 3], list(range(1, 40))]
    plain = generate(model, prompts, max_new_tokens=30, temperature=0.0)
    assert tokens_of(generate(model, prompts, max_new_tokens=30, temperature=0.0, draft=draft)) == tokens_of(plain)


def test_a_draft_with_a_shorter_context_is_right_up_to_its_last_place_and_not_asked_beyond():
    """The model itself, as if it had been made for 20 positions: all it says is accepted."""
    model, tally = target("llama3.2-tiny"), SpeculationStats()
    config = dataclasses.replace(preset("llama3.2-tiny").config, max_position_embeddings=20)
    draft = MultiTokenPrediction(2)(build(config, seed=2)).eval()
    draft.load_state_dict(model.state_dict())
    prompts = [[1, 2, 3], list(range(1, 17)), list(range(1, 19)), list(range(1, 20))]
    plain = generate(model, prompts, max_new_tokens=30, temperature=0.0)
    rows = generate_completions(
        model, prompts, SamplingParams(temperature=0.0), StoppingCriteria(max_new_tokens=30), draft=draft, stats=tally
    )
    assert tokens_of(rows) == tokens_of(plain)
    for text, said in [
        (prompts[1], 5),
        (prompts[2], 3),
        (prompts[3], 2),
        ([*prompts[3], 7], 1),
        ([*prompts[3], 7, 8], 0),
    ]:
        drafter = DraftModelDrafter(draft, model, SamplingParams(temperature=0.0))
        drafter.prefill([text], 1, 64)
        task = DraftRequest([text], [8], torch.zeros(1, 8), None)
        assert len(drafter.propose(task, lambda confidence: True).tokens[0]) == said, (
            "the last token it reads is its 20th"
        )


@pytest.mark.parametrize("beyond", ["stop", "slide"])
def test_a_sampled_row_ends_with_the_context_alone_and_among_neighbors(beyond):
    model = target("gpt2-tiny", "float64")
    context = model.config.max_position_embeddings
    prompts = [list(range(context - 3)), list(range(context - 12)), [7, 3]]
    choice = {"max_new_tokens": 30, "seed": 3, "on_full_context": beyond, "draft": perturb(model, by=0.01)}
    rows = generate(model, prompts, **choice)
    assert tokens_of(rows) == [tokens_of(generate(model, [prompt], **choice))[0] for prompt in prompts]
    lengths = [3, 12, 30] if beyond == "stop" else [30] * 3
    assert [len(row.tokens) for row in rows] == lengths


def test_a_row_with_less_room_than_its_neighbors_reads_no_guess_beyond_its_context():
    """It writes what it would write anyway, and its neighbors look further ahead."""
    model = target("llama3.2-tiny", "float64")
    context, sampling = model.config.max_position_embeddings, SamplingParams(temperature=1e-6)
    (text,) = generate(model, [[5]], max_new_tokens=context - 1, temperature=0.0)
    prompts, tally = [text.tokens[: context - 6], text.tokens[: context // 2]], SpeculationStats()
    until = StoppingCriteria(max_new_tokens=24, on_full_context="slide")
    rows = generate_completions(model, prompts, sampling, until, draft="ngram", stats=tally)
    assert tally.num_accepted_tokens > 8
    assert tokens_of(rows) == tokens_of(generate_completions(model, prompts, sampling, until))


def test_a_group_shares_a_prefill_on_both_sides():
    model = target("qwen3.5-tiny", "float64")
    draft = perturb(model)
    group = generate(model, [[3, 1], [8]], n=3, max_new_tokens=14, seed=5, draft=draft)
    apart = generate(model, [[3, 1]] * 3 + [[8]] * 3, max_new_tokens=14, seed=5, draft=draft)
    assert tokens_of(group) == tokens_of(apart)
    assert len({tuple(tokens) for tokens in tokens_of(group)}) >= 4


@pytest.mark.parametrize("name", TINY)
def test_after_guesses_are_taken_back_the_cache_is_that_of_a_fresh_prefill(name):
    """Rows that accepted different numbers; the wrong guesses leave no trace."""
    model = target(name, "float64")
    side = TargetModel(model)
    texts = [[5, 9, 2, 7, 7, 1], [3, 8], [8, 8, 4, 1]]
    side.prefill(texts, 1, 40, slack=5)
    for taken in ([1, 3, 2], [4, 1, 1], [1, 1, 5], [2, 4, 1]):
        guesses = [[11, 12, 13, 14][: 4 - row % 2] for row in range(3)]
        side.score_drafts(texts, guesses)
        texts = [
            [*text, *guess[: count - 1], 90 + row]
            for row, (text, guess, count) in enumerate(zip(texts, guesses, taken, strict=True))
        ]
        side.rewind_to(texts)
        assert side.cached_lengths == [len(text) - 1 for text in texts], "nothing has to be read twice"
        fresh = [logits[-1] for logits in logits_of_rows(model, texts)]
        probe = copy.deepcopy(side, {id(model): model})
        _, logits = probe.score_drafts(texts, [[] for _ in texts])
        torch.testing.assert_close(logits[:, 0], torch.stack(fresh), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["deepseek-v3-tiny", "llama3.2-tiny", "gemma3-tiny"])
def test_lookahead_modules_guess_what_the_uncached_chain_guesses(name):
    """Over several cycles with rejections, a rest in between, and ragged rows."""
    model = target(name, "float64")
    drafter = MTPDrafter(model, SamplingParams(temperature=0.0))
    texts = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4]]
    side = TargetModel(model)
    hidden = side.prefill(texts, 1, 60, slack=5)
    drafter.prefill(texts, 1, 60)
    drafter.update(hidden, texts, [len(text) - 1 for text in texts])
    for cycle, taken in enumerate([[1, 3, 2], [2, 1, 3], [3, 3, 1], [1, 1, 1], [2, 1, 3]]):
        drafts = drafter.propose(task_of(texts), lambda confidence: True)
        if cycle != 2:
            assert drafts.tokens == [chain(model, text) if len(text) > 1 else [] for text in texts]
        else:
            drafts = DraftTokens([[] for _ in texts], None, [])
        guesses = [part or [1, 2] for part in drafts.tokens]
        hidden, _ = side.score_drafts(texts, guesses)
        texts = [[*text, *guess[: n - 1], 60 + n] for text, guess, n in zip(texts, guesses, taken, strict=True)]
        side.rewind_to(texts)
        drafter.update(hidden, texts, taken)


@pytest.mark.parametrize("name", KINDS)
def test_a_small_model_guesses_what_it_would_write_itself(name):
    """After rejections, after cycles in which it was not asked, in ragged rows."""
    draft = perturb(target(name, "float64"))
    drafter = DraftModelDrafter(draft, draft, SamplingParams(temperature=0.0))
    texts = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4]]
    drafter.prefill(texts, 1, 60)
    for cycle, taken in enumerate([[1, 3, 2], [2, 1, 3], [3, 3, 1], [1, 1, 1], [2, 1, 3]]):
        drafts = [[11, 12]] * 3
        if cycle != 2:
            drafts = drafter.propose(task_of(texts), lambda confidence: True).tokens
            for text, guess in zip(texts, drafts, strict=True):
                (alone,) = generate(draft, [text], max_new_tokens=2, temperature=0.0)
                assert guess == alone.tokens
        texts = [[*text, *guess[: n - 1], 60 + n] for text, guess, n in zip(texts, drafts, taken, strict=True)]
        drafter.update(torch.empty(3, 0, 1), texts, taken)


def task_of(texts: list[list[int]]) -> DraftRequest:
    return DraftRequest(texts, [2] * len(texts), torch.zeros(len(texts), 8), None)


def chain(model: Decoder, text: list[int]) -> list[int]:
    """Two guesses by the definition: the whole text through every module."""
    guesses: list[int] = []
    with torch.no_grad():
        h = model.hidden_states(torch.tensor([text]))
        for k, module in enumerate(model.mtp_modules, start=1):
            whole = [*text, *guesses]
            positions = torch.arange(k, len(whole))[None]
            scope = Scope(positions)
            h = module(h[:, : len(whole) - k], model.embed(torch.tensor([whole[k:]]), scope), scope)
            guesses.append(int(model.head(h[:, -1]).argmax()))
    return guesses


def test_the_text_says_what_followed_the_longest_match_last_time():
    text = [1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3]
    rows = NgramTable((3, 2))
    rows.add_text(text)
    assert rows.lookup(text) == (9, 3), "1 2 3 was followed by 9; 2 3 alone last by 7"
    assert rows.lookup([6, 2, 3]) == (7, 2)
    assert rows.lookup([6, 6, 6]) is None
    text = [4, 5, 4, 5]
    rows = NgramTable((2,))
    rows.add_text(text)
    assert rows.lookup(text) == (4, 2)
    rows.add_draft([*text, 9])
    assert rows.lookup([*text, 9, 4, 5]) == (9, 2), "its own guess is the last time"


def test_a_text_that_repeats_is_written_in_fewer_passes():
    model, tally = target("gemma3-tiny"), SpeculationStats()
    generate_completions(
        model,
        [[5, 6] * 6],
        SamplingParams(temperature=0.0),
        StoppingCriteria(max_new_tokens=60),
        draft="ngram",
        stats=tally,
    )
    assert tally.num_generated_tokens / tally.num_passes > 1.5


def test_a_draft_that_never_agrees_rests_longer_and_longer():
    """With times given, not measured: a pass 10 ms and 1 ms a column, a step 1 ms."""
    pace, drafted = DraftLengthController(8, use_clock=True), 0
    for _ in range(1000):
        steps = pace.begin_cycle(1)
        if steps:
            done = 1
            while done < steps and pace.should_continue([pace.acceptance_probability(0.3) ** done], done + 1):
                done += 1
            pace.observe(0.3, False)
            steps = done
        drafted += steps > 0
        pace.record_cycle(steps + 1, steps, 1, 0.01 + 0.001 * steps, 0.001 * steps)
    assert drafted < 60


def test_the_lookahead_follows_the_acceptance():
    """Where the first draft alone is accepted, every other time, drafting pays, and looking further does not."""
    looked = {}
    for accepted in (True, False):
        pace, lengths = DraftLengthController(8, use_clock=True), []
        for cycle in range(100):
            most, steps = pace.begin_cycle(1), 0
            while steps < most and (
                steps == 0 or pace.should_continue([pace.acceptance_probability(0.5) ** steps], steps + 1)
            ):
                steps += 1
            for number in range(steps):
                pace.observe(0.5, accepted or (number == 0 and cycle % 2 == 0))
            taken = steps if accepted else min(steps, 1) * (cycle % 2 == 0)
            pace.record_cycle(steps + 1, steps, 1 + taken, 0.01 + 0.0005 * steps, 0.0005 * steps)
            lengths.append(steps)
        looked[accepted] = lengths[-20:]
    assert set(looked[True]) == {8}
    assert 1 <= max(looked[False]) <= 3


def test_the_least_acceptance_that_pays_grows_with_the_drafts_cost():
    assert min_useful_acceptance(0.0) <= 0.12
    assert 0.3 < min_useful_acceptance(0.1) < 0.5
    assert min_useful_acceptance(0.9) > 0.98


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        (lambda model: build("llama3.2-tiny", seed=0).train(), "training mode"),
        (lambda model: "medusa", "draft is 'medusa': give a smaller model, 'mtp'"),
        (lambda model: "mtp", "no multi-token prediction modules"),
    ],
)
def test_a_draft_that_cannot_draft_is_refused(draft, words):
    model = enlarge_weights(build("llama3.2-tiny", seed=1))
    with pytest.raises(UsageError, match=words):
        generate(model, [[1]], max_new_tokens=4, draft=draft(model))


def test_a_draft_of_another_vocabulary_is_refused_with_a_reason():
    model = enlarge_weights(build("llama3.2-tiny", seed=1))
    other = build(dataclasses.replace(preset("llama3.2-tiny").config, vocab_size=2000), seed=0)
    with pytest.raises(UsageError, match="the draft knows 2000 tokens, the model 97"):
        stream_tokens(model, [[1]], SamplingParams(), StoppingCriteria(max_new_tokens=4), draft=other)


@pytest.mark.parametrize("rows", [80, 128])
def test_a_draft_whose_embedding_is_padded_otherwise_drafts(rows):
    """The greedy text is the plain one; sampled, no id that the draft alone has is ever drawn."""
    model = enlarge_weights(build("llama3.2-tiny", seed=1))
    draft = enlarge_weights(build(dataclasses.replace(preset("llama3.2-tiny").config, vocab_size=rows), seed=1))
    prompts, options = [[1, 96, 3], [90]], {"max_new_tokens": 20, "eos_token_id": ()}
    plain = generate(model, prompts, temperature=0.0, **options)
    assert [r.tokens for r in generate(model, prompts, temperature=0.0, draft=draft, **options)] == [
        r.tokens for r in plain
    ]
    sampled = generate(model, prompts, temperature=1.0, repetition_penalty=1.2, n=3, draft=draft, **options)
    assert max(token for row in sampled for token in row.tokens) < 97
