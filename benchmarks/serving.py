"""The server under load: clients in loops on loopback, each request answered, memory flat, tokens per second against
`generate` with a batch as large as the server's slots; and the time to the first token of a 512-token prompt.

python -m benchmarks.serving [--clients 200] [--requests 1] [--slots 32] [--new 64] [--rounds 3] [--shape 11m]
       [--stream]
python -m benchmarks.serving --drafts       what a pass costs that checks drafts

The server is a process of its own with one thread. A round is a pair, `generate` and the server, each by the clock and
by its processor time (user and system), for clients, server and other programs may share the cores. The ratio of a
round is of the same kind of time on both sides; the last line has the medians."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import llm_quest as quest
from benchmarks.generation import SHAPES
from llm_quest.data.corpus import pydoc_topics
from llm_quest.data.vocabulary import train_bpe
from llm_quest.generation.generate import generate
from llm_quest.hub.load_save import save
from llm_quest.scope import Scope

PROMPT, LONG_PROMPT = 64, 512


class Rate(NamedTuple):
    """Tokens, and the seconds of the clock, of the processor for the program and for the system on its behalf."""

    tokens: int
    wall: float
    user: float
    system: float

    @property
    def by_clock(self) -> float:
        return self.tokens / self.wall

    @property
    def by_processor(self) -> float:
        return self.tokens / (self.user + self.system)

    def __str__(self) -> str:
        spent = f"{self.wall:.1f} s, {self.user:.1f} user + {self.system:.1f} system"
        return f"{self.by_clock:,.0f} tokens/s by the clock, {self.by_processor:,.0f} by the processor ({spent})"


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random ids, so that no prompt begins like another."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(300, vocab_size, (count, length), generator=draw).tolist()


@contextmanager
def server_process(folder: Path, slots: int) -> Iterator[tuple[psutil.Process, int]]:
    """`quest serve` and its port."""
    command = [sys.executable, "-m", "llm_quest", "serve", str(folder), "--port", "0", "--slots", str(slots)]
    command += [
        "--max-waiting",
        "10000",
        "--prefix-cache",
        "32",
        "--threads",
        "1",
        "--max-model-len",
        "640",
        "--dtype",
        "float32",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        try:
            yield psutil.Process(process.pid), int(line.partition("127.0.0.1:")[2].partition("/")[0])
        finally:
            process.terminate()


async def ask(port: int, body: dict[str, Any]) -> int:
    """One request over a connection of its own; the number of tokens of its answer."""
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw)
    status, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b" 200 " in status.split(b"\r\n")[0] + b" ", status[:200]
    if body.get("stream"):
        usage = next(line for line in reversed(answer.splitlines()) if b'"usage":{' in line)
        return int(json.loads(usage.partition(b"data: ")[2])["usage"]["completion_tokens"])
    return int(json.loads(answer)["usage"]["completion_tokens"])


async def load(port: int, clients: list[list[dict[str, Any]]]) -> list[int]:
    """Each client sends its requests one after another; the tokens of all answers."""

    async def client(bodies: list[dict[str, Any]]) -> list[int]:
        return [await ask(port, body) for body in bodies]

    return [tokens for found in await asyncio.gather(*map(client, clients)) for tokens in found]


class Stopwatch:
    """Measures what a process spends from here on."""

    def __init__(self, process: psutil.Process):
        self.process, self.wall, self.times = process, time.perf_counter(), process.cpu_times()

    def rate(self, tokens: int) -> Rate:
        wall, times = time.perf_counter(), self.process.cpu_times()
        return Rate(tokens, wall - self.wall, times.user - self.times.user, times.system - self.times.system)


def run_load(process: psutil.Process, port: int, bodies: list[dict[str, Any]], clients: int) -> Rate:
    """The rate of the server; every body is answered."""
    watch = Stopwatch(process)
    counts = asyncio.run(load(port, [bodies[number::clients] for number in range(clients)]))
    assert len(counts) == len(bodies), "a request was lost"
    return watch.rate(sum(counts))


def run_generate(model: Any, ids: list[list[int]], new: int) -> Rate:
    """The rate of one batch."""
    watch = Stopwatch(psutil.Process())
    done = generate(model, ids, max_new_tokens=new, temperature=0.0, eos_token_id=())
    return watch.rate(sum(len(one.tokens) for one in done))


def first_token_seconds(port: int, prompt: list[int]) -> float:
    """The time until the first event of a stream with a token."""
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    began = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        next(line for line in answer if b'"text"' in line)
        return time.perf_counter() - began


def compare_first_tokens(model: Any, port: int, ids: list[list[int]]) -> tuple[float, float]:
    """The fastest first token of the server and of `generate`, in turn, each prompt once."""
    served, own = [], []
    for prompt in ids:
        served.append(first_token_seconds(port, prompt))
        began = time.perf_counter()
        generate(model, [prompt], max_new_tokens=1, temperature=0.0, eos_token_id=())
        own.append(time.perf_counter() - began)
    return min(served), min(own)


def compare_rates(model: Any, process: psutil.Process, port: int, ids: list[list[int]], arguments: Any) -> None:
    """Rounds of `generate` and server; a line each, and the medians of the ratios."""
    options = {"max_tokens": arguments.new, "temperature": 0, "ignore_eos": True, "stream": arguments.stream}
    options |= {"stream_options": {"include_usage": True}} if arguments.stream else {}
    bodies, batch = [options | {"prompt": one} for one in ids], ids[: arguments.slots]
    run_load(process, port, bodies[: arguments.slots * 2], arguments.slots)
    run_generate(model, batch, arguments.new)
    ratios, memory = [], []
    for number in range(arguments.rounds):
        own = run_generate(model, batch, arguments.new)
        served = run_load(process, port, bodies, arguments.clients)
        ratios.append((served.by_clock / own.by_clock, served.by_processor / own.by_processor))
        memory.append(process.memory_info().rss / 2**20)
        print(f"round {number + 1}, generate: {own}")
        print(f"round {number + 1}, server:   {served}; {len(bodies)} of {len(bodies)} answered; ", end="")
        print(f"{memory[-1]:,.0f} MiB; {ratios[-1][0]:.2f}, {ratios[-1][1]:.2f}", flush=True)
    clock, processor = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"server / generate: {clock:.2f} by the clock, {processor:.2f} by the processor; ", end="")
    print(f"memory {memory[-1] - memory[0]:+.0f} MiB after the first round")


@torch.inference_mode()
def pass_seconds(model: Any, rows: int, columns: int, repeats: int = 7) -> float:
    """Processor seconds of a pass of `columns` tokens in each row behind prompts of PROMPT tokens; the fastest."""
    cache, seconds = model.new_cache(rows, PROMPT + columns * repeats), []
    for width in (PROMPT, *[columns] * repeats):
        ids, began = torch.full((rows, width), 300), time.process_time()
        start = 0 if width == PROMPT else PROMPT + columns * (len(seconds) - 1)
        model(ids, Scope.unpadded(ids, cache=cache, start=start))
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def print_draft_costs(model: Any) -> None:
    """Passes that check 2 and 4 drafted tokens of each row, in passes without drafts."""
    for rows in (1, 8, 32):
        plain, *wider = (pass_seconds(model, rows, columns) for columns in (1, 3, 5))
        ratios = ", ".join(f"{drafts} drafts {one / plain:.2f}" for drafts, one in zip((2, 4), wider, strict=True))
        print(f"{rows} rows: a pass {plain * 1e3:.1f} ms of the processor; {ratios} times as much", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"clients": 200, "requests": 1, "slots": 32, "new": 64, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shape", choices=list(SHAPES), default="11m")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--drafts", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_bpe((document.text for document in pydoc_topics()), 1024)
    config = SHAPES[arguments.shape][1]
    model = quest.build(replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size)))
    if arguments.drafts:
        print_draft_costs(model)
        return
    ids = prompts(arguments.clients * arguments.requests, PROMPT, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model", tokenizer=tokenizer)
        with server_process(Path(folder) / "model", arguments.slots) as (process, port):
            compare_rates(model, process, port, ids, arguments)
            long = prompts(8, LONG_PROMPT, tokenizer.vocab_size)
            served, single = compare_first_tokens(model, port, long)
            print(f"first token of {LONG_PROMPT}: server {served * 1e3:.0f} ms, ", end="")
            print(f"generate {single * 1e3:.0f} ms, {served / single:.2f}")


if __name__ == "__main__":
    main()
