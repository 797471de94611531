"""Every number of the inside view equals a second computation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.serve.inside import TextInside, WrittenText, attention_heads, find_attention, hook
from tests.generation.test_generate import TINY, enlarge_weights
from tests.serve.local_server import LocalServer, local_server

PROMPT = [5, 9, 2, 7, 7, 1, 30]
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=1.3, min_p=0.1, frequency_penalty=0.5, presence_penalty=0.2, logit_bias=((4, 1.5),)),
    SamplingParams(top_p=0.8, repetition_penalty=1.3),
)


@pytest.fixture(params=TINY)
def model(request) -> Decoder:
    return enlarge_weights(build(request.param, seed=1, dtype="float64"))


@pytest.fixture
def qwen() -> Decoder:
    return enlarge_weights(build("qwen3-tiny", seed=1, dtype="float64"))


def write(model: Decoder, params: SamplingParams, tokens: int = 12) -> tuple[WrittenText, list[float]]:
    """A text, and the log-probabilities that its sampler reported."""
    until = StoppingCriteria(max_new_tokens=tokens)
    done = generate_completions(model, [PROMPT], params, until, seed=2)[0]
    return WrittenText("x", 0, (*PROMPT, *done.tokens), len(PROMPT), params, until), done.logprobs


def plain_filters(logits: np.ndarray, params: SamplingParams, past: Sequence[int]) -> np.ndarray:
    """The distribution that is drawn from, by its definition, in float64."""
    x = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        x[token] += bias
    if params.repetition_penalty != 1:
        for token in set(past):
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(past[len(PROMPT) :]):
        x[token] -= params.presence_penalty + params.frequency_penalty * list(past[len(PROMPT) :]).count(token)
    if params.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(float)
    p = np.exp((x - x.max()) / params.temperature)
    p /= p.sum()
    for name in ("top_k", "top_p", "min_p"):
        value, order = getattr(params, name), np.argsort(-p, kind="stable")
        if value is None:
            continue
        before = np.cumsum(p[order]) - p[order]
        kept = {"top_k": np.arange(len(p)) < value, "top_p": before < value, "min_p": p[order] >= value * p.max()}[name]
        p[order[~kept]] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize("params", SAMPLINGS)
def test_the_steps_of_sampling_are_those_of_the_definition(qwen, params):
    text, reported = write(qwen, params)
    views = TextInside(qwen, text).tokens(97)
    with torch.no_grad():
        logits = qwen(torch.tensor([text.token_ids]))[0].double()
    for place, view, logprob in zip(range(len(PROMPT), 99), views, reported, strict=False):
        row = logits[place - 1]
        own = row.log_softmax(-1)
        expected = plain_filters(row.numpy(), params, text.token_ids[:place])
        found = {one.token: one.probabilities for one in view.alternatives}
        assert view.token == text.token_ids[place]
        assert view.logprob == pytest.approx(float(own[view.token]), abs=1e-5)
        assert view.surprise == pytest.approx(-view.logprob / math.log(2))
        assert view.entropy == pytest.approx(float(-(own.exp() * own).sum()) / math.log(2), abs=1e-4)
        assert view.rank == sorted(own.tolist(), reverse=True).index(float(own[view.token])) + 1
        assert [found[token][0] for token in range(97)] == pytest.approx(own.exp().tolist(), abs=1e-5)
        assert [found[token][-1] for token in range(97)] == pytest.approx(expected.tolist(), abs=1e-5)
        if not params.is_greedy:
            assert math.log(found[view.token][-1]) == pytest.approx(logprob, abs=1e-4)
    assert len(views) == len(reported)


def test_only_the_steps_in_use_are_shown(qwen):
    shown = [TextInside(qwen, write(qwen, params)[0]).tokens(3)[0].steps for params in SAMPLINGS]
    assert shown == [
        ("model", "greedy"),
        ("model", "temperature", "top_k", "top_p", "min_p"),
        ("model", "penalties", "temperature", "min_p"),
        ("model", "penalties", "top_p"),
    ]


def test_attention_weights_make_the_output_of_their_head(model):
    """The weights times the values are what the fused kernel computes; rows see nothing later."""
    text = write(model, SAMPLINGS[0], 5)[0]
    inside, heads = TextInside(model, text), attention_heads(model)
    for layer, count in enumerate(heads):
        if count == 0:
            with pytest.raises(UsageError, match="no attention weights"):
                inside.attention(layer, 0)
            continue
        kept: list[Any] = []
        with hook(find_attention(model, layer).attend, lambda _, inputs, out: kept.append((inputs[2], out))):  # noqa: B023
            model(torch.tensor([text.token_ids]))
        v, out = kept[0]
        for head in (0, count - 1):
            weights = inside.attention(layer, head)
            expected = weights.double() @ v[0, :, head // (count // v.shape[2])].double()
            torch.testing.assert_close(expected, out[0, :, head].double(), atol=1e-5, rtol=1e-4)
            assert not weights.triu(1).any()
            assert weights.sum(-1).max() <= 1 + 1e-5
        with pytest.raises(UsageError, match="no head"):
            inside.attention(layer, count)


def test_the_last_layer_of_the_lens_is_the_model_itself(model):
    text = write(model, SAMPLINGS[0], 4)[0]
    lens = TextInside(model, text).lens(3)
    assert len(lens) == len(model.blocks)
    with torch.no_grad():
        own = model(torch.tensor([text.token_ids]))[0, len(PROMPT) - 1 : -1].float().softmax(-1)
    for row, found in zip(own, lens[-1], strict=True):
        assert [token for token, _ in found] == row.topk(3).indices.tolist()
        assert [value for _, value in found] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


def test_a_layer_of_the_lens_is_the_model_cut_behind_it(qwen):
    text = write(qwen, SAMPLINGS[0], 4)[0]
    first = TextInside(qwen, text).lens(2)[0]
    del qwen.blocks[1:]
    with torch.no_grad():
        own = qwen(torch.tensor([text.token_ids]))[0, len(PROMPT) - 1 : -1].float().softmax(-1)
    assert [[token for token, _ in row] for row in first] == own.topk(2).indices.tolist()


def test_the_experts_are_those_that_the_router_scores_highest():
    model = enlarge_weights(build("mixtral-tiny", seed=1, dtype="float64"))
    text = write(model, SAMPLINGS[0], 4)[0]
    routing = TextInside(model, text).routing()
    assert len(routing) == len(model.blocks)
    kept: list[torch.Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    with hook(torch.nn.ModuleList(routers), lambda router, inputs, out: kept.append(inputs[0] @ router.weight.T)):
        model(torch.tensor([text.token_ids]))
    for layer, logits in zip(routing, kept, strict=True):
        top = logits.reshape(-1, logits.shape[-1]).topk(2)
        assert [sorted(token for token, _ in row) for row in layer] == [sorted(row) for row in top.indices.tolist()]
        weights = [sorted(weight for _, weight in row) for row in layer]
        assert np.allclose(weights, top.values.softmax(-1).sort(-1).values.detach().numpy(), atol=1e-5)
    assert TextInside(enlarge_weights(build("gpt2-tiny", seed=1)), text).routing() == []


def test_a_dense_layer_before_those_with_experts_keeps_its_number():
    model = enlarge_weights(build("deepseek-v3-tiny", seed=1))
    with_experts = [any(type(part).__name__.endswith("Router") for part in block.modules()) for block in model.blocks]
    assert with_experts.index(True) > 0
    text = write(model, SAMPLINGS[0], 3)[0]
    assert [len(layer) for layer in TextInside(model, text).routing()] == [
        len(text.token_ids) * has for has in with_experts
    ]


@pytest.fixture(scope="module")
def local() -> Iterator[LocalServer]:
    with local_server(inside=True, slots=4) as running:
        yield running


def test_the_views_of_a_served_text_are_its_numbers(local):
    body = {"prompt": "Once upon", "max_tokens": 9, "seed": 1, "n": 2, "logprobs": 3, "top_p": 0.9}
    answer = local.ask("POST", "/v1/completions", body)[1]
    listed = local.ask("GET", "/inside/texts")[1]["texts"]
    assert [(one["id"], one["choice"]) for one in listed[:2]] == [(answer["id"], 1), (answer["id"], 0)]
    for choice in answer["choices"]:
        path = f"/inside/texts/{answer['id']}/{choice['index']}"
        view = local.ask("GET", f"{path}?top=4")[1]
        logprobs = choice["logprobs"]
        assert [one["text"] for one in view["tokens"]] == logprobs["tokens"]
        assert [one["logprob"] for one in view["tokens"]] == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
        for token, top in zip(view["tokens"], logprobs["top_logprobs"], strict=True):
            assert {one["text"] for one in token["alternatives"][:3]} == set(top)
        lens = local.ask("GET", f"{path}/lens?top=2")[1]["layers"]
        assert len(lens) == view["layers"] == len(view["heads"])
        best = [token["alternatives"][0] for token in view["tokens"]]
        assert [row[0]["p"] for row in lens[-1]] == pytest.approx([one["probabilities"][0] for one in best], abs=1e-4)
        assert local.ask("GET", f"{path}/routing")[1] == {"layers": []}


def test_an_attention_matrix_comes_as_float16_with_its_shape(local):
    answer = local.ask("POST", "/v1/completions", {"prompt": "Once upon", "max_tokens": 3})[1]
    path = f"/inside/texts/{answer['id']}/0/attention"
    raw = local.send(f"GET {path}?layer=1&head=2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, content = raw.partition(b"\r\n\r\n")
    shape = re.search(rb"x-shape: (\d+),(\d+)", head)
    matrix = np.frombuffer(content, "<f2").reshape(int(shape[1]), int(shape[2]))
    _, text = local.server.inside.texts[answer["id"], 0]
    expected = TextInside(local.served.batch.model, text).attention(1, 2)
    assert np.allclose(matrix, expected.numpy(), atol=1e-3)
    for query in ("layer=99&head=0", "layer=0&head=99", "layer=-1&head=0", "layer=x&head=0"):
        status, wrong, _ = local.ask("GET", f"{path}?{query}")
        assert (status, set(wrong["error"])) == (400, {"message", "type", "param", "code"})
    assert local.ask("GET", "/inside/texts/none/0")[0] == 404


def test_the_page_is_served_with_a_policy_and_names_nothing_elsewhere(local):
    for path, kind in (
        ("/inside", "text/html"),
        ("/inside/page.js", "text/javascript"),
        ("/inside/page.css", "text/css"),
    ):
        status, content, headers = local.ask("GET", path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|\son\w+=|style=", content)


def test_a_schema_is_one_of_the_steps(local):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 6, "response_format": form, "seed": 1}
    answer = local.ask("POST", "/v1/chat/completions", body)[1]
    view = local.ask("GET", f"/inside/texts/{answer['id']}/0?top=20")[1]
    first = view["tokens"][0]
    assert first["steps"] == ["model", "penalties"]
    kept = [one["text"] for one in first["alternatives"] if one["probabilities"][1] > 0]
    assert kept
    assert all(one.lstrip()[:1] in ("{", "") for one in kept)


def test_without_the_option_there_is_no_view():
    with local_server() as plain:
        assert plain.ask("GET", "/inside")[0] == plain.ask("GET", "/inside/texts")[0] == 404


def test_a_key_guards_the_texts_and_not_the_page(tmp_path):
    (tmp_path / "keys").write_text("first-key-123\n")
    with local_server(inside=True, api_key_file=tmp_path / "keys") as guarded:
        assert guarded.ask("GET", "/inside")[0] == 200
        assert guarded.ask("GET", "/inside/texts")[0] == 401
        assert guarded.ask("GET", "/inside/texts", None, {"Authorization": "Bearer first-key-123"})[0] == 200
