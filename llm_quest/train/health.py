"""HealthMonitor: warns of a run that fails although its numbers are finite, in the step in which it is certain, with
the module, the last good checkpoint and the remedy.

A loss that diverges, gradients that explode (`divergence.py`), experts that get no tokens (`ExpertLoadMonitor`), and
what the watchers of a recipe report as a collapse (`rollouts/diagnostics.py`). The newest checkpoint from before it
began is then kept, whatever `save_total_limit` says, and is RUN@good, until the run is healthy again.

Numbers that are not finite stop it: `guards.py` finds them, `stop_run` says where they began and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from llm_quest.contracts import MetricsCallback, ObservableRouter, format_list
from llm_quest.errors import GuardStop
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.checkpoint import checkpoint_dir
from llm_quest.train.checkpoint_manager import CheckpointManager
from llm_quest.train.divergence import MARGIN, largest_gradient
from llm_quest.train.guards import (
    NO_CULPRIT,
    describe_good_checkpoint,
    find_bad_parameter,
    find_culprit,
    suggest_remedies,
)
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import capture_generators
from llm_quest.train.run_dir import RunLog
from llm_quest.train.state import TrainState
from llm_quest.train.step import StepStats

EXPERT_REMEDY = (
    "Raise router_aux_loss_coef (or, where routers have a bias, expert_bias_update_speed), or lower learning_rate"
)


class HealthMonitor:
    """Watches a training run. signs: the present signs of failure by name, each with the last healthy step."""

    def __init__(
        self,
        state: TrainState,
        args: TrainingArguments,
        checkpoints: CheckpointManager,
        log: RunLog,
        parallel: DistributedContext,
    ):
        self.state, self.args, self.checkpoints, self.run_log, self.parallel = state, args, checkpoints, log, parallel
        self.experts = ExpertLoadMonitor(state.model, parallel)
        self.signs: dict[str, int | None] = {}

    def after_update(self, step: int, stats: StepStats) -> None:
        """Check the numbers of an update, while its gradients exist."""
        loss = stats.metrics.get("next_token", stats.loss)  # without router, look-ahead and teacher terms
        symptom = self.state.divergence.update(step, loss, stats.grad_norm, stats.parameter_norm)
        self._check_divergence(
            step, f"{symptom}; {largest_gradient(self.state.model, self.parallel)}" if symptom else ""
        )
        symptom, last_healthy = self.experts.update(step), self.experts.last_healthy
        self._set_sign("experts", bool(self.experts.dead), None if last_healthy is None else last_healthy - MARGIN)
        if symptom:
            self._warn("dead_experts", step, f"{symptom}. {self.describe_good()}. {EXPERT_REMEDY}")

    def after_skip(self, step: int) -> None:
        """Check after a step that was skipped because its numbers are not finite."""
        self._check_divergence(step, self.state.divergence.skip(step))

    def _check_divergence(self, step: int, symptom: str) -> None:
        divergence, args = self.state.divergence, self.args
        self._set_sign("divergence", divergence.is_diverging, divergence.onset)
        if symptom:
            rate = self.state.optimizer.param_groups[0]["lr"]
            remedies = suggest_remedies(rate, args.precision, args.max_grad_norm)
            self._warn("diverging", step, f"{symptom}. {self.describe_good()}. {remedies}")

    def consult(self, watchers: Sequence[MetricsCallback], row: Mapping[str, Any]) -> None:
        """Log the advice of the recipe's watchers; if one stops the run, write crash.json first."""
        step = self.state.progress.step
        for number, watcher in enumerate(watchers):
            try:
                advice, stop = watcher.on_log(row), None
            except GuardStop as error:
                advice, stop = [], error
            since = watcher.collapse_since
            self._set_sign(f"watcher {number}", since is not None, None if since is None else since - MARGIN)
            good = f". {self.describe_good()}" if since is not None else ""
            for text in advice:
                self._warn("advice", step, text + good)
            if stop is not None:
                last_row = self.state.progress.latest_metrics
                self.run_log.write_crash_report({"step": step, "reason": str(stop), "last_row": last_row})
                raise GuardStop(f"{stop}{good}") from stop

    def _warn(self, name: str, step: int, message: str) -> None:
        self.run_log.event(name, step=step, message=message)

    def _set_sign(self, sign: str, is_present: bool, onset: int | None) -> None:
        """Set or clear a sign; while there is any, the newest checkpoint up to its onset is kept. onset None: the run
        was never healthy."""
        progress = self.state.progress
        if is_present and (sign not in self.signs or self.signs[sign] != onset):
            self.signs[sign] = onset
            if progress.good_step is None and onset is not None:
                progress.good_step = self.checkpoints.last_good(onset)
        elif not is_present and sign in self.signs:
            del self.signs[sign]
            if not self.signs:
                progress.good_step = None

    def stop_if_weights_are_bad(self, error: Exception) -> None:
        """Raise GuardStop in place of an error in a step or an evaluation whose cause is a weight."""
        if bad := "" if isinstance(error, GuardStop) else find_bad_parameter(self.state.model):
            self.stop_run(f"{bad} ({str(error).partition(chr(10))[0]})")

    def locate_nonfinite(self, refused: str, objective: nn.Module, micro_batches: Sequence[Any]) -> str:
        """Find the first bad module by running the step again: why the step is skipped. Stops the run where skipping
        cannot help, or has been done too often."""
        guard = self.state.guard
        if not guard.nonfinite_streak:
            self.stop_run(guard.stop_reason, refused)
        before = capture_generators()
        culprit = find_culprit(objective, micro_batches, self.args.precision, self.parallel.device)
        before.restore()
        culprit = self.parallel.first_nonempty(culprit if culprit != NO_CULPRIT else "") or culprit
        if culprit.startswith("parameter "):
            self.stop_run(culprit)
        culprit = f"the first number that is not finite is in: {culprit}"
        if guard.stop_reason:
            self.stop_run(f"{guard.stop_reason}, {culprit}", refused)
        return f"{refused}; {culprit}"

    def stop_run(self, reason: str, last: str = "") -> NoReturn:
        """Write crash.json, and raise GuardStop with the place, the last good checkpoint and the remedies."""
        state, args, checkpoints = self.state, self.args, self.checkpoints
        checkpoints.collect(wait=True)
        number = state.progress.step + 1
        report = {"step": number, "reason": reason, "last": last, "checkpoint": checkpoints.path}
        report |= {"loader": state.loader.state_dict(), "guard": asdict(state.guard)}
        report |= {"last_row": state.progress.latest_metrics}
        where = self.run_log.write_crash_report(report)
        is_well = state.progress.good_step is None
        good = describe_good_checkpoint(checkpoints.path) if is_well else self.describe_good()
        raise GuardStop(
            f"stopped at step {number}: {reason}{where}.\n{good}.\n"
            + suggest_remedies(state.optimizer.param_groups[0]["lr"], args.precision, args.max_grad_norm)
        )

    def describe_good(self) -> str:
        """A sentence that names the checkpoint from before the failure, and the command that resumes it."""
        run_dir, step = self.checkpoints.run_dir, self.state.progress.good_step
        if run_dir is None or step is None:
            return "There is no checkpoint from before (save_steps, save_minutes)"
        run = run_dir.folder
        return (
            f"The last good checkpoint is {checkpoint_dir(run_dir.checkpoints, step)}, which is kept; go on from it "
            f"by: quest train {run} --resume {run}@good --accept settings"
        )


INTERVAL = 20
"""Steps between two checks."""
LEAST_TOKENS = 200
"""Tokens that an expert would have got by now if the load were even: fewer prove nothing."""


@dataclass
class ExpertLoadMonitor:
    """Reports experts that get no tokens. An expert that its router never chooses has no gradient and never comes back
    by itself; in the end a router sends all tokens to the same few (router collapse).

    Commonly got wrong: the tokens of one process counted where each has other rows; padding counted, which all goes to
    one place; a small step taken for proof (an expert that is owed few tokens may well get none).

    `update(step)` after each step: a message that names the routers with newly dead experts; empty between two
    checks and where there is nothing new. dead: by router, as of the last check. last_healthy: step of the last check
    without dead experts; None before one."""

    model: nn.Module
    parallel: DistributedContext
    interval: int = INTERVAL
    dead: dict[str, tuple[int, ...]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    last_healthy: int | None = None

    def __post_init__(self) -> None:
        self.routers: dict[str, ObservableRouter] = {  # isinstance reads `weight`, which an adapter computes
            name: module
            for name, module in self.model.named_modules()
            if "observe_routing" in vars(module) and module.weight.requires_grad
        }

    def start(self) -> None:
        """Count from here on the tokens that each expert gets in passes with gradients."""
        for name, router in self.routers.items():
            self.counts[name] = torch.zeros(router.weight.shape[0], device=self.parallel.device)
            router.observe_routing = partial(count_tokens, self.counts[name])

    def stop(self) -> None:
        for router in self.routers.values():
            router.observe_routing = None

    @torch.no_grad()
    def update(self, step: int) -> str:
        if not self.routers or step % self.interval:
            return ""
        stacked = nn.utils.rnn.pad_sequence(list(self.counts.values()), batch_first=True, padding_value=-1.0)
        received = self.parallel.all_reduce_(stacked.clone()).tolist()
        shapes: dict[str, tuple[int, ...]] = {}
        for (name, counter), row in zip(self.counts.items(), received, strict=True):
            load = row[: counter.numel()]
            if sum(load) < LEAST_TOKENS * len(load):  # too few to tell: count on
                shapes |= {name: self.dead[name]} if name in self.dead else {}
                continue
            counter.zero_()
            if dead := tuple(number for number, tokens in enumerate(load) if tokens == 0):
                shapes[name] = dead
        new = {name: experts for name, experts in shapes.items() if not set(experts) <= set(self.dead.get(name, ()))}
        self.dead = shapes
        if not shapes:
            self.last_healthy = step
        return describe_dead(new, {name: counter.numel() for name, counter in self.counts.items()})


def count_tokens(counter: Tensor, routing: Any) -> None:
    """Add the tokens of a pass with gradients. routing: what a router calls `observe_routing` with."""
    if torch.is_grad_enabled():
        counter.add_(routing.tokens_per_expert().detach())


def describe_dead(dead: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> str:
    """The routers and their dead experts, the first few of them; empty if there is none."""
    if not dead:
        return ""
    listed = [
        f"{name} (expert{'s' * (len(experts) > 1)} {format_list(experts[:4])}"
        f"{f' and {len(experts) - 4} more' * (len(experts) > 4)} of {sizes[name]})"
        for name, experts in list(dead.items())[:3]
    ]
    more = f" and {len(dead) - 3} more routers" if len(dead) > 3 else ""
    return f"dead experts, which got no token in the last steps: {', '.join(listed)}{more}"
