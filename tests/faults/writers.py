"""Everything that writes, under a file system that fails at one of its calls: afterwards the old content or the new one
is whole, the message has one to four lines, and the same write succeeds once the disk is well.

`python -m tests.faults files [WRITER ...]` lets every call of every writer fail in every way; test_failing_files.py
takes a few of them. A module that writes and is in none of the writers fails there."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llm_quest.cli.jsonl_output import open_jsonl_output
from llm_quest.cli.output import explain_failure, write_crash_file
from llm_quest.data.corpus import load_corpus
from llm_quest.data.split import split_corpus
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import open_token_folder, prepare_token_folder
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.ledger import read_rows as read_rows_of_ledger
from llm_quest.files import append_lines, atomic_write_text
from llm_quest.hub.gguf import read_gguf
from llm_quest.hub.gguf_export import save_gguf
from llm_quest.hub.load_save import save
from llm_quest.hub.save_adapter import save_adapter
from llm_quest.machine.profile import MachineProfile, save_profile
from llm_quest.models.build import build, preset
from llm_quest.papers import load_paper
from llm_quest.papers.card import write_card
from llm_quest.recipes.assembly import train_or_load_tokenizer
from llm_quest.recipes.reference_model import save_tensors
from llm_quest.techniques.lora import LoRA
from llm_quest.train import checkpoint as checkpoints
from llm_quest.train.checkpoint import Checkpoint
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.sharded_checkpoint import consolidate_checkpoint, save_sharded_checkpoint
from tests.faults.failing_files import ERRORS, failing_files
from tests.papers.made_up import make_result
from tests.tokenizer_kinds import tokenizer_of


@dataclass(frozen=True)
class Writer:
    """write(folder, version): writes version 1, or 2 in its place. read(folder): what is there, the same value for the
    same content; None for nothing; it raises for what is torn. modules: the files of the package that it goes through.
    per_file: read gives a file's content by its name, and each is old or new by itself. is_slow: the suite lets one
    call fail."""

    name: str
    modules: Sequence[str]
    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]
    per_file: bool = False
    is_slow: bool = False


@cache
@cache
def tiny_model(version: int) -> Any:
    return build(replace(preset("llama3.2-tiny").config, vocab_size=400), seed=version)


@cache
def lora_model(version: int) -> Any:
    return LoRA(rank=2 * version)(build(preset("llama3.2-tiny").config, seed=1))


def make_checkpoint(step: int) -> Checkpoint:
    tensors = {"model": {"w": torch.full((64,), float(step))}, "optimizer": {"w|exp_avg": torch.zeros(9)}}
    return Checkpoint(step, {**tensors, "progress": {"step": step}})


def write_checkpoint(folder: Path, version: int) -> None:
    """As a run does: what is damaged is put aside, what is half-written removed, and the older one goes."""
    root = folder / "checkpoints"
    checkpoints.remove_partial_checkpoints(root)
    if not checkpoints.checkpoint_dir(root, version).exists():
        checkpoints.save_checkpoint(root, make_checkpoint(version))
    checkpoints.prune_checkpoints(root, checkpoints.Retention(save_total_limit=1))


def newest_checkpoint(folder: Path) -> object:
    latest = checkpoints.latest_checkpoint(folder / "checkpoints", lambda text: None)
    if latest is None:
        return None
    found = checkpoints.load_checkpoint(latest)
    return found.step, found.state_dict["model"]["w"].tolist() if "model" in found.state_dict else "shards"


def write_shards(folder: Path, version: int) -> None:
    root = folder / "checkpoints"
    checkpoints.remove_partial_checkpoints(root)
    if not checkpoints.checkpoint_dir(root, version).exists():
        save_sharded_checkpoint(root, make_checkpoint(version), DistributedContext())


def consolidate(folder: Path, version: int) -> None:
    """Version 1: a checkpoint in shards; 2: the same in the plain form."""
    write_shards(folder, 1)
    if version == 2:
        consolidate_checkpoint(checkpoints.checkpoint_dir(folder / "checkpoints", 1))


def write_run(folder: Path, version: int) -> None:
    """A run folder that is opened, with a row, an event and a crash report."""
    with RunDir(folder / "run", config=f"seed: {version}\n") as run:
        run.resolve_checkpoint()
        run.log_event("started", version=version)
        run.log_metrics({"step": version, "loss": 1.0})
        run.write_crash_report({"version": version})
        if not checkpoints.checkpoint_dir(run.checkpoints, version).exists():
            run.save_checkpoint(make_checkpoint(version), checkpoints.Retention(1))


def read_run_rows(folder: Path) -> object:
    """The checkpoint of a run; its rows and events are whole lines."""
    for name in ("metrics.jsonl", "events.jsonl"):
        file = folder / "run" / name
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        for line in lines[:-1]:
            assert isinstance(json.loads(line), dict), f"{name} has {line!r} before its end"
    return newest_checkpoint(folder / "run")


def tokenizer_version(version: int) -> Tokenizer:
    tokenizer = tokenizer_of("byte-level")
    return tokenizer if version == 1 else tokenizer.with_added_tokens(["<two>"], special=True)


def read_texts(folder: Path) -> object:
    """Every file by its name, none of them torn: JSON is read."""
    files = {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if is_result(file)}
    for name, content in files.items():
        if name.endswith(".json"):
            json.loads(content)
    return files or None


def is_result(file: Path) -> bool:
    """Whether a file is one that somebody reads; not one that was being written, nor a lock."""
    return (
        file.is_file()
        and not any(part.startswith(".") for part in file.parts)
        and file.suffix not in (".lock", ".part")
    )


def write_tokens(folder: Path, version: int) -> None:
    prepare_token_folder(split_text(version), tokenizer_version(1), folder / "tokens")


@cache
def split_text(version: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(6):
            Path(folder, f"{number}.txt").write_text(f"Document {number} of version {version}. " * 20)
        return split_corpus(load_corpus(folder), held_out=0.3)


def read_tokens(folder: Path) -> object:
    """Both versions have a folder of their own."""
    found = [open_token_folder(one.parent) for one in sorted(folder.glob("tokens/[!.]*/manifest.json"))]
    return [one.manifest["files"] for one in found] or None


def write_cached_tokenizer(folder: Path, version: int) -> None:
    with environment(LLM_QUEST_CACHE=str(folder / "cache")):
        train_or_load_tokenizer(split_text(version), 300, lambda text: None)


def read_cached_tokenizers(folder: Path) -> object:
    found = [Tokenizer.load(one.parent).hash for one in sorted(folder.glob("cache/tokenizers/[!.]*/tokenizer.json"))]
    return found or None


def write_profile(folder: Path, version: int) -> None:
    with environment(LLM_QUEST_CACHE=str(folder / "cache"), LLM_QUEST_MACHINE_PROFILE=None):
        machine = {"processor": "x", "torch": "y"}
        save_profile(MachineProfile(machine, {"a": float(version)}, False, measured_at=1.0))


def write_rows(folder: Path, version: int) -> None:
    with open_jsonl_output(folder / "rows.jsonl", {"model": "m", "seed": 0}) as output:
        there = output.load_existing()
        for number in range(3 * version):
            if number not in there:
                output.append([{"row": number, "text": "é" * 9}])
        output.sort_rows()


def read_rows(folder: Path) -> object:
    """The rows that the next command finds, which are some of the new ones and all of the old ones."""
    file = folder / "rows.jsonl"
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line)["row"] for line in lines if line.endswith("\n")]
    assert rows == list(range(len(rows))), rows
    return 1 if 3 <= len(rows) < 6 else 2 if rows else None


def write_conversation(folder: Path, version: int) -> None:
    """Appends a row; the second time another one."""
    file = folder / "talks.jsonl"
    rows = file.read_text().count("\n") if file.exists() else 0
    for _ in range(rows, version):
        append_lines(file, [json.dumps({"messages": [{"role": "user", "content": "é" * 5000}]})])


def read_conversations(folder: Path) -> object:
    file = folder / "talks.jsonl"
    text = file.read_text() if file.exists() else ""
    assert not text or text.endswith("\n"), "the last row is torn"
    return [json.loads(line)["messages"] for line in text.splitlines()] or None


@cache
def scratch_folder() -> Path:
    """In place of the machine's temporary folder, for a file that nobody deletes."""
    folder = Path(tempfile.mkdtemp(prefix="faults-scratch-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_crash(folder: Path, version: int) -> None:
    """The traceback of a command; a disk that fails has to fail nothing here."""
    with chdir(folder), patch.object(tempfile, "tempdir", str(scratch_folder())):
        write_crash_file(RuntimeError(f"version {version}"))


def write_paper(folder: Path, version: int) -> None:
    paper = load_paper("muon")
    write_card(paper, {"0.3M": make_result(paper, "better", [-0.1 * version] * 4)}, folder)


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Inside, variables of the environment have these values; None: they are not set."""
    before = {name: os.environ.get(name) for name in values}
    set_variables(values)
    try:
        yield
    finally:
        set_variables(before)


def set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def write_model(folder: Path, version: int) -> None:
    tokenizer = tokenizer_version(version)
    save(tiny_model(version), folder / "m", tokenizer=tokenizer, max_shard_size="200kB", overwrite=True)


def write_reference(folder: Path, version: int) -> None:
    save_tensors(folder / "r.safetensors", {"w": torch.full((9,), float(version))}, {})


def write_gguf_file(folder: Path, version: int) -> None:
    save_gguf(tiny_model(version), tokenizer_version(1), folder / "m.gguf", overwrite=True)


def read_bytes(folder: Path) -> object:
    file = folder / "m.gguf"
    return read_gguf(file).metadata and file.read_bytes() if file.exists() else None


def replace_checkpoint(folder: Path, version: int) -> None:
    """As a run does whose last evaluations are made up: the checkpoint of the same step is written anew."""
    root = folder / "checkpoints"
    checkpoints.remove_partial_checkpoints(root)
    tensors = {"model": {"w": torch.full((64,), float(version))}, "optimizer": {}}
    checkpoints.save_checkpoint(root, Checkpoint(7, {**tensors, "progress": {}}, replaces=True))


def append_ledger(folder: Path, version: int) -> None:
    for number in range(version):
        Ledger(folder / "ledger.jsonl", lambda text: None).append("run", "e", {"number": number, "text": "é" * 9})


def read_ledger(folder: Path) -> object:
    """The rows that are whole; nothing else stands there."""
    file = folder / "ledger.jsonl"
    said: list[str] = []
    rows = read_rows_of_ledger(file, said.append) if file.exists() else []
    assert said == []
    return [row["number"] for row in rows] or None


WRITERS: tuple[Writer, ...] = (
    Writer("replaced checkpoint", ("train/checkpoint.py",), replace_checkpoint, newest_checkpoint),
    Writer("gguf", ("hub/gguf.py", "hub/gguf_export.py", "hub/gguf_adapter.py"), write_gguf_file, read_bytes),
    Writer("ledger", ("experiments/ledger.py",), append_ledger, read_ledger),
    Writer("checkpoint", ("train/checkpoint.py", "tensor_files.py"), write_checkpoint, newest_checkpoint),
    Writer("shards", ("train/sharded_checkpoint.py",), write_shards, newest_checkpoint),
    Writer("consolidated checkpoint", ("train/sharded_checkpoint.py",), consolidate, newest_checkpoint),
    Writer("run folder", ("train/run_dir.py",), write_run, read_run_rows),
    Writer("text", ("files.py",), lambda folder, v: atomic_write_text(folder / "a.json", f"[{v}]"), read_texts),
    Writer("tokenizer", ("data/tokenizer.py",), lambda folder, v: tokenizer_version(v).save(folder), read_texts, True),
    Writer("model folder", ("hub/load_save.py",), write_model, read_texts),
    Writer(
        "adapter", ("hub/save_adapter.py",),
        lambda folder, v: save_adapter(lora_model(v), folder / "a", overwrite=True), read_texts,
    ),
    Writer("tokens", ("data/tokens.py",), write_tokens, read_tokens),
    Writer("cached tokenizer", ("recipes/assembly.py",), write_cached_tokenizer, read_cached_tokenizers),
    Writer("reference", ("recipes/reference_model.py",), write_reference, read_texts),
    Writer("machine profile", ("machine/profile.py",), write_profile, read_texts),
    Writer("rows", ("cli/jsonl_output.py",), write_rows, read_rows),
    Writer("conversation", ("cli/chat_session.py",), write_conversation, read_conversations),
    Writer("traceback", ("cli/output.py",), write_crash, read_texts),
    Writer("paper", ("papers/card.py", "papers/reproduce.py"), write_paper, read_texts, True, is_slow=True),
)  # fmt: skip


WAYS = (*ERRORS, "short", "slow")


@dataclass(frozen=True)
class FileFault:
    """What a failing file system did to a writer."""

    writer: str
    kind: str
    call: int
    what: str

    def __str__(self) -> str:
        return f"{self.writer}, {self.kind} at call {self.call}: {self.what}"


@cache
def contents(writer: Writer) -> tuple[Any, Any, Any]:
    """What a reader finds after version 1, after version 2 in its place, and after version 2 alone."""
    found = []
    for versions in ((1, 2), (2,)):
        with tempfile.TemporaryDirectory() as name:
            for version in versions:
                writer.write(Path(name), version)
                found.append(writer.read(Path(name)))
    return found[0], found[1], found[2]


@cache
def count_calls(writer: Writer, kind: str = "ENOSPC") -> int:
    """How many calls there are that fail in this way."""
    with tempfile.TemporaryDirectory() as name:
        writer.write(Path(name), 1)
        with failing_files(Path(name), kind, 10**9) as state:
            writer.write(Path(name), 2)
    return state.calls


def check_writer(writer: Writer, kind: str, calls: Iterable[int], fresh: bool = False) -> tuple[list[FileFault], int]:
    """The faults of a writer whose n-th call fails, for these n until none fails; and how many n there were. fresh:
    nothing was there before."""
    faults: list[FileFault] = []
    tried = 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        old, new, alone = contents(writer)
        before = scratch / "before"
        before.mkdir()
        if not fresh:
            writer.write(before, 1)
        for number in calls:
            folder = scratch / f"at-{number}"
            shutil.copytree(before, folder)
            failed, what = fail_once(writer, folder, kind, number, (old, alone, None) if fresh else (old, new))
            if not failed:
                break
            tried += 1
            faults += [FileFault(writer.name, kind, number, what)] if what else []
            shutil.rmtree(folder, ignore_errors=True)
    return faults, tried


def fail_once(writer: Writer, folder: Path, kind: str, number: int, allowed: Sequence[Any]) -> tuple[bool, str]:
    """Whether a call failed, and what was wrong afterwards. allowed: what may be there, the new content second."""
    what = ""
    with failing_files(folder, kind, number) as state:
        try:
            writer.write(folder, 2)
        except Exception as error:
            what = message_fault(error)
    if not state.failures or what:
        return bool(state.failures), what
    try:
        if not is_whole(writer, writer.read(folder), allowed):
            return True, "what is there is neither the old content nor the new one"
        writer.write(folder, 2)
        if writer.read(folder) != allowed[1]:
            return True, "written again, it is not the new content"
    except Exception as error:
        return True, f"afterwards {type(error).__name__}: {error}"
    return True, ""


def message_fault(error: Exception) -> str:
    """What is wrong with the message of an error: it has one to four lines, and is not a bug of ours."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        code, lines = explain_failure(error)
    if code == 1:
        place = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(one.filename).name}:{one.lineno}" for one in place if "llm_quest" in one.filename]
        return f"a bug of ours: {type(error).__name__}: {error} at {own[-1:]}"
    return "" if 1 <= len(lines) <= 4 else f"{len(lines)} lines: {lines}"


def is_whole(writer: Writer, found: Any, allowed: Sequence[Any]) -> bool:
    """Whether each thing that is there is the old one or the new one."""
    if not writer.per_file:
        return found in allowed
    return all(any(content == (one or {}).get(name) for one in allowed) for name, content in (found or {}).items())


def draw_calls(writer: Writer, kind: str, count: int, seed: int) -> Iterable[int]:
    """Which calls fail: all for a count of 0."""
    if not count:
        # every write of a "slow" disk waits, and every one of a "short" one is short: once is enough
        return range(1 if kind in ("slow", "short") else 10**6)
    chance = random.Random(f"{writer.name} {kind} {seed}")
    return sorted(chance.randrange(count_calls(writer, kind)) for _ in range(count))


def show_faults(faults: Sequence[FileFault]) -> int:
    for fault in faults[:12]:
        print(f"  {fault}")
    return len(faults)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults files", description=__doc__.splitlines()[0])
    parser.add_argument("writers", nargs="*", help=", ".join(writer.name for writer in WRITERS))
    parser.add_argument("--kind", default="", help=", ".join(WAYS))
    parser.add_argument("--calls", type=int, default=0, help="how many of a writer's calls fail in each way; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which calls, with --calls")
    args = parser.parse_args(words)
    from tests.faults.training import check_training

    total = 0
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    for writer in WRITERS:
        if args.writers and writer.name not in args.writers:
            continue
        begin, faults, tried = time.monotonic(), [], 0
        for kind in [args.kind] if args.kind else WAYS:
            for fresh in (True, False):
                found, count = check_writer(writer, kind, draw_calls(writer, kind, args.calls, args.seed), fresh)
                faults, tried = faults + found, tried + count
        print(
            f"{writer.name}: {tried} failing calls, {len(faults)} faults, {time.monotonic() - begin:.0f} s", flush=True
        )
        total += show_faults(faults)
    with_training = (not args.writers or "training" in args.writers) and not args.calls
    for kind in ([args.kind] if args.kind else [*ERRORS, "short", "kill"]) if with_training else ():
        begin, faults = time.monotonic(), check_training(kind, range(10**6))
        print(f"training, {kind} at every call: {len(faults)} faults, {time.monotonic() - begin:.0f} s", flush=True)
        total += show_faults(faults)
    return int(total > 0)
