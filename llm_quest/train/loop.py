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
from llm_quest.train.checkpoint import checkpoint_dir, load_checkpoint
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir, json_safe
from llm_quest.train.session import TrainSession
from llm_quest.train.signals import SignalHandler
from llm_quest.train.state import PendingRow, load_model_state_dict

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
    """Train `objective.model` until `args.max_steps` steps are done, from the run's checkpoint if it has one.

    The objective has been through `parallel.parallelize` (one process on the CPU needs no `parallel`). run_dir: inside
    its `with` block; None writes nothing. callbacks: called after every update, with the number of steps done.
    evaluators: run at multiples of their `interval`, and at the end. watchers: read each row of metrics and return
    advice. Raises GuardStop for numbers that stay non-finite and for what a watcher stops, ResourceError for memory or
    disk, ValueError for a checkpoint of another run."""
    parallel = parallel or DistributedContext()
    session = TrainSession(
        objective, dataloader, optimizer, lr_schedule, args, run_dir, parallel, logger or NullLogger()
    )
    with (
        parallel.handle_signals(SIGNAL_ECHO_SECONDS) as signals,
        session,
        phase(args.name, args.max_steps, done=session.progress.step, is_run=True) as now,
    ):
        if (pending := session.progress.pending) is not None:
            finish_step(session, pending, evaluators, signals, watchers)
        while not session.is_finished:
            numbers = session.forward_backward(signals)
            if numbers is None:
                break
            session.optimizer_step(numbers, callbacks)
            row = PendingRow(session.make_row(numbers), is_last=session.status == "finished")
            finish_step(session, row, evaluators, signals, watchers)
            now.done = session.progress.step
        if args.load_best_model_at_end:
            load_best(session, evaluators, signals)
        return session.result(signals)


def finish_step(
    session: TrainSession,
    pending: PendingRow,
    evaluators: Sequence[Evaluator],
    signals: SignalHandler,
    watchers: Sequence[MetricsCallback],
) -> None:
    """After an update: the evaluations that are due, the row of metrics, a checkpoint. Where a signal ends the
    evaluations the row waits in the checkpoint, and the resumed run makes them up."""
    session.improved = False
    is_measured = session.evaluate(evaluators, signals, is_last=pending.is_last)
    if is_measured and session.args.metric_for_best_model and not pending.is_tracked:
        track_best(session, pending, evaluators)
        if pending.is_tracked:  # the run ends here
            is_measured = session.evaluate(evaluators, signals, is_last=True)
    session.progress.pending = None if is_measured else pending
    if is_measured:
        session.log(pending.row, watchers)
    session.save()


def track_best(session: TrainSession, pending: PendingRow, evaluators: Sequence[Evaluator]) -> None:
    """Update the best metric; end the run if it has not improved for too long (early stopping), which leaves the
    evaluations of the last step to be made."""
    best, progress = session.best, session.progress
    measured = {name: pending.row[name] for name in pending.row.keys() - pending.COUNTERS} | session.eval_metrics
    best.known.update(measured)
    if session.is_finished or len(session.evaluators_run) == len(evaluators):
        best.require_measured()
    if best.metric in session.eval_metrics or session.is_log_step():
        session.improved = best.update(progress, measured)
    if not session.is_finished and best.is_exhausted(progress):
        session.status = "finished"
        session.log_event("early_stopping", step=progress.step, message=best.describe(progress))
        pending.is_last = pending.is_tracked = True


def load_best(session: TrainSession, evaluators: Sequence[Evaluator], signals: SignalHandler) -> None:
    """Load the best checkpoint into the model at the end of a run (load_best_model_at_end), evaluate it, and make it
    the checkpoint that the run's name stands for. A run that a signal ends here does it again when resumed."""
    progress, run_dir = session.progress, session.run_dir
    if session.status != "finished" or progress.best_step is None or run_dir is None:
        return
    folder = checkpoint_dir(run_dir.checkpoints, progress.best_step)
    session.parallel.all_gather(None)  # the main process has written it by now
    if progress.best_step != progress.step:
        load_model_state_dict(session.model, load_checkpoint(folder).state_dict["model"])
        if not session.evaluate(evaluators, signals, is_last=True):
            return
        progress.latest_metrics = progress.latest_metrics | json_safe(session.eval_metrics)
    run_dir.mark_best(folder)
    session.log_event("loaded_best", checkpoint=str(folder), step=progress.best_step)
