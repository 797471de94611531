"""Fuzzing: each target reads mutated inputs. A fault is any exception but a QuestError (a panic of a package in Rust
too), a message without text or with lines that nobody reads to their end, a read longer than LIMIT_SECONDS, or one that
takes more than LIMIT_BYTES of memory."""

from __future__ import annotations

import random
import resource
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_quest.errors import MAX_MESSAGE_LINES, QuestError, wrap_line
from tests.faults.mutations import mutate_bytes, mutate_value, to_hostile_json
from tests.faults.targets import Target

LIMIT_SECONDS = 2.0
LIMIT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Fault:
    """An input that was not read as it should be."""

    target: str
    seed: int
    content: bytes
    what: str
    place: str

    def __str__(self) -> str:
        return f"{self.target}, seed {self.seed}: {self.what} at {self.place}; input {self.content[:200]!r}"


def mutate_inputs(target: Target, count: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Inputs number start to start + count: each a function of the target and its number."""
    values, contents = target.values(), target.contents()
    for number in range(start, start + count):
        rng = random.Random(f"{target.name} {number}")
        if values:
            value = rng.choice(values)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                value = mutate_value(value, rng)
            rows = value if target.as_lines and isinstance(value, list) else [value]
            content = b"\n".join(map(to_hostile_json, rows)) if target.as_lines else to_hostile_json(value)
            yield number, mutate_bytes(content, rng) if rng.random() < 0.2 else content
        else:
            yield number, mutate_bytes(rng.choice(contents), rng)


def run_target(target: Target, count: int, start: int = 0) -> list[Fault]:
    """The faults of a target, one for each place in our code."""
    faults: dict[str, Fault] = {}
    for number, content in mutate_inputs(target, count, start):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / (target.file or target.name)
            file.write_bytes(content)
            fault = read_once(target, file, number, content)
        if fault is not None:
            faults.setdefault(fault.place, fault)
    return list(faults.values())


def read_once(target: Target, file: Path, number: int, content: bytes) -> Fault | None:
    start, before = time.process_time(), peak_bytes()
    try:
        target.read(file)
    except QuestError as error:
        lines = [part for line in str(error).splitlines() for part in wrap_line(line)]
        if not 1 <= len(lines) <= MAX_MESSAGE_LINES:
            what = f"a message of {len(str(error))} characters"
            return Fault(target.name, number, content, what, type(error).__name__)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "llm_quest" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
        return Fault(target.name, number, content, f"{type(error).__name__}: {str(error)[:120]}", place)
    seconds = time.process_time() - start
    if seconds > LIMIT_SECONDS:
        return Fault(target.name, number, content, f"{seconds:.1f} s", "time")
    if (taken := peak_bytes() - before) > LIMIT_BYTES:
        return Fault(target.name, number, content, f"{taken:,} bytes of memory", "memory")
    return None


def peak_bytes() -> int:
    """The most memory that this process has had (Linux counts in kilobytes)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
