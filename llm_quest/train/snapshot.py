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
from llm_quest.train import state_dict
from llm_quest.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from llm_quest.train.session import TrainSession


def take_snapshot(session: TrainSession) -> Checkpoint:
    """The session's moment, copied to the host. Every process takes part; the leader's holds the tensors."""
    keep = session.parallel.is_main_process
    tensors, numbers = state_dict.optimizer_state_dict(session.model, session.optimizer, keep)
    saved = {
        "moment": asdict(session.train_state),
        "guard": session.guard.state_dict(),
        "seed": session.args.seed,
        "rates": [group["lr"] for group in session.optimizer.param_groups],
        "optimizer": {"kind": type(session.optimizer).__name__, "numbers": numbers},
        "feeds": session.parallel.all_gather(session.dataloader.state_dict()),
        "random": session.parallel.all_gather(state_dict.get_rng_state()),
        "place": reproducibility_facts(session),
    }
    saved = json.loads(json.dumps(saved))
    identity = {} if session.run_dir is None else session.run_dir.identity
    return Checkpoint(
        session.train_state.step, state_dict.model_state_dict(session.model, keep), tensors, saved, identity
    )


def restore_snapshot(session: TrainSession, checkpoint: Checkpoint) -> list[str]:
    """Set the session to a checkpoint. Returns what is not as it was, so that the bits may differ."""
    saved, rank = checkpoint.state, session.parallel.rank
    kind = saved["optimizer"]["kind"]
    if kind != type(session.optimizer).__name__:
        raise DataError(f"the checkpoint's optimiser is {kind}, this run's is {type(session.optimizer).__name__}")
    state_dict.load_model_state_dict(session.model, checkpoint.model)
    state_dict.load_optimizer_state_dict(
        session.model, session.optimizer, checkpoint.optimizer, saved["optimizer"]["numbers"]
    )
    for name, value in saved["moment"].items():
        setattr(session.train_state, name, value)
    for name, value in saved["guard"].items():
        setattr(session.guard, name, value)
    same_world = len(saved["random"]) == session.parallel.world_size
    session.dataloader.load_state_dict(saved["feeds"][rank if same_world else 0])
    if same_world:
        state_dict.set_rng_state(saved["random"][rank])
    else:
        state_dict.set_seed(state_dict.derive_seed(session.args.seed, "train", rank, checkpoint.step))
    return [
        f"{name} was {before} and is {value}: the resumed run may differ from the straight one in its last bits"
        for name, value in reproducibility_facts(session).items()
        if (before := saved["place"].get(name)) != value
    ]


def reproducibility_facts(session: TrainSession) -> dict[str, Any]:
    """What the promise of the same bits rests on."""
    return {
        "threads": torch.get_num_threads(),
        "processes": session.parallel.world_size,
        "engine": session.parallel.strategy,
        "device": session.parallel.device.type,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "precision": session.args.precision,
        "compile": session.args.compile,
    }


def read_snapshot(folder: str) -> Checkpoint:
    """Read a checkpoint whose manifest has been checked."""
    try:
        return files.load_checkpoint(Path(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the checkpoint {folder} cannot be read: {error}") from error
