"""The training loop, one for every objective.

A step takes its micro-batches from the loader, adds up losses and gradients, divides once, updates. Steps are
counted from 0 where something is a function of the step (`loader.batches(step)`, `schedule(step)`) and by how many
are done everywhere else (rows of metrics, checkpoints, callbacks, evaluators). Resuming is exact: what follows a
checkpoint has the bits of the run that was never interrupted, on the same kind of machine with the same torch
version, thread count and number of processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from llm_quest.contracts import Callback, Evaluator, Loader, MetricsCallback
from llm_quest.progress import Logger, NullLogger, phase
from llm_quest.train.arguments import TrainingArguments, TrainResult
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.session import TrainSession
from llm_quest.train.signals import SignalHandler

SIGNAL_ECHO_SECONDS = 2.0


def train(
    objective: nn.Module,
    dataloader: Loader,
    optimizer: Optimizer,
    lr_schedule: LRSchedule,
    args: TrainingArguments,
    run_dir: RunDir | None = None,
    *,
    parallel: DistributedContext | None = None,
    callbacks: Sequence[Callback] = (),
    evaluators: Sequence[Evaluator] = (),
    watchers: Sequence[MetricsCallback] = (),
    logger: Logger | None = None,
) -> TrainResult:
    """Train `objective.model` until `args.steps` steps are done, from the run's checkpoint if it has one.

    The objective has been through `parallel.parallelize` (one process on the CPU needs no `parallel`). run_dir:
    entered; None writes nothing. callbacks: called after every update, with the number of steps done. evaluators:
    run at multiples of their `interval`, and at the end. watchers: read each row of metrics and give advice.
    GuardStop: numbers that stay non-finite, or what a watcher saw. ResourceError: memory or disk. ValueError: a
    checkpoint of another run."""
    parallel = parallel or DistributedContext()
    session = TrainSession(
        objective, dataloader, optimizer, lr_schedule, args, run_dir, parallel, logger or NullLogger()
    )
    with (
        SignalHandler(SIGNAL_ECHO_SECONDS if parallel.world_size > 1 else 0.0) as signals,
        session,
        phase(args.name, args.steps, done=session.progress.step, is_run=True) as now,
    ):
        while not session.is_finished:
            numbers = session.forward_backward(signals)
            if numbers is None:
                break
            session.optimizer_step(numbers, callbacks)
            session.evaluate(evaluators, signals)
            session.track_best(numbers, evaluators)
            session.log(numbers, watchers)
            session.save()
            now.done = session.progress.step
        session.load_best(evaluators)
        return session.result()
