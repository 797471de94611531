"""What the inside view says of a draft equals a second computation, and the accepted text is plain decoding's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import SamplingParams, inverse_cdf, row_uniforms
from llm_quest.generation.speculative.decoder import SpeculativeDecoder, make_drafter, speculative_decode
from llm_quest.generation.speculative.draft_length import SpeculationStats
from llm_quest.generation.speculative.drafters import DraftRequest, DraftTokens, ShouldContinue
from llm_quest.generation.stopping import GeneratedSequence, StoppingCriteria
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.serve.inside import TextInside, WrittenText
from llm_quest.serve.inside_drafts import DraftCycle, DraftReplay
from llm_quest.serve.server import LoadedModel, ServeOptions, make_server
from tests.generation.speculative.test_decoder import DRAFTS, TINY, drafting, target
from tests.serve.local_server import local_server, tiny_model, tiny_tokenizer
from tests.serve.test_inside import PROMPT, SAMPLINGS, plain_filters, write

LENGTH, TOKENS = 4, 8
NGRAMS = [("gpt2-tiny", "ngram"), ("qwen3.5-tiny", "ngram")]


def replay(model: Decoder, text, draft, length: int = LENGTH) -> list[DraftCycle]:
    running, cycles = DraftReplay(TextInside(model, text), draft, length), []
    while not running.is_finished:
        cycles.append(running.run_cycle())
    return cycles


def logits_after(model: Decoder, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().numpy()


def module_logits(model: Decoder, ids: list[int], drafted: int) -> np.ndarray:
    """The last module's logits, by the definition: the text and `drafted` guesses through the modules one by one."""
    with torch.no_grad():
        h = model.hidden_states(torch.tensor([ids[: len(ids) - drafted]]))
        for k in range(1, drafted + 2):
            part = ids[: len(ids) - drafted + k - 1]
            scope = Scope(torch.arange(k, len(part))[None])
            module = model.mtp_modules[k - 1]
            h = module(h[:, : len(part) - k], model.embed(torch.tensor([part[k:]]), scope), scope)
        return model.head(h[:, -1])[0].double().numpy()


def distribution(logits: np.ndarray, params: SamplingParams, past: list[int]) -> np.ndarray:
    """What is drawn from; at temperature 0 the penalized softmax."""
    return plain_filters(logits, replace(params, temperature=1.0) if params.is_greedy else params, past)


def draft_law(
    kind: str, model: Decoder, draft, params: SamplingParams, known: list[int], drafted: list[int]
) -> np.ndarray:
    """q by the definition, without a cache. Bias and penalties by count are the model's alone."""
    past = [*known, *drafted]
    logits = logits_after(draft, past) if kind == "model" else module_logits(model, past, len(drafted))
    own = replace(params, logit_bias=(), presence_penalty=0.0, frequency_penalty=0.0)
    return distribution(logits, own, past)


@pytest.mark.parametrize("params", SAMPLINGS)
@pytest.mark.parametrize("kind", DRAFTS)
def test_every_number_of_a_proposal_is_that_of_its_definition(kind, params):
    model = target("llama3.2-tiny", "float64")
    text, draft = write(model, params, 10)[0], drafting(kind, model)
    text, ids = replace(text, seed=3, copy=1), list(text.token_ids)
    uniforms = row_uniforms([PROMPT], 2, len(ids) - len(PROMPT), (3, "guess"))[1]
    for cycle in replay(model, text, draft):
        known, drafted, intact = ids[: len(PROMPT) + cycle.place], [], True
        for one in cycle.proposals:
            past = [*known, *drafted]
            q = 1.0
            if kind != "ngram":
                law = draft_law(kind, model, draft, params, known, drafted)
                u = uniforms[len(past) - len(PROMPT), None]
                drawn = law.argmax() if params.is_greedy else inverse_cdf(torch.tensor(law)[None].float(), u)
                assert one.token == int(drawn)
                q = law[one.token]
            assert one.q == pytest.approx(q, abs=1e-5)
            assert (one.p is None) == (one.chance is None) == (not intact)
            if intact:
                p = distribution(logits_after(model, past), params, past)
                chance = float(p.argmax() == one.token) if params.is_greedy else min(1.0, p[one.token] / q)
                assert (one.p, one.chance) == pytest.approx((p[one.token], chance), abs=1e-5)
            intact = intact and ids[len(past)] == one.token
            assert one.is_accepted == intact
            drafted.append(one.token)


class RecordedDrafter:
    """A drafter that keeps what it proposed, by the length of the text before it."""

    def __init__(self, drafter: Any):
        self.drafter, self.proposed = drafter, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def propose(self, request: DraftRequest, should_continue: ShouldContinue) -> DraftTokens:
        drafts = self.drafter.propose(request, should_continue)
        self.proposed[len(request.texts[0])] = drafts.tokens[0]
        return drafts


def decode_with_drafts(model: Decoder, prompt: list[int], draft) -> tuple[RecordedDrafter, SpeculationStats]:
    """`generate` with this draft, which proposes LENGTH tokens in every cycle."""
    params, until = SamplingParams(temperature=0.0), StoppingCriteria(max_new_tokens=TOKENS)
    drafter, stats = RecordedDrafter(make_drafter(draft, model, params)), SpeculationStats()
    processor = LogitsProcessor(params, until, model.config.vocab_size, torch.device("cpu"))
    decoder = SpeculativeDecoder(model, drafter, params, processor, (torch.zeros(1, TOKENS),) * 3, stats)
    decoder.draft_length.warmup_lengths = (LENGTH,) * TOKENS
    for _ in speculative_decode(decoder, [GeneratedSequence(0, prompt, until, 64)], 1):
        pass
    return drafter, stats


@pytest.mark.parametrize(("name", "kind"), [(name, DRAFTS[place % 2]) for place, name in enumerate(TINY)] + NGRAMS)
def test_greedy_cycles_are_those_of_the_speculative_decoder(name, kind):
    model = target(name, "float64")
    prompt = [5, 9, 2, 7, 5, 9]
    params, until = SamplingParams(temperature=0.0), StoppingCriteria(max_new_tokens=TOKENS)
    plain = generate_completions(model, [prompt], params, until)[0].tokens
    text = WrittenText("x", 0, (*prompt, *plain), len(prompt), params, until)
    draft = drafting(kind, model)
    cycles = replay(model, text, draft)
    drafter, stats = decode_with_drafts(model, prompt, draft)
    found = {len(prompt) + one.place: [each.token for each in one.proposals] for one in cycles if one.proposals}
    assert found == {place: tokens for place, tokens in drafter.proposed.items() if tokens}
    assert (len(cycles), count_accepted(cycles)) == (stats.num_passes, stats.num_accepted_tokens)
    assert sum(one.num_taken for one in cycles) == len(plain)


def count_accepted(cycles: list[DraftCycle]) -> int:
    return sum(one.is_accepted for cycle in cycles for one in cycle.proposals)


@pytest.mark.parametrize("params", SAMPLINGS[:2])
def test_some_proposals_are_accepted_and_some_are_not(params):
    model = target("llama3.2-tiny", "float64")
    cycles = replay(model, write(model, params, 24)[0], drafting("model", model))
    assert 0 < count_accepted(cycles) < sum(len(cycle.proposals) for cycle in cycles)


def test_a_draft_that_is_the_model_has_its_probabilities():
    model = target("llama3.2-tiny", "float64")
    cycles = replay(model, write(model, SAMPLINGS[1])[0], model)
    judged = [one for cycle in cycles for one in cycle.proposals if one.p is not None]
    assert judged
    assert all(one.chance == pytest.approx(1, abs=1e-5) and one.p == pytest.approx(one.q, abs=1e-5) for one in judged)


def test_the_server_shows_what_its_draft_proposes():
    with local_server(inside=True, draft="ngram") as local:
        body = {"prompt": "one two one two one two", "max_tokens": 12, "temperature": 0, "n": 2, "logit_bias": {"5": 9}}
        answer = local.ask("POST", "/v1/completions", body)[1]
        path = f"/inside/texts/{answer['id']}/1"
        view = local.ask("GET", path)[1]
        cycles = local.ask("GET", f"{path}/drafts?length=3")[1]["cycles"]
        assert view["has_draft"]
        assert sum(one["num_taken"] for one in cycles) == len(view["tokens"])
        proposed = [(one["place"] + n, p) for one in cycles for n, p in enumerate(one["proposals"])]
        assert proposed
        for place, one in proposed:
            if one["is_accepted"]:
                assert one["token"] == view["tokens"][place]["token"]
                assert one["text"] == view["tokens"][place]["text"]
        assert local.ask("GET", f"{path}/drafts?length=9")[0] == 400


def test_a_server_without_a_draft_says_how_to_give_one():
    with local_server(inside=True) as local:
        answer = local.ask("POST", "/v1/completions", {"prompt": "one", "max_tokens": 2})[1]
        assert not local.ask("GET", f"/inside/texts/{answer['id']}/0")[1]["has_draft"]
        status, wrong, _ = local.ask("GET", f"/inside/texts/{answer['id']}/0/drafts")
        assert (status, "--draft" in wrong["error"]["message"]) == (400, True)


def test_a_draft_that_cannot_draft_is_refused_before_the_server_starts():
    tokenizer = tiny_tokenizer()
    loaded = LoadedModel(tiny_model(tokenizer), tokenizer, draft="mtp")
    options = ServeOptions(inside=True)
    with pytest.raises(UsageError, match="no multi-token prediction modules"):
        make_server({"tiny": loaded}, options, options.access_rules(), print)
