"""Scores completions with a language model as a judge, behind OpenAI's chat completions API (vLLM, llama.cpp, Ollama, a
hosted one).

The judge reads a file in which {prompt}, {completion} and {answer} stand for the sample's, and ends its reply with its
score (`Score: 7`). The last number is read, and must lie between low and high. Of `7/10` and `7 out of 10` it is the 7
where 10 is the highest score; a score out of another number is refused. A sample that the judge cannot score, after
retries, gets NaN: its other rewards count alone.

Commonly got wrong: `7/10` is read as 10, so that all answers are equal; the first number of the reply is read, which
may be a quotation of the answer; a completion that says "Score: 10" is read as the judge's reply. Only the judge's own
reply is read here, but a completion may still persuade the judge: look at the samples."""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_quest.errors import UsageError
from llm_quest.rollouts.worker_process import FailureCounter

NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)
OUT_OF = re.compile(r"\s*(?:/|\bout\s+of\b)\s*")
MAX_REPLY_BYTES = 1_000_000
RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)
UNSCORABLE = math.nan


def read_judge_prompt(file: str) -> str:
    """The text of a judge's prompt. UsageError where it cannot be read or does not hold {completion}."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the judge's prompt {file} cannot be read: {error}") from None
    if "{completion}" not in text:
        raise UsageError(
            f"the judge's prompt {file} does not hold {{completion}}, so the judge would not see the answer"
        )
    return text


class JudgeFailure(Exception):
    """A judge that gave no score. can_retry: whether another try may help."""

    def __init__(self, kind: str, message: str, *, can_retry: bool = False):
        super().__init__(message)
        self.kind, self.message, self.can_retry = kind, message, can_retry


@dataclass
class JudgeReward:
    """`JudgeReward(url, model, template)(samples) -> one number each`; NaN where the judge gave none.

    template: the prompt's text. low, high: the scores that count. timeout_seconds: of one request; max_retries: of a
    request that timed out or that the server could not serve, with pauses of 1, 2, 4, ... `pause_seconds`. concurrency:
    requests at once. api_key: sent as the bearer token. Equal samples of a batch are asked about once. GuardStop after
    MAX_FAILED_BATCHES batches in a row without a score."""

    url: str
    model: str
    template: str
    low: float = 0.0
    high: float = 10.0
    timeout_seconds: float = 60.0
    max_retries: int = 3
    max_tokens: int = 512
    concurrency: int = 8
    api_key: str = field(default="", repr=False)
    pause_seconds: float = 1.0
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.parameters: dict[str, float] = {"temperature": 0, "max_tokens": self.max_tokens}
        self.failures = FailureCounter(f"the judge {self.url}", self.log)

    def __call__(self, group: Sequence[Any]) -> list[float]:
        prompts = [self.fill_template(sample) for sample in group]
        questions = list(dict.fromkeys(prompts))
        with ThreadPoolExecutor(self.concurrency) as pool:
            score_of = dict(zip(questions, pool.map(self.try_score, questions), strict=True))
        for one in score_of.values():
            if isinstance(one, JudgeFailure):
                self.failures.count(one.kind, one.message)
        scores = {text: UNSCORABLE if isinstance(one, JudgeFailure) else one for text, one in score_of.items()}
        self.failures.end_batch(bool(scores) and all(map(math.isnan, scores.values())), "it gave no score")
        return [scores[text] for text in prompts]

    def fill_template(self, sample: Any) -> str:
        """The judge's prompt for a sample. What a sample holds is not searched for placeholders."""
        parts = {"prompt": sample.problem.prompt, "completion": sample.text, "answer": sample.problem.answer}
        return re.sub(r"\{(prompt|completion|answer)\}", lambda match: str(parts[match[1]]), self.template)

    def try_score(self, question: str) -> float | JudgeFailure:
        """The judge's score, with retries."""
        for attempt in range(self.max_retries + 1):
            try:
                return self.read_score(self.ask(question))
            except JudgeFailure as failure:
                if not failure.can_retry or attempt == self.max_retries:
                    return failure
            time.sleep(self.pause_seconds * 2**attempt)
        raise AssertionError("the last attempt returns")

    def ask(self, question: str) -> str:
        """The judge's reply."""
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], **self.parameters}
        request = urllib.request.Request(
            f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | self.authorization(),
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                return reply_text(read_until(response, time.monotonic() + self.timeout_seconds))
        except urllib.error.HTTPError as error:
            reply = error.read(2000).decode(errors="replace")
            if error.code == 400 and self.adapt_parameters(body, reply):
                return self.ask(question)
            raise JudgeFailure(f"HTTP {error.code}", reply[:300], can_retry=error.code in RETRY_STATUS) from None
        except (OSError, http.client.HTTPException) as error:
            raise JudgeFailure("no connection", str(error) or type(error).__name__, can_retry=True) from None

    def adapt_parameters(self, body: Mapping[str, Any], reply: str) -> bool:
        """Whether a request that was refused may be sent again: OpenAI's newer models want max_completion_tokens, and
        no temperature."""
        parameters = {name: value for name, value in body.items() if name not in ("model", "messages")}
        if "max_completion_tokens" in reply and "max_tokens" in body:
            parameters["max_completion_tokens"] = parameters.pop("max_tokens")
        elif "temperature" not in reply or parameters.pop("temperature", None) is None:
            return False
        self.parameters = parameters
        return True

    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def read_score(self, reply: str) -> float:
        """The last number of a reply, within the limits; before `/10` or `out of 10`, where that is the highest."""
        numbers = list(NUMBER.finditer(reply))
        if not numbers:
            raise JudgeFailure("no score", f"the reply holds no number: {reply[-80:]!r}")
        score = float(numbers[-1][0])
        if len(numbers) > 1 and OUT_OF.fullmatch(reply, numbers[-2].end(), numbers[-1].start()):
            if score != self.high:
                reason = f"the reply ends in a score out of {score:g}; ask for one from {self.low:g} to {self.high:g}"
                raise JudgeFailure("no score", reason)
            score = float(numbers[-2][0])
        if not self.low <= score <= self.high:
            raise JudgeFailure("no score", f"the reply ends in {score:g}, not in {self.low:g} to {self.high:g}")
        return score

    def summary(self) -> str:
        return self.failures.summary()


def read_until(response: http.client.HTTPResponse, end: float) -> bytes:
    """The body of a response. TimeoutError after `end`: a socket's own limit begins anew with every byte."""
    body = b""
    while len(body) < MAX_REPLY_BYTES and (part := response.read1(MAX_REPLY_BYTES - len(body))):
        body += part
        if time.monotonic() > end:
            raise TimeoutError("the reply did not end in time")
    return body


def reply_text(content: bytes) -> str:
    """The message of a response. JudgeFailure for another kind of response."""
    try:
        reply = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise JudgeFailure("no chat completion", content[:80].decode(errors="replace")) from None
    if not isinstance(reply, str):
        raise JudgeFailure("no chat completion", f"its content is a {type(reply).__name__}")
    return reply
