"""CheckpointManager: saves the checkpoints of a run, decides which are kept, and loads the one it resumes from."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from llm_quest.errors import ResourceError
from llm_quest.files import damaged_file_errors
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.checkpoint import (
    SHARDS_DIR,
    STATE_FILE,
    Checkpoint,
    CheckpointSaver,
    Retention,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
)
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir, RunLog
from llm_quest.train.state import TrainState


class CheckpointManager:
    """The checkpoints of a run: saving, retention, loading. path: the newest checkpoint that is complete, empty before
    the first. step: of the newest one that was begun."""

    def __init__(self, args: TrainingArguments, run_dir: RunDir | None, parallel: DistributedContext, log: RunLog):
        self.args, self.run_dir, self.parallel, self.run_log = args, run_dir, parallel, log
        self.saver = CheckpointSaver(args.async_save and parallel.strategy != "fsdp")  # whose processes write together
        self.path, self.step = "", -1
        self.last_save_time = time.monotonic()

    def load_into(self, state: TrainState) -> bool:
        """Load the checkpoint that the run goes on from; False if there is none."""
        leads = self.run_dir is not None and self.parallel.is_main_process
        folder = self.parallel.broadcast(
            str(self.run_dir.resolve_checkpoint() or "") if leads and self.run_dir is not None else ""
        )
        if not folder:
            return False
        checkpoint = load_checkpoint(Path(folder))
        load_tensors = None
        if (Path(folder) / SHARDS_DIR).is_dir():
            from llm_quest.train.sharded_checkpoint import open_shards

            load_tensors = open_shards(Path(folder)).load_into
        with damaged_file_errors(Path(folder) / STATE_FILE, "resume from an older checkpoint, or start a new run"):
            state.load_state_dict(checkpoint.state_dict, load_tensors)
            changes = state.environment_changes(checkpoint.state_dict)
        self.path, self.step = folder, checkpoint.step
        self.run_log.event("resumed", checkpoint=folder, step=checkpoint.step)
        for note in changes:
            self.run_log.event("changed", message=note)
        return True

    def is_late(self) -> bool:
        """Whether the last save is so long ago that the next step is saved."""
        every = self.args.save_seconds
        return every > 0 and time.monotonic() - self.last_save_time >= every

    def is_due(self, step: int) -> bool:
        """Whether this is a step at whose multiples checkpoints are saved."""
        return self.args.save_steps > 0 and step % self.args.save_steps == 0

    def save(self, state: TrainState, *, is_last: bool, replaces: bool = False) -> None:
        """Start to save a checkpoint. The one before it has been collected. is_last: the run is finished, so that no
        older checkpoint is kept in case the run turns out to diverge. replaces: of Checkpoint."""
        progress = state.progress
        if self.run_dir is None:
            return
        checkpoint = Checkpoint(progress.step, state.state_dict(), self.run_dir.identity, replaces)
        self.step, self.last_save_time = progress.step, time.monotonic()
        kept = [step for step in (progress.best_step, progress.good_step) if step is not None]
        healthy_until = state.divergence.healthy_until(self.step, is_last=is_last)
        retention = Retention(self.args.save_total_limit, self.args.keep_every, kept, healthy_until)
        write = partial(self.run_dir.save_checkpoint, checkpoint, retention)
        if self.parallel.strategy == "fsdp":
            self.saver.start(partial(write, self.parallel))
        elif self.parallel.is_main_process:
            self.saver.start(write)

    def collect(self, wait: bool) -> None:
        """Log the checkpoint that the background thread has written since the last call. wait: block until it has."""
        try:
            folder = self.saver.take_result(wait)
        except ResourceError as error:
            self.run_log.event("save_failed", message=str(error))
            if self.args.on_disk_full == "stop":
                raise
            return
        if folder is not None:
            self.path = str(folder)
            self.run_log.event("saved", checkpoint=self.path, step=checkpoint_step(folder))

    def last_good(self, onset: int) -> int | None:
        """The step of the newest checkpoint up to this one; None if there is none. The main process lists them, so that
        every process has the same answer."""
        self.collect(wait=True)
        steps = []
        if self.run_dir is not None and self.parallel.is_main_process:
            steps = [checkpoint_step(folder) for folder in list_checkpoints(self.run_dir.checkpoints)]
        newest: int | None = self.parallel.broadcast(max((step for step in steps if step <= onset), default=None))
        return newest
