"""The loop: one for every objective.

A step asks the feed for its micro-batches, adds up losses and gradients, divides once, updates. Steps are counted
from 0 where something is asked for a step (`feed.at(step)`, `schedule(step)`) and by how many are done everywhere
else (rows, checkpoints, callbacks, probes). Resuming is exact: what follows a checkpoint has the bits of the run that
was never interrupted, on the same kind of machine with the same torch version, thread count and number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from llm_quest.contracts import Callback, Feed, Probe, Watcher
from llm_quest.train.log import Display, Silent
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.schedule import Schedule
from llm_quest.train.session import Session
from llm_quest.train.settings import Result, Settings
from llm_quest.train.signals import Signals

ECHO = 2.0


def train(
    objective: nn.Module,
    feed: Feed,
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    run: Run | None = None,
    *,
    parallel: Parallel | None = None,
    callbacks: Sequence[Callback] = (),
    probes: Sequence[Probe] = (),
    watchers: Sequence[Watcher] = (),
    display: Display | None = None,
) -> Result:
    """Train `objective.model` until `settings.steps` steps are done, going on from the run's checkpoint if it has one.

    The objective has been through `parallel.place` (one process on the CPU needs no `parallel`). run: entered; None
    writes nothing. callbacks: after every update, with the number of steps done. probes: at multiples of `every`, and
    at the end. watchers: read each row of metrics and advise. GuardStop: numbers that stay non-finite, or what a
    watcher saw. ResourceError: memory or disk. ValueError: a checkpoint of something else."""
    parallel = parallel or Parallel()
    session = Session(objective, feed, optimizer, settings, run, parallel, display or Silent())
    with Signals(ECHO if parallel.world > 1 else 0.0) as signals, session:
        while not session.over:
            numbers = session.gradients(signals)
            session.update(numbers, schedule, callbacks)
            session.measure(probes)
            session.log(numbers, watchers)
            session.save()
        return session.result()
