"""Checkpoints of FSDP2 runs: every process writes the parts that it holds (torch.distributed.checkpoint), and reads the
parts that it is to hold, on any number of processes.

      checkpoints/step-00001000/   shards/shard-00001-model-00001-of-00001.safetensors   of process 0
                                   shards/shard-00002-...                                 of process 1
                                   state.json   MANIFEST.json

No process gathers the model to save it. The files are safetensors, in whose headers stands where each part belongs;
there is no pickle. All processes need the same file system. `consolidate_checkpoint` makes the plain form of it
(model.safetensors, optim.safetensors), which everything else reads: generation, export, evaluation."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from llm_quest.atomic_dirs import exchange_names
from llm_quest.errors import DataError, ResourceError
from llm_quest.manifest import file_entry, find_fault
from llm_quest.train import checkpoint as files
from llm_quest.train.checkpoint import SHARDS_DIR, TENSOR_FILES, Checkpoint, load_checkpoint
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state import KEY_SEPARATOR, require_same_tensors, tensors_by_name


def save_sharded_checkpoint(root: Path, checkpoint: Checkpoint, parallel: DistributedContext) -> Path:
    """Commit a checkpoint whose tensors are sharded, and return its folder. Every process takes part. ResourceError on
    a full disk: the staged folder is removed, the others are as they were."""
    final = files.checkpoint_dir(root, checkpoint.step)
    staged = Path(parallel.broadcast(stage_checkpoint(root, checkpoint) if parallel.is_main_process else ""))
    try:
        dcp.save(
            {key: tensor for name in TENSOR_FILES for key, tensor in prefix_keys(checkpoint, name).items()},
            storage_writer=HuggingFaceStorageWriter(str(staged / SHARDS_DIR), save_distributed=True),
        )
    except CheckpointException as error:
        if parallel.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
        first = next(iter(error.failures.values()), error)
        raise ResourceError(
            f"{final.name} could not be written ({first}). Earlier checkpoints are untouched; make room under {root} "
            "and resume"
        ) from error
    own = sorted((staged / SHARDS_DIR).glob(f"shard-{parallel.rank + 1:05d}-*"))
    entries = parallel.all_gather({f"{SHARDS_DIR}/{file.name}": file_entry(file) for file in own})
    if parallel.is_main_process:
        files.commit_checkpoint(staged, checkpoint, {name: entry for part in entries for name, entry in part.items()})
    parallel.all_gather(None)  # it is there for all
    return final


def stage_checkpoint(root: Path, checkpoint: Checkpoint) -> str:
    """Make a hidden folder for the files of a checkpoint; return its path."""
    files.require_new(root, checkpoint)
    staged = Path(tempfile.mkdtemp(prefix=f".tmp-{checkpoint.step:08d}-", dir=root))
    (staged / SHARDS_DIR).mkdir()
    return str(staged)


def prefix_keys(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors of "model" or "optimizer" under the keys that they have in the shards."""
    return {f"{name}{KEY_SEPARATOR}{key}": tensor for key, tensor in checkpoint.state_dict[name].items()}


@dataclass(frozen=True)
class CheckpointShards:
    """The tensors of a sharded checkpoint. shapes, dtypes: by key, of the whole tensors."""

    folder: Path
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, whole ones or sharded ones, each process its own part: nothing is communicated."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant to be
            dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)

    def read(self, name: str) -> dict[str, Tensor]:
        """The whole tensors of "model" or "optimizer", on the host."""
        prefix = name + KEY_SEPARATOR
        targets = {
            key: torch.empty(shape, dtype=self.dtypes[key])
            for key, shape in self.shapes.items()
            if key.startswith(prefix)
        }
        self.read_into(targets)
        return {key.removeprefix(prefix): tensor for key, tensor in targets.items()}

    def load_into(self, model: nn.Module, optimizer: Optimizer, numbers: Mapping[str, Any]) -> None:
        """Load into a model and its optimizer, in place, sharded or not. numbers: the optimizer's plain values.
        ValueError lists every name or shape that does not match."""
        prefix, own = f"model{KEY_SEPARATOR}", tensors_by_name(model)
        saved = {key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)}
        require_same_tensors(own, saved)
        targets = {prefix + name: tensor.data for name, tensor in own.items()}
        named = dict(model.named_parameters())
        optimizer.state.clear()
        for key in self.shapes.keys() - targets.keys():
            _, name, entry = key.split(KEY_SEPARATOR)
            targets[key] = optimizer.state[named[name]][entry] = self.empty_like(key, named[name])
        self.read_into(targets)
        for key, value in numbers.items():
            name, entry = key.split(KEY_SEPARATOR)
            optimizer.state[named[name]][entry] = value

    def empty_like(self, key: str, p: nn.Parameter) -> Tensor:
        """An empty tensor for an optimizer state: sharded like the parameter where it has its shape."""
        if self.shapes[key] == p.shape:
            return torch.zeros_like(p.data, dtype=self.dtypes[key])
        return torch.zeros(self.shapes[key], dtype=self.dtypes[key], device=p.device)


def open_shards(folder: Path) -> CheckpointShards:
    """The shards of a checkpoint folder."""
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(folder / SHARDS_DIR)).read_metadata().state_dict_metadata
    return CheckpointShards(
        folder / SHARDS_DIR,
        {key: one.size for key, one in metadata.items()},
        {key: one.properties.dtype for key, one in metadata.items()},
    )


def consolidate_checkpoint(folder: Path) -> bool:
    """Replace a sharded checkpoint by its plain form; False if it has it already. Runs on one process, which needs the
    memory of the model's weights, then of the optimizer's state."""
    if not (folder / SHARDS_DIR).is_dir():
        return False
    if wrong := find_fault(folder):
        raise DataError(f"the checkpoint {folder} is corrupt: {wrong}; choose another one")
    read, shards = load_checkpoint(folder), open_shards(folder)
    staged = Path(tempfile.mkdtemp(prefix=f".tmp-{read.step:08d}-", dir=folder.parent))
    entries = {}
    try:
        for name, file in TENSOR_FILES.items():
            files.write_tensors(staged / file, shards.read(name))
            entries[file] = file_entry(staged / file)
        files.write_state(staged, read, entries)
        exchange_names(staged, folder)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not files.is_disk_full(error):
            raise
        raise ResourceError(
            f"the disk is full: {folder} keeps its shards; make room and run the command again"
        ) from error
    files.fsync_path(folder.parent)
    shutil.rmtree(staged, ignore_errors=True)
    return True
