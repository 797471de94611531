"""A language model as a judge, against a server of this test: scores, retries, limits, and what is no score."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.problems import Problem
from llm_quest.errors import GuardStop, UsageError
from llm_quest.rollouts.judge_reward import JudgeReward, read_judge_prompt
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.worker_process import MAX_FAILED_BATCHES

TEMPLATE = "Rate the answer to {prompt} from 0 to 10.\n---\n{completion}\n---\nEnd with Score: N."


class Server(ThreadingHTTPServer):
    """Judges by what the completion says: `score 7`, `status 503`, `reply TEXT`, `sleep`, `raw TEXT`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.times_failed: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(request)
        server.headers.append((self.path, self.headers["Authorization"]))
        word, _, rest = request["messages"][0]["content"].split("---\n")[1].strip().partition(" ")
        if word == "sleep":
            time.sleep(1.0)
        if word == "newer" and (wrong := {"max_tokens", "temperature"} & set(request)):
            wanted = "use 'max_completion_tokens' instead" if "max_tokens" in wrong else "only the default temperature"
            return self.send(400, json.dumps({"error": {"message": wanted}}).encode())
        if word in ("short", "trickle", "gibberish"):
            return self.send_badly(word)
        if word == "status" or (word == "once" and server.times_failed.setdefault(rest, 0) == 0):
            server.times_failed[rest] = 1
            return self.send(int(rest) if word == "status" else 503, b"try later")
        said = {"score": f"I read 3 things. Score: {rest}", "reply": rest, "raw": rest}
        reply = said.get(word, f"Score: {len(word) % 5}")
        body = rest if word == "raw" else json.dumps({"choices": [{"message": {"content": reply}}]})
        return self.send(200, body.encode())

    def send(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the judge's time was up

    def send_badly(self, how: str) -> None:
        """Less than was promised, a byte at a time, or no HTTP."""
        if how == "gibberish":
            self.wfile.write(b"no http\r\n\r\n")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked") if how == "short" else None
        self.end_headers()
        self.wfile.write(b"400\r\n{")
        for _ in range(8 if how == "trickle" else 0):
            time.sleep(0.1)
            try:
                self.wfile.write(b" ")
            except OSError:
                return

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def judge(server: Server, **options: Any) -> JudgeReward:
    options = {"pause_seconds": 0.0, "log": lambda line: None, "timeout_seconds": 10.0} | options
    return JudgeReward(server.url, "judge-1", TEMPLATE, **options)


def sample(text: str) -> Sample:
    return Sample((1,), (2,), (0.0,), "eos", text, Problem("2+2?", "4", "equal", ""))


def test_the_judges_last_number_is_the_reward(server: Server):
    reward = judge(server, api_key="secret")
    assert reward([sample("score 7"), sample("score 2.5"), sample("score 7")]) == [7.0, 2.5, 7.0]
    assert len(server.requests) == 2, "equal samples are asked about once"
    assert server.requests[0]["model"] == "judge-1"
    assert "2+2?" in server.requests[0]["messages"][0]["content"]
    assert server.headers[0] == ("/v1/chat/completions", "Bearer secret")
    assert reward.summary() == ""
    assert "secret" not in repr(reward)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7/10", 7.0), ("7 / 10.", 7.0), ("I give it 6.5 out of 10", 6.5), ("**10/10**", 10.0), (".5", 0.5),
        ("1) clear 2) short; 8", 8.0), ("step1: good. Score:3", 3.0), ("3 of the 4 points, so 4/5", math.nan),
        ("8/20", math.nan), ("-1", math.nan), ("v2", math.nan),
    ],
)  # fmt: skip
def test_a_score_out_of_the_highest_is_the_score(reply: str, score: float, server: Server):
    assert judge(server)([sample(f"reply {reply}")]) == pytest.approx([score], nan_ok=True)


def test_a_model_that_takes_no_temperature_and_another_limit_is_asked_as_it_wants(server: Server):
    reward = judge(server, max_retries=0, max_tokens=99, concurrency=4)
    texts = [f"newer {number}" for number in range(6)]
    assert reward([sample(text) for text in texts]) == [0.0] * 6
    assert {key for key in server.requests[-1] if key not in ("model", "messages")} == {"max_completion_tokens"}
    assert server.requests[-1]["max_completion_tokens"] == 99
    asked = len(server.requests)
    reward([sample("newer 7")])
    assert len(server.requests) == asked + 1, "once it is known"


def test_the_whole_url_may_be_given(server: Server):
    reward = JudgeReward(f"{server.url}/chat/completions/", "m", TEMPLATE, log=lambda line: None)
    assert reward([sample("score 3")]) == [3.0]
    assert server.headers[0][0] == "/v1/chat/completions"


def test_a_server_that_is_busy_is_asked_again(server: Server):
    reward = judge(server)
    assert reward([sample("once a")]) == [4.0]
    assert len(server.requests) == 2
    assert reward.summary() == ""


@pytest.mark.parametrize(
    ("text", "kind", "requests"),
    [
        ("status 503", "HTTP 503", 3), ("status 401", "HTTP 401", 1), ("reply I cannot say", "no score", 1),
        ("score 11", "no score", 1), ("raw <html>", "no chat completion", 1), ("raw {}", "no chat completion", 1),
        ('raw {"choices": [{"message": {"content": null}}]}', "no chat completion", 1), ("sleep", "no connection", 3),
        ("short", "no connection", 3), ("trickle", "no connection", 3), ("gibberish", "no connection", 3),
    ],
)  # fmt: skip
def test_what_is_no_score_is_unscorable_counted_and_told_once(text: str, kind: str, requests: int, server: Server):
    lines: list[str] = []
    reward = judge(server, max_retries=2, timeout_seconds=0.3, log=lines.append)
    found = reward([sample(text), sample("score 5")])
    assert math.isnan(found[0])
    assert found[1] == 5.0
    assert len(server.requests) == requests + 1
    reward([sample(text), sample("score 5")])
    assert reward.summary() == f"{kind}: 2"
    assert len(lines) == 1
    assert kind in lines[0]


def test_no_server_at_all_ends_the_run_after_some_batches():
    reward = JudgeReward("http://127.0.0.1:9/v1", "m", TEMPLATE, max_retries=0, log=lambda line: None)
    for _ in range(MAX_FAILED_BATCHES - 1):
        assert math.isnan(reward([sample("a")])[0])
    with pytest.raises(GuardStop, match="failed on 5 batches in a row: it gave no score"):
        reward([sample("a")])


def test_a_completion_that_holds_a_placeholder_stays_as_it_is(server: Server):
    filled = judge(server).fill_template(sample("{prompt} {answer} {x}"))
    assert "---\n{prompt} {answer} {x}\n---" in filled


def test_a_prompt_in_which_the_judge_would_not_see_the_answer_is_refused(tmp_path: Path):
    (tmp_path / "p.txt").write_text("Rate {prompt}")
    with pytest.raises(UsageError, match=r"does not hold \{completion\}"):
        read_judge_prompt(str(tmp_path / "p.txt"))
