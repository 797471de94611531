"""The server under load: clients in loops on loopback, each request answered, memory flat, tokens per second against
`generate` with a batch as large as the server's slots; and the time to the first token of a 512-token prompt.

python -m benchmarks.serving [--clients 200] [--requests 2] [--slots 32] [--new 64] [--shape 11m] [--stream]

The server is a process of its own with one thread. On a machine with few cores clients, server and other programs share
them, so beside the wall clock there is the processor time of the server against that of `generate`."""

from __future__ import annotations

import argparse
import asyncio
import json
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

PROMPT, LONG_PROMPT = 64, 512


class Rate(NamedTuple):
    """Tokens of a second: of the wall clock, and of the processor time of the process."""

    tokens: int
    wall: float
    cpu: float

    def __str__(self) -> str:
        per_cpu = self.tokens / self.cpu
        return f"{self.tokens / self.wall:,.0f} tokens/s, {per_cpu:,.0f} of a second of processor time"


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


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run_load(process: psutil.Process, port: int, bodies: list[dict[str, Any]], clients: int) -> tuple[Rate, int]:
    """The rate of the server, and how many requests were answered."""
    wall, cpu = time.perf_counter(), cpu_seconds(process)
    counts = asyncio.run(load(port, [bodies[number::clients] for number in range(clients)]))
    return Rate(sum(counts), time.perf_counter() - wall, cpu_seconds(process) - cpu), len(counts)


def run_generate(model: Any, ids: list[list[int]], new: int) -> Rate:
    """The rate of one batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = generate(model, ids, max_new_tokens=new, temperature=0.0, eos_token_id=())
    tokens = sum(len(one.tokens) for one in done)
    return Rate(tokens, time.perf_counter() - wall, time.process_time() - cpu)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"clients": 200, "requests": 2, "slots": 32, "new": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shape", choices=list(SHAPES), default="11m")
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_bpe((document.text for document in pydoc_topics()), 1024)
    config = SHAPES[arguments.shape][1]
    model = quest.build(replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size)))
    options = {"max_tokens": arguments.new, "temperature": 0, "ignore_eos": True, "stream": arguments.stream}
    options |= {"stream_options": {"include_usage": True}} if arguments.stream else {}
    ids = prompts(arguments.clients * arguments.requests, PROMPT, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model", tokenizer=tokenizer)
        with server_process(Path(folder) / "model", arguments.slots) as (process, port):
            bodies = [options | {"prompt": one} for one in ids]
            run_load(process, port, bodies[: arguments.slots * 2], arguments.slots)
            run_generate(model, ids[: arguments.slots], arguments.new)
            before = run_generate(model, ids[: arguments.slots], arguments.new)
            memory = []
            for _ in range(2):
                rate, answered = run_load(process, port, bodies, arguments.clients)
                memory.append(process.memory_info().rss / 2**20)
                print(f"server: {rate}; {answered} of {len(bodies)} requests answered; {memory[-1]:,.0f} MiB")
            own = [before, run_generate(model, ids[: arguments.slots], arguments.new)]
            for one in own:
                print(f"generate, batch of {arguments.slots}: {one}")
            cpu = max(one.tokens / one.cpu for one in own)
            wall = max(one.tokens / one.wall for one in own)
            print(f"server / generate: {rate.tokens / rate.wall / wall:.2f} by the clock, ", end="")
            print(f"{rate.tokens / rate.cpu / cpu:.2f} by processor time; memory {memory[1] - memory[0]:+.0f} MiB")
            long = prompts(8, LONG_PROMPT, tokenizer.vocab_size)
            served, single = compare_first_tokens(model, port, long)
            print(
                f"first token of {LONG_PROMPT}: server {served * 1e3:.0f} ms, generate {single * 1e3:.0f} ms, ", end=""
            )
            print(f"{served / single:.2f}")


if __name__ == "__main__":
    main()
