"""Failures of several processes: the first one ends all of them with one message and one exit code. And waiting for the
main process without a time limit.

      process 0: error -> store: "0: exit code 3: none.jsonl does not exist" -> waits until the others have read it -> 3
      process 1: blocked in a collective; its watcher reads the store          -> ends silently with exit code 3

The store is the key-value store by which the processes found each other (a TCP server in torchrun's agent or in process
0); reading it needs no other process. The first failure stands, those that it causes elsewhere are not shown.

A long step is given up by all together. A process that was told to stop and has waited PATIENCE_SECONDS writes so into
the store; each process that has not yet contributed to the step's sums leaves the process group, which wakes those that
wait for it in a collective; no process can have completed the step. They join a second group, of gloo, whose
collectives save the state before the step.

Commonly got wrong: a process that waits in a collective cannot be woken by another one that has failed. gloo notices
when the failed process is gone, and reports a lost connection in place of the fault; NCCL waits for its time limit. A
group that is destroyed keeps its connections as long as anything refers to it (FSDP2 does), and wakes nobody. And long
work of one process (reading and splitting a corpus) inside the others' collective reaches that limit."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llm_quest.errors import PeerFailure, QuestError, ResourceError, exit_code_of
from llm_quest.train.signals import write_stderr

POLL_SECONDS = 0.05
WATCH_SECONDS = 0.5
ACKNOWLEDGE_SECONDS = 5.0
"""How long a failed main process waits for the others to end with its exit code, before torchrun stops them."""
STORE_SECONDS = 8.0
"""How long a process may go on when the store is gone."""
KILLED = (
    "another process of the run ended without a message (killed, perhaps for memory); resume the run with the same "
    "command"
)
GONE = (
    "another process of the run was killed, or does not stop; the last checkpoint stands: resume the run with the same "
    "command"
)
LEADER_SECONDS = 20.0
"""How long the main process has to write what it was writing when another one failed."""

_numbers = itertools.count()
"""Every use of the store has keys of its own. The processes make the same uses in the same order."""


class ProcessStore:
    """Messages between the processes of a group besides the collectives: the first failure, requests to stop, and that
    the main process has reached a point. sockets: the connections of the process group."""

    def __init__(self, rank: int, world_size: int, sockets: Collection[tuple[int, int]] = ()):
        self.rank, self.world_size, self.sockets = rank, world_size, sockets
        names = ("failure", "seen", "stop", "left")
        self.failure_key, self.seen_key, self.stop_key, self.left_key = (
            f"llm_quest/{n}/{next(_numbers)}" for n in names
        )
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.on_stop: Callable[[int], None] | None = None
        self.has_left = False

    def report_failure(self, error: BaseException) -> PeerFailure | None:
        """Publish an error as the first failure; return the failure that was published before it, if any."""
        text = (str(error).splitlines() or [type(error).__name__])[0]
        own = json.dumps({"rank": self.rank, "exit_code": exit_code_of(error), "message": text})
        stands = self.store.compare_set(self.failure_key, "", own).decode()
        return None if json.loads(stands)["rank"] == self.rank else self.first_failure()

    def first_failure(self) -> PeerFailure | None:
        """The failure that ended the run; None if there is none."""
        if not self.store.check([self.failure_key]):
            return None
        failure = json.loads(self.store.get(self.failure_key).decode())
        return PeerFailure(f"process {failure['rank']} ended the run: {failure['message']}", failure["exit_code"])

    def wait_for_main_process(self, is_main_process: bool) -> None:
        """The others wait until the main process calls this, without a time limit. PeerFailure if it has failed."""
        if self.has_left:  # the processes left at different places, and do not count alike
            return
        key = f"llm_quest/done/{next(_numbers)}"
        if is_main_process:
            self.store.set(key, "done")
        while not self.store.check([key]):
            if (failure := self.first_failure()) is not None:
                raise failure
            time.sleep(POLL_SECONDS)

    def announce_stop(self, signal_number: int) -> None:
        """Ask every process to give up its step: `on_stop` is called there."""
        with suppress(dist.DistError):
            self.store.set(self.stop_key, str(signal_number))

    def read_stop_signal(self) -> int:
        """The signal for which the processes give up their step; 0: there is none."""
        return int(self.store.get(self.stop_key)) if self.store.check([self.stop_key]) else 0

    def leave_group(self) -> None:
        """Leave the process group for good, which wakes those that wait in a collective: `is_abandoned` is then true
        for them. From here on the process group is a new one, of gloo. PeerFailure if a process does not join it."""
        if self.has_left:
            return
        self.has_left = True
        self.store.set(self.left_key, "left")
        close_sockets(self.sockets)
        dist.destroy_process_group()
        again, limit = dist.PrefixStore(self.left_key, self.store), datetime.timedelta(seconds=LEADER_SECONDS)
        try:
            dist.init_process_group("gloo", store=again, rank=self.rank, world_size=self.world_size, timeout=limit)
        except dist.DistError as error:
            lost = PeerFailure(GONE, ResourceError.exit_code, shown=False)
            raise self.first_failure() or lost from error

    def is_abandoned(self) -> bool:
        """Whether a process has left the group because it was told to stop."""
        with suppress(dist.DistError):
            return self.has_left or bool(self.store.check([self.left_key]))
        return False

    def acknowledge(self) -> None:
        """Tell the main process, which waits for it, that this process has ended or is about to."""
        if self.rank != 0:
            self.store.add(self.seen_key, 1)

    def wait_for_acknowledgements(self) -> None:
        """Wait until all others have acknowledged, at most ACKNOWLEDGE_SECONDS."""
        give_up = time.monotonic() + ACKNOWLEDGE_SECONDS
        while self.store.add(self.seen_key, 0) < self.world_size - 1 and time.monotonic() < give_up:
            time.sleep(POLL_SECONDS)

    def watch(self, stopped: threading.Event) -> None:
        """End this process with the exit code of the first failure elsewhere, wherever its main thread is; the main
        process's own thread may first notice by itself and close its files."""
        while not stopped.wait(WATCH_SECONDS):
            if self.on_stop is not None and (signal_number := self.read_stop_signal()):
                self.on_stop(signal_number)
            failure = self.first_failure()
            if failure is not None:
                if self.rank == 0 and stopped.wait(LEADER_SECONDS):
                    return
                self.acknowledge()
                os._exit(failure.exit_code)


def open_sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of every socket of this process; none where the system does not list them."""
    sockets = set()
    for name in Path("/dev/fd").glob("*"):
        with suppress(OSError, ValueError):
            status = os.fstat(int(name.name))
            if stat.S_ISSOCK(status.st_mode):
                sockets.add((int(name.name), status.st_ino))
    return sockets


def close_sockets(sockets: Collection[tuple[int, int]]) -> None:
    """End these connections, for both sides, whoever holds them."""
    for descriptor, _ in open_sockets() & set(sockets):
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.getpeername()  # OSError for a socket that listens, which gloo needs to the end
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def share_failures(store: ProcessStore) -> Iterator[None]:
    """Make an error of one process end all of them. It is raised as it is in the process where it came first, and as
    PeerFailure (which is not shown again) in the others."""
    stopped = threading.Event()
    watcher = threading.Thread(target=run_watcher, args=(store, stopped), daemon=True, name="failures")
    watcher.start()
    try:
        yield
        with suppress(dist.DistError):  # a main process that holds the store may be gone, with all work done
            store.acknowledge()
            if store.rank == 0:
                store.wait_for_acknowledgements()
    except BaseException as error:
        stopped.set()
        failure = resolve_failure(store, error)
        if failure is None:
            if isinstance(error, QuestError):
                error.came_first = True
            raise
        raise failure from error
    finally:
        stopped.set()
        watcher.join(timeout=2 * WATCH_SECONDS)


def run_watcher(store: ProcessStore, stopped: threading.Event) -> None:
    """The watcher thread of `share_failures`. A store that is gone is no failure where this process is about to end
    too; otherwise the process that held it, torchrun's agent or the main process, was killed, and this one ends."""
    with suppress(dist.DistError):
        store.watch(stopped)
        return
    if not stopped.wait(STORE_SECONDS):
        write_stderr(f"quest: {KILLED}\n")
        os._exit(ResourceError.exit_code)


def resolve_failure(store: ProcessStore, error: BaseException) -> PeerFailure | None:
    """The failure that this process raises in place of its own error; None if that error came first."""
    if isinstance(error, PeerFailure):
        with suppress(dist.DistError):
            store.acknowledge()
        return error
    try:
        failure = wait_for_failure(store) if is_connection_loss(error) else store.report_failure(error)
        if failure is not None:
            store.acknowledge()
        elif store.rank == 0:
            store.wait_for_acknowledgements()
        return failure
    except dist.DistError:  # the process that held the store is gone
        return PeerFailure(KILLED, ResourceError.exit_code, shown=False)


def wait_for_failure(store: ProcessStore, seconds: float = 2.0) -> PeerFailure:
    """Return the failure behind a lost connection: the one in the store, or that another process was killed."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if (failure := store.first_failure()) is not None:
            return failure
        time.sleep(POLL_SECONDS)
    lost = PeerFailure(KILLED, ResourceError.exit_code, shown=False)
    return store.report_failure(lost) or lost


def is_connection_loss(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
