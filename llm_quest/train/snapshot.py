"""From a session to a checkpoint and back: which facts of a run are saved, and what must agree to promise the same
bits."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_quest.errors import DataError
from llm_quest.train import checkpoint as files
from llm_quest.train import state
from llm_quest.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from llm_quest.train.session import Session


def take(session: Session) -> Checkpoint:
    """The session's moment, copied to the host. Every process takes part; the leader's holds the tensors."""
    keep = session.parallel.leader
    tensors, numbers = state.optimizer_state(session.model, session.optimizer, keep)
    saved = {
        "moment": asdict(session.moment),
        "guard": session.guard.counts(),
        "seed": session.settings.seed,
        "rates": [group["lr"] for group in session.optimizer.param_groups],
        "optimizer": {"kind": type(session.optimizer).__name__, "numbers": numbers},
        "feeds": session.parallel.gather(session.feed.bookmark()),
        "random": session.parallel.gather(state.random_state()),
        "place": place(session),
    }
    saved = json.loads(json.dumps(saved))
    identity = {} if session.run is None else session.run.identity
    return Checkpoint(session.moment.step, state.weights(session.model, keep), tensors, saved, identity)


def restore(session: Session, checkpoint: Checkpoint) -> list[str]:
    """Set the session to a checkpoint. Returns what is not as it was, so that the bits may differ."""
    saved, rank = checkpoint.state, session.parallel.rank
    kind = saved["optimizer"]["kind"]
    if kind != type(session.optimizer).__name__:
        raise DataError(f"the checkpoint's optimiser is {kind}, this run's is {type(session.optimizer).__name__}")
    state.load_weights(session.model, checkpoint.model)
    state.load_optimizer(session.model, session.optimizer, checkpoint.optim, saved["optimizer"]["numbers"])
    for name, value in saved["moment"].items():
        setattr(session.moment, name, value)
    for name, value in saved["guard"].items():
        setattr(session.guard, name, value)
    same_world = len(saved["random"]) == session.parallel.world
    session.feed.resume(saved["feeds"][rank if same_world else 0])
    if same_world:
        state.restore_random(saved["random"][rank])
    else:
        state.seed_all(state.derive_seed(session.settings.seed, "train", rank, checkpoint.step))
    return [
        f"{name} was {before} and is {value}: the resumed run may differ from the straight one in its last bits"
        for name, value in place(session).items()
        if (before := saved["place"].get(name)) != value
    ]


def place(session: Session) -> dict[str, Any]:
    """What the promise of the same bits rests on."""
    return {
        "threads": torch.get_num_threads(),
        "processes": session.parallel.world,
        "engine": session.parallel.kind,
        "device": session.parallel.device.type,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "precision": session.settings.precision,
        "compile": session.settings.compile,
    }


def open_(folder: str) -> Checkpoint:
    """Read a checkpoint whose manifest has been checked."""
    try:
        return files.read(Path(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the checkpoint {folder} cannot be read: {error}") from error
