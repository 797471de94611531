"""The server as OpenAI's own client sees it, on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_quest.errors import DataError, UsageError
from llm_quest.generation.generate import generate
from llm_quest.serve.app import HttpLimits
from llm_quest.serve.chat_prompts import message_for_template, message_with_parts
from llm_quest.serve.embeddings import EmbeddingsBody
from llm_quest.serve.errors import ApiError
from llm_quest.serve.protocol import ChatBody, ChatMessage, CompletionBody, parse_body
from llm_quest.serve.security import AccessRules, host_name, make_access_rules
from llm_quest.serve.server import bind_socket
from tests.later import Later
from tests.serve.local_server import LocalServer, local_server, tiny_adapter

openai, types, chat = Later("openai"), Later("openai.types"), Later("openai.types.chat")

IMAGE_URLS = ("data:image/png;base64,iVBORw0KGgo=", "http://127.0.0.1:9/cat.png", "file:///etc/hostname")
ASK: list[Any] = [{"role": "user", "content": "The quick brown fox"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def local() -> Iterator[LocalServer]:
    with local_server(slots=8, max_waiting=400, log_requests=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(local: LocalServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=local.url, api_key="none", max_retries=0)


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def about_image(url: str) -> dict[str, Any]:
    """A question about an image, in OpenAI's form."""
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}]}


def test_models_are_listed_and_found_by_name(client):
    listed = client.models.list().data
    assert [one.id for one in listed] == ["tiny", "adapted"]
    assert types.Model.model_validate(client.models.retrieve("adapted").model_dump(), strict=True).id == "adapted"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-7")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("name", ["tiny", "adapted"])
def test_a_completion_is_the_text_that_generate_writes(local, client, name, sampling):
    served = local.server.served[name]
    found = client.completions.create(model=name, prompt="The lazy dog. Once", max_tokens=20, n=2, **sampling)
    types.Completion.model_validate(found.model_dump(), strict=True)
    model = served.batch.model if name == "tiny" else tiny_adapter(served.tokenizer)
    ids = served.tokenizer.encode("The lazy dog. Once")
    expected = generate(
        model, [ids], max_new_tokens=20, n=2, tokenizer=served.tokenizer, eos_token_id=served.eos_token_ids, **sampling
    )
    assert [one.text for one in found.choices] == [one.text for one in expected]
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == sum(len(one.tokens) for one in expected)


def test_a_chat_answer_has_openais_form_and_its_stream_the_same_text(client):
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 12, "seed": 1, "n": 2}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    chat.ChatCompletion.model_validate(whole.model_dump(), strict=True)
    texts, reasons, chunks = ["", ""], [None, None], []
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        chat.ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        chunks.append(chunk)
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [one.message.content for one in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [one.finish_reason for one in whole.choices]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert all(one.usage is None for one in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({(one.id, one.created) for one in chunks}) == 1


def test_log_probabilities_are_the_models_own(client):
    options: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 6, "logprobs": True, "top_logprobs": 4}
    plain = client.chat.completions.create(**options, temperature=0)
    odd = client.chat.completions.create(**options, temperature=0, logit_bias={"7": -100}, presence_penalty=0.0)
    for token in plain.choices[0].logprobs.content:
        best = token.top_logprobs[0]
        assert (best.token, best.logprob) == (token.token, token.logprob)
        assert len(token.top_logprobs) == 4
        assert bytes(token.bytes).decode(errors="replace")
    first, again = (one.choices[0].logprobs.content[0].top_logprobs for one in (plain, odd))
    assert [one.token for one in again] == [one.token for one in first]
    assert [one.logprob for one in again] == pytest.approx([one.logprob for one in first], abs=1e-5)


def test_echo_scores_a_prompt(local, client):
    text = "The quick brown fox jumps over"
    found = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=1)
    served, logprobs = local.served, found.choices[0].logprobs
    ids = served.tokenizer.encode(text)
    with torch.no_grad():
        scores = served.batch.model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = [float(scores[at, token]) for at, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(logprobs.tokens).endswith(text)
    assert found.choices[0].text.endswith(text)
    assert found.usage.completion_tokens == 0


def test_a_stop_string_ends_the_text_before_it(local, client):
    options: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 30}
    whole = client.completions.create(**options).choices[0]
    stop = whole.text[4:7]
    cut = client.completions.create(**options, stop=[stop, "never there"]).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert whole.finish_reason == "length"


def test_several_prompts_of_ids_and_texts_are_numbered_through(local, client):
    ids = local.served.tokenizer.encode("The cat")
    texts = client.completions.create(
        model="tiny", prompt=["Once", "The cat"], max_tokens=5, n=2, seed=3, temperature=1
    )
    lists = client.completions.create(model="tiny", prompt=[ids], max_tokens=5, n=2, seed=3)
    assert [one.index for one in texts.choices] == [0, 1, 2, 3]
    assert [one.text for one in texts.choices[2:]] == [one.text for one in lists.choices]


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_a_schema_is_followed(client, kind):
    form: Any = {"type": kind}
    if kind == "json_schema":
        form["json_schema"] = {"name": "person", "schema": SCHEMA, "strict": True}
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=150, seed=4, response_format=form, logit_bias={"1": 1}
    )
    choice = found.choices[0]
    if choice.finish_reason == "stop":
        value = json.loads(choice.message.content)
        assert isinstance(value, dict)
        assert kind == "json_object" or {*value} == {"name", "age"}
        assert kind == "json_object" or 0 <= value["age"] <= 99
    else:
        assert choice.message.content.lstrip().startswith("{")
        assert kind == "json_object"


def test_a_schema_with_an_unknown_type_is_refused(client):
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "person"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as caught:
        client.chat.completions.create(model="tiny", messages=ASK, response_format=form)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("field", "value", "param", "words"),
    [
        ("prompt", [], "prompt", "at least 1 item"),
        ("prompt", [[]], "prompt.0", "at least 1 item"),
        ("prompt", [1, "a"], "prompt.1", "valid integer"),
        ("prompt", [-1], "prompt.0", "greater than or equal to 0"),
        ("prompt", {"a": 1}, "prompt", "valid string"),
        ("stop", ["a"] * 17, "stop", "at most 16 items"),
        ("stop", [3], "stop.0", "valid string"),
        ("logit_bias", {"x": 1}, "logit_bias", "logit_bias: 'x' is no token id"),
        ("input", [], "input", "at least 1 item"),
        ("messages", [{"role": "user", "content": 3}], "messages.0.content", "valid string"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_wrong_whatever_kinds_it_may_be_of(field, value, param, words):
    kind: Any = {"input": EmbeddingsBody, "messages": ChatBody}.get(field, CompletionBody)
    with pytest.raises(ApiError, match=re.escape(words)) as caught:
        parse_body(kind, json.dumps({"prompt": "a", field: value}).encode())
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


def test_sixty_four_streams_at_once_are_all_answered_and_equal_those_alone(local):
    """Eight slots; greedy texts, so that each is known."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=f"The dog {number % 8}", max_tokens=5 + number % 8, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=local.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    found = asyncio.run(ask_all())
    assert found == found[:8] * 8
    assert local.served.batch.slots.lengths == []


def test_a_client_that_leaves_frees_its_slot(local, client):
    batch = local.served.batch
    before = batch.metrics.finished["abort"]
    stream = client.completions.create(
        model="tiny", prompt="Once", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert batch.num_running == 1
    stream.close()
    wait_until(lambda: batch.num_running == 0)
    assert batch.metrics.finished["abort"] == before + 1

    body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 240, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{local.port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", local.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: batch.num_running == 1)
    wait_until(lambda: batch.num_running == 0)
    assert batch.metrics.finished["abort"] == before + 2


def test_the_same_beginning_is_computed_once(client):
    opening = "Once upon a time there was a cat, and 12 dogs. " * 2
    first = client.completions.create(model="tiny", prompt=opening + "The", max_tokens=2, temperature=0)
    again = client.completions.create(model="tiny", prompt=opening + "User", max_tokens=2, temperature=0)
    assert first.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens_details.cached_tokens
    assert again.usage.prompt_tokens_details.cached_tokens > 20


def test_a_prompt_beyond_the_context_names_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"256 tokens; the prompt has \d+: shorten") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "fox " * 400}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(
        openai.BadRequestError, match=r"has 2, and 300 more are asked for: ask for at most 254"
    ) as caught:
        client.completions.create(model="tiny", prompt=[1, 2], max_tokens=300)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_metrics_count_what_happened(local):
    status, text, headers = local.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert text.count("# TYPE vllm:prompt_tokens_total counter") == 1
    made = local.served.batch.metrics.generation_tokens
    assert f'vllm:generation_tokens_total{{model_name="tiny"}} {made:g}' in text
    assert 'vllm:num_requests_running{model_name="adapted"} 0' in text
    assert 'vllm:time_to_first_token_seconds_bucket{model_name="tiny",le="+Inf"}' in text


def test_the_log_holds_no_prompt(local):
    assert local.lines
    assert not any("fox" in line or "dog" in line for line in local.lines)


def test_tokens_of_a_text_and_back(local):
    status, found, _ = local.ask("POST", "/tokenize", {"prompt": "The cat"})
    assert status == 200
    assert found["tokens"] == local.served.tokenizer.encode("The cat")
    assert local.ask("POST", "/detokenize", {"tokens": found["tokens"]})[1]["prompt"].endswith("The cat")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("GET", "/nothing", None, {}, 404, "no such path"),
        ("GET", "/v1/completions", None, {}, 405, "GET is not"),
        ("POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"}, 415, "application/json"),
        ("POST", "/v1/completions", b"{", {}, 400, "no JSON"),
        ("POST", "/v1/completions", b"[" * 5000, {}, 400, "nested too deeply"),
        ("POST", "/v1/completions", b"\xff", {}, 400, "no JSON"),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', {}, 400, "NaN"),
        ("POST", "/v1/completions", {"prompt": "a", "temperature": "1"}, {}, 400, "temperature"),
        ("POST", "/v1/completions", {"prompt": "a", "n": 17}, {}, 400, "n: "),
        ("POST", "/v1/completions", {"prompt": "\ud800"}, {}, 400, "surrogate"),
        ("POST", "/v1/completions", {"prompt": [99999]}, {}, 400, "99999"),
        ("POST", "/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, {}, 400, "99999"),
        ("POST", "/v1/completions", {"prompt": "a", "stop": ""}, {}, 400, "stop"),
        ("POST", "/v1/chat/completions", {"messages": []}, {}, 400, "messages"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "king", "content": ""}]}, {}, 400, "role"),
        *(("POST", "/v1/chat/completions", about_image(url), {}, 400, "reads no images") for url in IMAGE_URLS),
        ("POST", "/v1/chat/completions", {"messages": ASK, "tool_choice": "required"}, {}, 400, "tool"),
        ("POST", "/v1/chat/completions", {"messages": ASK, "tools": [{"type": "function"}]}, {}, 400, "no tools"),
        ("POST", "/v1/embeddings", {"input": "a"}, {}, 404, "makes no embeddings"),
        ("GET", "/health", None, {"Origin": "http://evil.example"}, 403, "Origin"),
        ("GET", "/health", None, {"Origin": "null"}, 403, "Origin"),
        ("GET", "/health", None, {"Host": "evil.example"}, 403, "Host"),
    ],
)
def test_a_wrong_request_is_answered_in_openais_form(local, method, path, body, headers, status, words):
    found, answer, _ = local.ask(method, path, body, headers)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]


def test_a_body_beyond_the_limit_is_refused_whether_or_not_it_says_its_length(local):
    limit = local.server.limits.body_bytes
    status, answer, _ = local.ask("POST", "/v1/completions", b"", {"Content-Length": str(limit + 1)})
    assert status == 413
    assert "bytes" in answer["error"]["message"]
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    raw = local.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4 + b"1\r\n \r\n0\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_answered_429_and_a_late_request_504(local, client, monkeypatch):
    monkeypatch.setattr(local.server.engine, "max_waiting", 0)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="Once", max_tokens=4)
    assert caught.value.response.headers["retry-after"] == "1"
    monkeypatch.setattr(local.server.engine, "max_waiting", 4)
    monkeypatch.setattr(local.server, "limits", HttpLimits(request_seconds=0.0))
    with pytest.raises(openai.InternalServerError) as late:
        client.completions.create(model="tiny", prompt="Once", max_tokens=4)
    assert late.value.status_code == 504
    assert late.value.code == "timeout"
    wait_until(lambda: local.served.batch.num_running == 0)


def test_a_key_opens_the_server(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# for tests\nfirst-key-123\nsecond-key-456\n")
    with local_server(api_key_file=file, allow_origins=("http://page.example",), log_requests=True) as guarded:
        for key in ("first-key-123", "second-key-456"):
            assert openai.OpenAI(base_url=guarded.url, api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=guarded.url, api_key="first-key-12", max_retries=0).models.list()
        assert caught.value.code == "invalid_api_key"
        assert guarded.ask("GET", "/health")[0] == 200
        status, _, headers = guarded.ask("OPTIONS", "/v1/models", None, {"Origin": "http://page.example"})
        assert status == 204
        assert headers["access-control-allow-origin"] == "http://page.example"
        assert not any("key" in line for line in guarded.lines)


def test_only_loopback_is_open_without_a_key(tmp_path):
    with pytest.raises(UsageError, match="--api-key-file"):
        make_access_rules("0.0.0.0", None, (), ())
    (tmp_path / "empty").write_text("\n# nothing\n")
    with pytest.raises(DataError, match="has no API key"):
        make_access_rules("127.0.0.1", tmp_path / "empty", (), ())
    with pytest.raises(DataError, match="No such file"):
        make_access_rules("127.0.0.1", tmp_path / "none", (), ())
    (tmp_path / "keys").write_text("long-enough-key\n")
    rules = make_access_rules("0.0.0.0", tmp_path / "keys", ["box.local"], ())
    assert rules.knows_host("10.0.0.7")
    assert rules.knows_host("box.local")
    assert not rules.knows_host("evil.example")
    assert not AccessRules().knows_host("10.0.0.7")
    assert [host_name(one) for one in ("[::1]:80", "LocalHost:8000", "a.b")] == ["::1", "localhost", "a.b"]


def test_a_port_in_use_is_one_message(local):
    with pytest.raises(UsageError, match=f"port {local.port} of 127.0.0.1 is in use"):
        bind_socket("127.0.0.1", local.port)


def test_parts_of_text_are_one_text_and_other_parts_are_refused() -> None:
    parts = [{"type": kind, "text": kind[0]} for kind in ("text", "input_text", "output_text")]
    assert message_for_template(ChatMessage(role="user", content=parts), 0)["content"] == "tio"
    for write in (message_for_template, message_with_parts):
        with pytest.raises(ApiError, match="no parts of this type"):
            write(ChatMessage(role="user", content=[*parts, {"type": "refusal"}]), 0)
