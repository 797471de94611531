"""The reference model of a policy: the initial model (its log-probabilities computed once and saved in the run folder,
or the model itself), or a copy that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_quest.contracts import LogFn
from llm_quest.data.loader import ShardedLoader, length_grouped_indices
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.errors import DataError
from llm_quest.files import atomic_file, file_sha256
from llm_quest.layers.initialize import copy_module
from llm_quest.objectives.preference import sequence_log_probs
from llm_quest.progress import track
from llm_quest.techniques.adapter_merge import disable_adapter
from llm_quest.techniques.lora import is_adapter
from llm_quest.tensor_files import write_tensors
from llm_quest.train.checkpoint import checkpoint_step, list_checkpoints
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import evaluation_mode
from llm_quest.train.step import autocast

REFERENCE_FILE = "reference.safetensors"
REFERENCE_BATCH_SIZE = 8

ReferenceContext = Callable[[], AbstractContextManager[Any]]


def has_adapter(model: Any) -> bool:
    """Whether the model has an adapter that was not merged."""
    return any(map(is_adapter, model.spec.techniques))


def make_initial_reference(model: Any, *, adapted_before: bool) -> ReferenceContext:
    """Make a context that gives the initial model, after the run's techniques were applied: the same memory with the
    adapters off if this run added them, else a frozen copy. adapted_before: `has_adapter` before they were applied.

    Commonly got wrong: a run that starts from a model with adapters (SFT with LoRA, then DPO or GRPO) has them from the
    start; with those off it is the model before SFT, and the loss of step 1 is not ln 2."""
    if has_adapter(model) and not adapted_before:
        return lambda: reference_without_adapters(model)
    frozen = copy_module(model).eval().requires_grad_(False)
    return lambda: nullcontext(frozen)


@contextmanager
def reference_without_adapters(model: Any) -> Iterator[Any]:
    with disable_adapter(model):
        yield model


@dataclass(frozen=True)
class CachedLogProbs:
    """Log-probabilities of a reference model, computed once and kept on disk. log_probs: of each pair, a number for
    each answer, NaN where it is not needed. key: what they were computed from. is_new: not all on disk yet."""

    log_probs: list[np.ndarray]
    key: str
    is_new: bool

    def save(self, folder: Path) -> None:
        """Save them in the run folder, unless they are there."""
        if self.is_new:
            save_tensors(
                folder / REFERENCE_FILE,
                {"log_probs": torch.from_numpy(np.concatenate(self.log_probs))},
                {"key": self.key},
            )


def reference_log_probs(
    model: nn.Module, pairs: Sequence[TokenizedPreference], folder: Path, parallel: DistributedContext, precision: str,
    log: LogFn, *, needed: Sequence[int] | None = None, share_prompts: bool = False,
) -> CachedLogProbs:  # fmt: skip
    """The log-probability of each answer by the model as it is now: from the run folder if they were computed for this
    model, these pairs and this precision; else computed, with each shared prompt read once. needed: the numbers of the
    pairs that the run reads; None: of all. Call it before the model is sharded."""
    key_parts = {"model": weights_hash(model), "pairs": PreferenceDataset(pairs).hash, "precision": precision}
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()
    flat = parallel.broadcast(load_log_probs(folder / REFERENCE_FILE, key) if parallel.is_main_process else None)
    sizes = [len(pair.answers) for pair in pairs]
    log_probs = np.split(np.full(sum(sizes), np.nan, np.float32) if flat is None else flat, np.cumsum(sizes)[:-1])
    numbers = range(len(pairs)) if needed is None else needed
    missing = [number for number in numbers if np.isnan(log_probs[number]).any()]
    if missing:
        log(f"reference: log-probabilities of {sum(sizes[number] for number in missing):,} answers, once")
        source = PreferenceDataset([pairs[number] for number in missing], share_prompts=share_prompts)
        with evaluation_mode(model), autocast(precision, parallel.device):
            computed = compute_log_probs(model.to(parallel.device), source, parallel.device)
        for number, values in zip(missing, computed, strict=True):
            log_probs[number] = values
    return CachedLogProbs(log_probs, key, bool(missing))


def compute_log_probs(model: nn.Module, source: PreferenceDataset, device: torch.device) -> list[np.ndarray]:
    """Compute the log-probability of each answer, in float32, in batches of like length."""
    pairs = source.preferences
    log_probs: list[np.ndarray] = [np.empty(0)] * len(pairs)
    for numbers in track(length_grouped_indices(source, REFERENCE_BATCH_SIZE), "scoring answers, batch"):
        flat = sequence_log_probs(model, source.collate(numbers).to(device)).float().cpu().numpy()
        parts = np.split(flat, np.cumsum([len(pairs[n].answers) for n in numbers])[:-1])
        for n, part in zip(numbers, parts, strict=True):
            log_probs[n] = part
    return log_probs


def load_log_probs(file: Path, key: str) -> np.ndarray | None:
    """The log-probabilities of a file; None if it is missing, damaged or of another key."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as stored:
            log_probs = stored.get_tensor("log_probs") if (stored.metadata() or {}).get("key") == key else None
    except (SafetensorError, OSError):  # damaged: they are computed again
        return None
    return log_probs  # type: ignore[no-any-return]


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with atomic_file(file) as stage:
        write_tensors(stage, tensors, metadata)


def weights_hash(model: nn.Module) -> str:
    """sha256 of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


class SyncedReference:
    """A reference model that follows the policy: every `sync_steps` steps it becomes mixup_alpha x policy + (1 -
    mixup_alpha) x reference. It is the loader too, so that the loader's state in a checkpoint names the reference's
    file.

    save_total_limit: the newest save_total_limit + 1 files stay, and every file that a checkpoint needs (one kept by
    `keep_every` or as the best may be older)."""

    def __init__(
        self,
        loader: ShardedLoader[PreferenceDataset],
        model: nn.Module,
        folder: Path,
        *,
        sync_steps: int,
        mixup_alpha: float,
        save_total_limit: int,
        is_main_process: bool,
    ):
        self.loader, self.folder = loader, folder / "reference"
        self.sync_steps, self.mixup_alpha = sync_steps, mixup_alpha
        self.max_files, self.is_main_process, self.synced = save_total_limit + 1, is_main_process, 0
        self.model = copy_module(model).eval().requires_grad_(False)

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        """The reference's log-probability of each row."""
        return sequence_log_probs(self.model, batch)

    @torch.no_grad()
    def on_step_end(self, model: nn.Module, step: int) -> None:
        if step % self.sync_steps == 0:
            self.synced = step
            for reference, policy in zip(self.model.parameters(), model.parameters(), strict=True):
                reference.lerp_(policy.to(reference), self.mixup_alpha)

    def on_step_skipped(self, model: nn.Module) -> None:
        """A skipped step leaves nothing to undo."""

    def batches(self, step: int) -> list[PreferenceBatch]:
        return self.loader.batches(step)

    def state_dict(self) -> dict[str, Any]:
        """The loader's state and the step of the reference, which is written to its file."""
        if self.is_main_process and self.synced and not self.file_at(self.synced).exists():
            self.folder.mkdir(exist_ok=True)
            save_tensors(self.file_at(self.synced), dict(self.model.named_parameters()), {"step": str(self.synced)})
            self.prune_files()
        sha256 = file_sha256(self.file_at(self.synced)) if self.synced and self.is_main_process else ""
        return self.loader.state_dict() | {"reference": self.synced, "reference_sha256": sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self.synced = int(state.get("reference", 0))
        if self.synced:
            file = self.file_at(self.synced)
            if not file.is_file():
                raise DataError(f"{file} is not there, without which this run cannot go on; start a new one")
            if state.get("reference_sha256") not in (None, "", file_sha256(file)):
                raise DataError(f"{file} is damaged: it is not what its checkpoint was saved with; start a new run")
            with torch.no_grad():
                saved = load_file(file)
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(saved[name])

    def prune_files(self) -> None:
        """Remove the files that no checkpoint needs: a checkpoint needs the newest file of its step or before it."""
        files = sorted(self.folder.glob("step-*.safetensors"))
        steps = map(checkpoint_step, list_checkpoints(self.folder.parent / "checkpoints"))
        needed = {max((file for file in files if file <= self.file_at(step)), default=None) for step in steps}
        for old in files[: -self.max_files]:
            if old not in needed:
                old.unlink()

    def file_at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
