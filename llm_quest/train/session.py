"""A run in progress: everything that moves while the loop turns, and each of the loop's verbs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from llm_quest.contracts import Callback, Feed, Probe, Watcher
from llm_quest.errors import GuardStop, ResourceError, UsageError
from llm_quest.train import checkpoint as files
from llm_quest.train import snapshot, step
from llm_quest.train.guards import Guard, first_bad, not_finite, surprising
from llm_quest.train.log import Display
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run, finite
from llm_quest.train.saver import Saver
from llm_quest.train.schedule import Schedule
from llm_quest.train.settings import Result, Settings
from llm_quest.train.signals import Signals
from llm_quest.train.state import derive_seed, seed_all, undisturbed

REMEDY = "lower the micro-batch and raise accumulation, switch activation checkpointing on, or shorten the sequences"


@dataclass
class Moment:
    """Where a run is; saved with it. step: how many are done. busy: seconds spent in steps. latest: the newest
    numbers."""

    step: int = 0
    tokens: int = 0
    busy: float = 0.0
    best: float | None = None
    best_step: int | None = None
    latest: dict[str, Any] = field(default_factory=dict)


class Session:
    """`with session:` resumes or begins, and at the end waits for what is being written."""

    def __init__(
        self,
        objective: nn.Module,
        feed: Feed,
        optimizer: Optimizer,
        settings: Settings,
        run: Run | None,
        parallel: Parallel,
        display: Display,
    ):
        self.objective, self.feed, self.optimizer = objective, feed, optimizer
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.settings, self.run, self.parallel, self.display = settings, run, parallel, display
        self.learned = require_masters(self.model)
        self.moment = Moment()
        self.guard = Guard(settings.max_bad_steps, settings.max_empty_steps)
        self.saver = Saver(settings.background_save)
        self.batches: Sequence[Any] = ()
        self.status = "" if settings.steps else "finished"
        self.signal = 0
        self.saved, self.saved_step, self.wanted = "", -1, False
        self.measured: dict[str, Any] = {}
        self.told: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        """Has the run ended, one way or another?"""
        return self.status != ""

    def __enter__(self) -> Session:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.model.train()
        self._begin()
        if self.moment.step >= self.settings.steps:
            self.status = "finished"
        self.engine = self.parallel.engine(compiled(self.objective) if self.settings.compile else self.objective)
        self.first, self.since, self.logged = Moment(**vars(self.moment)), time.monotonic(), Moment(**vars(self.moment))
        self.display.start(self.moment.step, self.settings.steps)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.saver.close()
        self.display.close()

    def _begin(self) -> None:
        """From the run's checkpoint, or from the beginning with a seed of its own for every process."""
        leads = self.run is not None and self.parallel.leader
        folder = self.parallel.broadcast(str(self.run.start() or "") if leads and self.run is not None else "")
        if folder:
            checkpoint = snapshot.open_(folder)
            notes = snapshot.restore(self, checkpoint)
            self.saved, self.saved_step = folder, checkpoint.step
            self.event("resumed", checkpoint=folder, step=checkpoint.step)
            for note in notes:
                self.event("changed", message=note)
            return
        seed_all(derive_seed(self.settings.seed, "train", self.parallel.rank))
        if bad := next((found for found in self.parallel.gather(not_finite(self.model)) if found), ""):
            raise GuardStop(
                f"{bad} is not finite before the first step: look at the initialisation or at the loaded weights"
            )
        self.event("started", steps=self.settings.steps)

    def gradients(self, signals: Signals) -> step.Numbers:
        """Forward and backward over the step's micro-batches; afterwards every gradient is a sum, and nothing is
        updated."""
        self.clock = time.perf_counter()
        self.batches = list(self.feed.at(self.moment.step))
        try:
            sums, tokens = step.gradients(self.engine, self.batches, self.parallel, self.settings.precision)
        except RuntimeError as error:
            raise_if_out_of_memory(error, self.moment.step)
            raise
        limit = self.settings.max_time
        late = limit is not None and time.monotonic() - self.since >= limit
        asked = (signals.stop == 2, signals.stop == 15, signals.save, late)
        signals.save = False
        return step.together(sums, tokens, asked, self.learned, self.parallel)

    def update(self, numbers: step.Numbers, schedule: Schedule, callbacks: Sequence[Callback]) -> None:
        """Divide, clip, step; or leave the model as it is and say why. Then this step is done."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(self.moment.step)
        refused = self.guard.judge(numbers.loss, numbers.norm, numbers.count)
        if not refused:
            step.scale_(self.learned, numbers, self.settings.clip)
            self.optimizer.step()
        elif self.guard.fatal:
            self._stop(refused)
        self.moment.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.told = {}
        if refused:
            self.event("skipped", step=self.moment.step, message=refused)
        for callback in callbacks:
            if refused:
                callback.after_refusal(self.model)
            else:
                self.told |= callback.after_step(self.model, self.moment.step) or {}
        self.moment.tokens += numbers.tokens
        self.moment.busy += time.perf_counter() - self.clock
        self._decide(numbers)

    def _decide(self, numbers: step.Numbers) -> None:
        """Every process has the same answer: who was asked to stop travelled with the step's numbers."""
        interrupt, terminate, self.wanted, late = numbers.asked
        if self.moment.step >= self.settings.steps:
            self.status = "finished"
        elif interrupt or terminate:
            self.status, self.signal = "interrupted", 2 if interrupt else 15
        elif late:
            self.status = "time"
        expected = self.settings.expected_loss
        if self.moment.step == 1 and expected is not None and (text := surprising(numbers.loss, expected)):
            self.event("warning", message=text)

    def measure(self, probes: Sequence[Probe]) -> None:
        """The probes that are due, on a model that does not notice. A run that was told to stop does not dally."""
        final = self.status == "finished"
        chosen = [probe for probe in probes if final or (probe.every and self.moment.step % probe.every == 0)]
        self.measured = {}
        if not chosen or self.status == "interrupted":
            return
        precision, device = self.settings.precision, self.parallel.device
        with self.parallel.gathered(self.objective), undisturbed(self.model), step.autocast(precision, device):
            for probe in chosen:
                found = probe.measure(self.model, self.moment.step)
                self.measured |= {f"{probe.name}/{name}": value for name, value in found.items()}

    def log(self, numbers: step.Numbers, watchers: Sequence[Watcher] = ()) -> None:
        """A row of metrics, if it is time for one or there is something to tell; and what the watchers say to it."""
        moment, before = self.moment, self.logged
        due = self.measured or self.over or moment.step == 1
        if not due and moment.step % self.settings.log_every:
            return
        seconds = moment.busy - before.busy
        told = {name: float(value) for name, value in self.told.items()}
        row = {
            "step": moment.step, "tokens": moment.tokens, "loss": numbers.loss, **numbers.metrics,
            "grad_norm": numbers.norm, "lr": self.optimizer.param_groups[0]["lr"], "count": numbers.count,
            "tokens_per_second": (moment.tokens - before.tokens) / seconds if seconds else 0.0,
            "seconds": moment.busy, "skipped": self.guard.skipped, "empty": self.guard.empty, **told, **self.measured,
        }  # fmt: skip
        moment.latest = moment.latest | finite(row)
        self.logged = Moment(**vars(moment))
        if self.parallel.leader:
            self.display.row(row)
            if self.run is not None:
                self.run.row(row)
        for watcher in watchers:
            self._heed(watcher, row)

    def _heed(self, watcher: Watcher, row: Mapping[str, Any]) -> None:
        """Advice becomes an event; a stop leaves a crash.json first."""
        try:
            for advice in watcher.watch(row):
                self.event("advice", step=self.moment.step, message=advice)
        except GuardStop as stop:
            report = {"step": self.moment.step, "reason": str(stop), "last_row": self.moment.latest}
            if self.run is not None:
                self.run.crash(report)
            self.event("guard stop", **report)
            raise

    def save(self) -> None:
        """A checkpoint, if one is due or wished for; and word of the one that has been written meanwhile."""
        moment, every = self.moment, self.settings.save_every
        due = self.over or self.wanted or (every > 0 and moment.step % every == 0)
        self._collect(wait=due)
        if due and self.run is not None and moment.step != self.saved_step:
            self._note_best()
            checkpoint = snapshot.take(self)
            self.saved_step = moment.step
            if self.parallel.leader:
                keep = (self.settings.keep, self.settings.keep_every, moment.best_step)
                self.saver.save(partial(self.run.write, checkpoint, *keep))
        self._collect(wait=self.over)

    def _note_best(self) -> None:
        found = self.measured.get(self.settings.best)
        if found is not None and math.isfinite(found) and (self.moment.best is None or found < self.moment.best):
            self.moment.best, self.moment.best_step = found, self.moment.step

    def _collect(self, wait: bool) -> None:
        try:
            folder = self.saver.done(wait)
        except ResourceError as error:
            self.event("not saved", message=str(error))
            if self.settings.on_disk_full == "stop":
                raise
            return
        if folder is not None:
            self.saved = str(folder)
            self.event("saved", checkpoint=self.saved, step=files.step_of(folder))

    def _stop(self, refused: str) -> None:
        """Find the first bad module by running the step again, leave a crash.json, raise GuardStop."""
        culprit = next((found for found in self.parallel.gather(self._culprit()) if found), "no module, this time")
        report = {"step": self.moment.step + 1, "reason": self.guard.fatal, "last": refused, "first_bad": culprit}
        report |= {"feed": self.feed.bookmark(), "guard": asdict(self.guard), "last_row": self.moment.latest}
        where = f" ({self.run.crash(report)})" if self.run is not None else ""
        self.event("guard stop", **report)
        raise GuardStop(
            f"stopped at step {self.moment.step + 1}: {self.guard.fatal}. The first number that is not finite is "
            f"in: {culprit}{where}. Lower the learning rate, look at the data of this step, or resume from an earlier "
            "checkpoint"
        )

    def _culprit(self) -> str:
        if not self.guard.bad_run:
            return "none: the data has no targets"
        self.optimizer.zero_grad(set_to_none=True)
        batches = [batch.to(self.parallel.device) for batch in self.batches]
        try:
            with step.autocast(self.settings.precision, self.parallel.device):
                return first_bad(self.objective, batches, self.objective.forward)
        except RuntimeError as error:
            return f"unknown: running the step again failed ({error})"

    def event(self, name: str, **fields: Any) -> None:
        """To the diary and to whoever watches."""
        if self.parallel.leader:
            self.display.event(
                f"{name}: " + "  ".join(str(v) if k == "message" else f"{k} {v}" for k, v in fields.items())
            )
            if self.run is not None:
                self.run.event(name, **fields)

    def result(self) -> Result:
        """How it ended."""
        self.event(self.status, step=self.moment.step)
        tokens, busy = self.moment.tokens - self.first.tokens, self.moment.busy - self.first.busy
        return Result(
            step=self.moment.step,
            status=self.status,
            exit_code=128 + self.signal if self.signal else 0,
            metrics=self.moment.latest,
            seconds=time.monotonic() - self.since,
            tokens=tokens,
            tokens_per_second=tokens / busy if busy else 0.0,
            saved=self.saved,
        )


def require_masters(model: nn.Module) -> list[nn.Parameter]:
    """What is learned. UsageError if it is held in 16 bits: updates smaller than a 500th of a weight are rounded
    away."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not learned:
        raise UsageError("the model has no trainable parameter: every one is frozen (requires_grad is False)")
    small = [name for name, p in learned.items() if p.dtype not in (torch.float32, torch.float64)]
    if small:
        raise UsageError(
            f"{len(small)} trainable parameters are {learned[small[0]].dtype} (first: {small[0]}): small updates "
            "would be rounded away; load the model as float32 and set precision=bf16"
        )
    return list(learned.values())


def compiled(objective: nn.Module) -> nn.Module:
    """torch.compile in place, so that no name changes; under FSDP2 block by block, for its hooks are between them."""
    blocks = [module for module in objective.modules() if isinstance(module, FSDPModule) and module is not objective]
    for module in blocks or (objective,):
        module.compile()  # type: ignore[attr-defined]
    return objective


def raise_if_out_of_memory(error: RuntimeError, number: int) -> None:
    """ResourceError in place of torch's, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise ResourceError(f"out of memory in step {number + 1}: {REMEDY} ({str(error).splitlines()[0]})") from error
