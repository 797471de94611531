"""TrainSession: the state of a running training, and the steps of the training loop as methods."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from llm_quest.contracts import Callback, Evaluator, Loader, MetricsCallback, RewindableLoader
from llm_quest.errors import GuardStop
from llm_quest.progress import Logger, phase
from llm_quest.train import step
from llm_quest.train.arguments import TrainingArguments, TrainResult
from llm_quest.train.best_model import BestModel
from llm_quest.train.checkpoint_manager import CheckpointManager
from llm_quest.train.divergence import DivergenceMonitor
from llm_quest.train.guards import (
    MAX_PLAUSIBLE_WEIGHT,
    NonFiniteGuard,
    find_bad_optimizer_state,
    find_bad_parameter,
    initial_loss_warning,
    require_fp32_parameters,
)
from llm_quest.train.health import HealthMonitor
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext, parameters_in_place, put_parameters_back
from llm_quest.train.rng_state import GeneratorStates, RNGState, capture_generators, evaluation_mode
from llm_quest.train.run_dir import RunDir, RunLog, json_safe
from llm_quest.train.signals import STOP_SIGNALS, SignalHandler, StepInterrupted
from llm_quest.train.state import Progress, TrainState

PHASE_NAMES = {"eval": "evaluating", "samples": "writing samples", "ratio": "gathering ratios"}
"""Name of an evaluator -> what is shown while it works."""


class TrainSession:
    """A training run in progress. `with session:` resumes or starts it, and waits at the end for the checkpoint that is
    being written."""

    def __init__(
        self,
        objective: nn.Module,
        dataloader: Loader,
        optimizer: Optimizer,
        lr_schedule: LRSchedule,
        args: TrainingArguments,
        run_dir: RunDir | None,
        parallel: DistributedContext,
        logger: Logger,
    ):
        self.objective, self.dataloader, self.optimizer = objective, dataloader, optimizer
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.args, self.run_dir, self.parallel, self.logger = args, run_dir, parallel, logger
        self.trainable_parameters = require_fp32_parameters(self.model)
        self.best = BestModel(args.metric_for_best_model, args.greater_is_better, args.early_stopping_patience)
        self.improved = False
        self.guard = NonFiniteGuard(args.max_nonfinite_steps, args.max_empty_steps)
        self.state = TrainState(
            self.model, optimizer, dataloader, lr_schedule, self.guard, RNGState(args.seed, parallel.rank),
            divergence=DivergenceMonitor(watch_loss=args.watch_loss),
            parallel=parallel, settings={"precision": args.precision, "compile": args.compile},
            objective=objective,
        )  # fmt: skip
        self.run_log = RunLog(run_dir, logger, parallel.is_main_process)
        self.log_event = self.run_log.event
        self.checkpoints = CheckpointManager(args, run_dir, parallel, self.run_log)
        self.health = HealthMonitor(self.state, args, self.checkpoints, self.run_log, parallel)
        self.micro_batches: Sequence[Any] = ()
        self.status = "" if args.max_steps else "finished"
        self.signal_number = 0
        self.save_requested = False
        self.eval_metrics: dict[str, Any] = {}
        self.callback_metrics: dict[str, Any] = {}
        self.evaluators_run: set[int] = set()  # those that have measured, by their id

    @property
    def progress(self) -> Progress:
        """The progress of the run."""
        return self.state.progress

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended, for whatever reason."""
        return self.status != ""

    def __enter__(self) -> TrainSession:
        self.model.train()
        self._resume_or_start()
        if self.progress.pending is not None and self.run_dir is not None and self.parallel.is_main_process:
            self.run_dir.truncate_metrics(self.progress.step - 1)
        self.was_pending = self.progress.pending is not None
        if self.progress.step >= self.args.max_steps:
            self.status = "finished"
        elif self.best.metric and self.best.is_exhausted(self.progress):
            self.status = "finished"
            why = f"{self.best.describe(self.progress)}; it goes on with a larger early_stopping_patience"
            self.log_event("early_stopping", step=self.progress.step, message=why)
        self.engine = self.parallel.wrap_model(
            step.compile_objective(self.objective) if self.args.compile else self.objective
        )
        self.parameters_in_place = parameters_in_place(self.objective)
        self.hooks = [] if self.args.compile else step.interrupt_backward(self.trainable_parameters)
        self.initial_progress, self.start_time = replace(self.progress), time.monotonic()
        self.checkpoints.last_save_time = self.start_time
        self.health.experts.start()
        self.last_logged = self.initial_progress
        self.logger.start(self.progress.step, self.args.max_steps)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.health.experts.stop()
        for hook in self.hooks:
            hook.remove()
        self.checkpoints.saver.close()
        self.logger.close()

    def _resume_or_start(self) -> None:
        """Resume from the run's checkpoint, or seed the generators of every process for a new run."""
        if self.checkpoints.load_into(self.state):
            return
        self.state.rng.seed()
        if bad := self.parallel.first_nonempty(find_bad_parameter(self.model)):
            raise GuardStop(f"{bad} before the first step: look at the initialization or at the loaded weights")
        self.log_event("started", steps=self.args.max_steps)

    def forward_backward(self, signal_handler: SignalHandler) -> step.StepStats | None:
        """Forward and backward over the micro-batches of a step; afterwards every gradient is a sum, and nothing is
        updated. None if the step was given up because of a signal: the run stops."""
        before, buffers = capture_generators(), self.state.objective_buffers()
        try:
            return self._forward_backward(signal_handler)
        except StepInterrupted:
            pass
        except Exception as error:
            if not (isinstance(error, RuntimeError) and self.parallel.is_abandoned()):
                self.health.stop_if_weights_are_bad(error)
                raise
        self._abandon_step(signal_handler, before)
        self.state.restore_objective(buffers)
        self.save()
        return None

    def _forward_backward(self, signal_handler: SignalHandler) -> step.StepStats:
        self.step_start = time.perf_counter()
        if self.parallel.is_abandoned():
            raise StepInterrupted
        with signal_handler.interruptible(allowed=self.parallel.can_abandon):
            with phase("reading the batch"):
                self.micro_batches = list(self.dataloader.batches(self.progress.step))
            self.parallel.require_equal_schedules(len(self.micro_batches), self.progress.step)
            try:
                sums, tokens = step.accumulate_gradients(
                    self.engine, self.micro_batches, self.parallel, self.args.precision
                )
            except RuntimeError as error:
                step.raise_if_out_of_memory(error, self.progress.step)
                raise
            self.parallel.all_reduce_replicated_gradients(self.trainable_parameters)
        requests = self._requests(signal_handler)
        return step.reduce_step_stats(sums, tokens, requests, self.trainable_parameters, self.parallel)

    def _requests(self, signal_handler: SignalHandler) -> tuple[bool, ...]:
        """The requests of this process: one flag for each stop signal, whether to save, whether the time is over."""
        now, limit = time.monotonic(), self.args.max_seconds
        save = signal_handler.save_requested or self.checkpoints.is_late()
        signal_handler.save_requested = False
        late = limit is not None and now - self.start_time >= limit
        return (*(signal_handler.stop_signal == number for number in STOP_SIGNALS), save, late)

    def _abandon(self, signal_handler: SignalHandler) -> None:
        """Stop, in the state that all processes have in common."""
        self.parallel.abandon()
        put_parameters_back(self.parameters_in_place)
        announced = self.parallel.store.read_stop_signal() if self.parallel.store is not None else 0
        self.status, self.signal_number = "interrupted", signal_handler.stop_signal or announced

    def _abandon_step(self, signal_handler: SignalHandler, before: GeneratorStates) -> None:
        """Stop, in the state before the step that is under way."""
        self._abandon(signal_handler)
        if isinstance(self.dataloader, RewindableLoader):
            self.dataloader.rewind()
        self.optimizer.zero_grad(set_to_none=True)
        before.restore()
        self.log_event("abandoned", step=self.progress.step + 1, message="given up; the resumed run does it again")

    def optimizer_step(self, stats: step.StepStats, callbacks: Sequence[Callback]) -> None:
        """Divide, clip and update; or skip the update and log why."""
        self.state.set_learning_rate()
        if not stats.parameter_norm <= MAX_PLAUSIBLE_WEIGHT:
            bad = self.parallel.first_nonempty(find_bad_parameter(self.model))
            self.health.stop_run(bad or "the weights are not finite")
        refused = self.guard.refusal_reason(stats.loss, stats.grad_norm, stats.count)
        if not refused:
            step.scale_gradients_(self.trainable_parameters, stats, self.args.max_grad_norm)
            self.optimizer.step()
            self.health.after_update(self.progress.step + 1, stats)
        else:
            if self.guard.nonfinite_streak:
                self.health.after_skip(self.progress.step + 1)
            if self.guard.stop_reason or self.guard.nonfinite_streak == 1:
                refused = self.health.locate_nonfinite(refused, self.objective, self.micro_batches)
        self.progress.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.callback_metrics = {}
        if refused:
            self.log_event("skipped", step=self.progress.step, message=refused)
        for callback in callbacks:
            if refused:
                callback.on_step_skipped(self.model)
            else:
                self.callback_metrics |= callback.on_step_end(self.model, self.progress.step) or {}
        self.progress.tokens += stats.tokens
        self.progress.train_seconds += time.perf_counter() - self.step_start
        self._update_status(stats)

    def _update_status(self, stats: step.StepStats) -> None:
        """Set the status. It is the same on every process, because requests to stop are reduced with the numbers of
        the step."""
        *stops, self.save_requested, late = stats.requests
        if self.progress.step >= self.args.max_steps:
            self.status = "finished"
        elif any(stops):
            self.status, self.signal_number = "interrupted", STOP_SIGNALS[stops.index(True)]
        elif late:
            self.status = "time"
        expected = self.args.expected_loss
        if self.progress.step == 1 and expected is not None and (text := initial_loss_warning(stats.loss, expected)):
            self.log_event("warning", message=text)

    def evaluate(self, evaluators: Sequence[Evaluator], signal_handler: SignalHandler, *, is_last: bool) -> bool:
        """Run the evaluators that are due (is_last: all), without a trace on the model or the generators. False where
        a signal ends them, or has ended the run before."""
        due = [
            evaluator
            for evaluator in evaluators
            if is_last or (evaluator.interval and self.progress.step % evaluator.interval == 0)
        ]
        self.eval_metrics = {}
        if not due or self.status == "interrupted":
            return not due
        buffers = self.state.objective_buffers()
        try:
            with signal_handler.interruptible(allowed=self.parallel.can_abandon):
                self.eval_metrics = self.measure(due)
                self.evaluators_run |= set(map(id, due))
                return True
        except StepInterrupted:
            pass
        except RuntimeError:
            if not self.parallel.is_abandoned():
                raise
        self._abandon(signal_handler)
        self.state.restore_objective(buffers)  # an evaluator may have begun to count anew
        return False

    def measure(self, evaluators: Sequence[Evaluator]) -> dict[str, Any]:
        """The numbers of these evaluators, name/metric -> value."""
        metrics: dict[str, Any] = {}
        with evaluation_mode(self.model), step.autocast(self.args.precision, self.parallel.device):
            for evaluator in evaluators:
                shown = PHASE_NAMES.get(evaluator.name, evaluator.name)
                try:
                    with phase(shown), self.parallel.unshard_model(self.objective):
                        measured = evaluator.evaluate(self.model, self.progress.step)
                except Exception as error:
                    self.health.stop_if_weights_are_bad(error)
                    if isinstance(error, OSError) and self.run_dir is not None:  # of samples, say
                        self.run_dir.require_present()
                    raise
                metrics |= {f"{evaluator.name}/{name}": value for name, value in measured.items()}
        return metrics

    def is_log_step(self) -> bool:
        return self.is_finished or self.progress.step == 1 or self.progress.step % self.args.logging_steps == 0

    def make_row(self, stats: step.StepStats) -> dict[str, Any]:
        """The row of metrics of the step that is done, without its evaluations."""
        progress, before = self.progress, self.last_logged
        seconds = progress.train_seconds - before.train_seconds
        return {
            "step": progress.step, "tokens": progress.tokens, "loss": stats.loss, **stats.metrics,
            "grad_norm": stats.grad_norm, "learning_rate": self.optimizer.param_groups[0]["lr"],
            "num_targets": stats.count,
            "tokens_per_second": (progress.tokens - before.tokens) / seconds if seconds else 0.0,
            "train_seconds": progress.train_seconds,
            "skipped_steps": self.guard.skipped, "empty_steps": self.guard.empty,
            **{name: float(value) for name, value in self.callback_metrics.items()},
        }  # fmt: skip

    def log(self, row: Mapping[str, Any], watchers: Sequence[MetricsCallback] = ()) -> None:
        """Log the row, with what was measured, if one is due, and pass it to the watchers."""
        if not self.eval_metrics and not self.is_log_step():
            return
        row = {**row, **self.eval_metrics}
        self.progress.latest_metrics = self.progress.latest_metrics | json_safe(row)
        self.last_logged = replace(self.progress)
        self.run_log.metrics(row)
        self.health.consult(watchers, row)

    def save(self) -> None:
        """Save a checkpoint if one is due or requested, and log the one that has been written meanwhile. A last one
        whose evaluations have been made up is written anew."""
        number, is_made_up = self.progress.step, self.was_pending and self.progress.pending is None
        replaces = is_made_up and self.status == "finished" and number == self.checkpoints.step
        due = self.is_finished or self.save_requested or self.improved or self.checkpoints.is_due(number)
        self.checkpoints.collect(wait=due)
        if due and self.run_dir is not None and (number != self.checkpoints.step or replaces):
            bad = find_bad_parameter(self.model) or find_bad_optimizer_state(self.model, self.optimizer)
            if bad := self.parallel.first_nonempty(bad):
                self.health.stop_run(f"{bad} after the update of step {number}")
            self.checkpoints.save(self.state, is_last=self.status == "finished", replaces=replaces)
        self.checkpoints.collect(wait=self.is_finished)

    def result(self, signal_handler: SignalHandler) -> TrainResult:
        """The result of the run. One that was told to stop while it saved its last step is interrupted: what comes
        after the loop is left to the resumed run."""
        if self.status == "finished" and (stop_signal := max(self.parallel.all_gather(signal_handler.stop_signal))):
            self.status, self.signal_number = "interrupted", stop_signal
        self.log_event(self.status, step=self.progress.step)
        tokens, busy = (
            self.progress.tokens - self.initial_progress.tokens,
            self.progress.train_seconds - self.initial_progress.train_seconds,
        )
        return TrainResult(
            step=self.progress.step,
            status=self.status,
            exit_code=128 + self.signal_number if self.signal_number else 0,
            metrics=self.progress.latest_metrics,
            seconds=time.monotonic() - self.start_time,
            tokens=tokens,
            tokens_per_second=tokens / busy if busy else 0.0,
            checkpoint_path=self.checkpoints.path,
        )
