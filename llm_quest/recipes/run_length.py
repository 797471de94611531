"""A run that is made longer or shorter in place: `quest train RUN max_steps=2000`.

The learning rate is a function of the step and of the length of the whole run, so from the next step on it is that of a
run of the new length: of a cosine or a line it rises again, of a constant rate nothing changes, and of wsd the decay
begins anew. The warm-up is not repeated. What is learned at each step, the order of the data, stays."""

from __future__ import annotations

from pathlib import Path

from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.train.checkpoint import checkpoint_step, list_checkpoints
from llm_quest.train.optimizers import LRSchedule


def check_new_length(folder: Path, max_steps: int) -> None:
    """UsageError for fewer steps than the run has done."""
    done = checkpoint_step(list_checkpoints(folder / "checkpoints")[-1])
    if max_steps < done:
        raise UsageError(
            f"{folder} has done {done:,} steps, and max_steps={max_steps} asks for fewer: give {done} or more, or go "
            f"on from an earlier checkpoint in a new run (model.load={folder}@last)"
        )


def describe_new_length(
    folder: Path, before: int, after: int, schedules: tuple[LRSchedule, LRSchedule], log: LogFn
) -> None:
    """What changes with another number of steps. schedules: of the old and of the new length."""
    done = checkpoint_step(list_checkpoints(folder / "checkpoints")[-1])
    old, new = (schedule(done) for schedule in schedules)
    log(
        f"the run has {after:,} steps now instead of {before:,}: from step {done:,} on its learning rate is that of a "
        f"run of this length ({new:.3g} of the peak, {old:.3g} before)"
    )
