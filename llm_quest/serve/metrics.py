"""Metrics in Prometheus' text form, under vLLM's names, so that its dashboards work."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llm_quest.serve.requests import GenerationRequest

Samples = dict[tuple[str, str], list[str]]
"""Lines of samples by name and kind of the metric."""

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the buckets of a histogram of times."""


class Histogram:
    """Counts of observations below each bucket's upper end, their sum and their number."""

    def __init__(self, buckets: Sequence[float] = SECONDS):
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.buckets, value)] += 1
        self.sum += value

    def samples(self, name: str, label: str) -> Iterator[str]:
        running = 0
        for end, count in zip((*self.buckets, "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{{label},le="{end}"}} {running}'
        yield f"{name}_sum{{{label}}} {self.sum:.6f}"
        yield f"{name}_count{{{label}}} {running}"


class ServerMetrics:
    """What one model's requests did. The engine's thread writes, any thread reads."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.first_token, self.token_gap, self.request_time = Histogram(), Histogram(), Histogram()

    def count_prompt(self, request: GenerationRequest, cached: int) -> None:
        self.prompt_tokens += len(request.prompt)

    def count_token(self, request: GenerationRequest) -> None:
        """A token of a request was made."""
        self.generation_tokens += 1
        now = time.monotonic()
        if request.first_token is None:
            request.first_token = now
            self.first_token.observe(now - request.arrival)
        else:
            self.token_gap.observe(now - request.last_token)
        request.last_token = now

    def count_end(self, request: GenerationRequest, reason: str) -> None:
        """A request ended. reason: stop, length, abort (its client left) or error."""
        self.finished[reason] += 1
        self.request_time.observe(time.monotonic() - request.arrival)

    def count_read(self, tokens: int, arrival: float) -> None:
        """A request for embeddings ended, which read so many tokens."""
        self.prompt_tokens += tokens
        self.finished["stop"] += 1
        self.request_time.observe(time.monotonic() - arrival)

    def samples(self, label: str) -> Samples:
        """The samples of one model, by metric and kind."""
        ends = "vllm:request_success_total"
        reasons = [f'{ends}{{{label},finished_reason="{why}"}} {n}' for why, n in sorted(self.finished.items())]
        times = {
            "vllm:time_to_first_token_seconds": self.first_token,
            "vllm:inter_token_latency_seconds": self.token_gap,
            "vllm:e2e_request_latency_seconds": self.request_time,
        }
        samples = {(name, "histogram"): list(one.samples(name, label)) for name, one in times.items()}
        counters = {
            "vllm:prompt_tokens_total": self.prompt_tokens,
            "vllm:generation_tokens_total": self.generation_tokens,
        }
        return samples | {(ends, "counter"): reasons} | value_samples("counter", counters, label)


def value_samples(kind: str, values: Mapping[str, float], label: str) -> Samples:
    """One sample for each value."""
    return {(name, kind): [f"{name}{{{label}}} {value:g}"] for name, value in values.items()}


def render_metrics(models: Iterable[Samples]) -> str:
    """Prometheus' text: the samples of all models, each metric once."""
    merged: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for key, lines in model.items():
            merged.setdefault(key, []).extend(lines)
    return "".join(
        f"# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines) for (name, kind), lines in merged.items()
    )


def model_label(model_name: str) -> str:
    escaped = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'model_name="{escaped}"'
