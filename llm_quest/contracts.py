"""Every promise in the house, as a Protocol with its laws in the docstring. Nothing here is ever instantiated but the
three small carriers `Loss`, `Card` and `Share`.

Twelve words: *page* (a family's file), *layer* (knows no family), *mixer* (a layer that moves information between
positions), *scope* (what this pass may see), *cache* (what mixers keep between passes), *technique* (an edit of a
finished model), *objective* (a batch in, a loss out), *feed* (micro-batches with a bookmark), *rollouts* (a feed the
policy writes itself), *reward* (a group of samples in, numbers out), *recipe* (everything for one kind of run), *paper*
(a claim, the experiment, the verdict). Shape letters are listed in `llm_quest/layers/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llm_quest.scope import Scope


class Loss(NamedTuple):
    """What an objective returns: a *sum* and how many things were summed, so that the mean is `total / count`.

    total: scalar tensor with gradient. count: scalar tensor (float32), without gradient; never zero-divided by the
    objective itself. metrics: name -> (sum, count) pairs of scalar tensors, reported as their ratio over the whole
    step.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]
    metrics: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelSpec:
    """What a model is made of, enough to build it again: the page's name, the numbers, the techniques applied in
    order."""

    family: str
    config: Any
    techniques: tuple[Technique, ...] = ()


@dataclass(frozen=True)
class DataShard:
    """Which part of the work is mine: this process is number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class LayerCache(Protocol):
    """What one mixer keeps between passes, for B rows.

    Laws: (1) after any sequence of passes a mixer reads from it what it would have seen in one pass; (2) a token
    without a position leaves it unchanged; (3) `rewind(positions)` after `latest_rewind(positions) == positions` equals
    never having seen the tokens from `positions` on; (4) `batch_repeat_interleave`, `keep` act on rows alone.
    """

    def snapshot(self, positions: Sequence[int]) -> None:
        """Row b will not be taken back below position at[b]. Call it while every row stands at at[b]: a recurrent state
        takes its snapshot there. (Made with slack, it also keeps the state after each of the last tokens.)"""

    def latest_rewind(self, positions: Sequence[int]) -> list[int]:
        """For each row the latest position <= to[b] to which this cache can go back; ValueError where it cannot at
        all."""

    def rewind(self, positions: Sequence[int]) -> None:
        """Forget every position >= to[b] of row b. `positions` must be what `latest_rewind` returned."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row n times, in place: rows 0,1 become 0,0,1,1 (a group after one prefill)."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows stay (finished rows leave the batch)."""

    def nbytes(self) -> int:
        """Bytes held now."""


@runtime_checkable
class Mixer(Protocol):
    """A layer that moves information between positions: `mixer(x (B,T,D), scope) -> (B,T,D)`.

    Laws: a token whose position is -1 is a no-op (ignored as a key, neither decays nor writes a state); nothing outside
    `scope.attention_mask` is read.
    """

    def __call__(self, x: Tensor, scope: Scope) -> Tensor: ...

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> LayerCache:
        """An empty cache for `batch` rows and positions below `capacity`, able to take back up to `max_rewind`
        positions."""

    def rescale_logits_(self, gamma: Tensor, key_share: str = "query") -> None:
        """Multiply this mixer's attention logits by gamma (H,), per head, however the weights are arranged; a gamma of
        1 leaves its head bit by bit. key_share: a name in `layers.attention.KEY_SHARE_RULES`, for heads that share a
        key. A mixer where rescaling has no effect raises ValueError and says why."""


@runtime_checkable
class Decoder(Protocol):
    """`model(tokens (B,T), scope=None) -> logits (B,T,V)` = `head(hidden(tokens, scope))`. No scope: plain causal from
    0.

    Laws, one parametrised test over all pages (tests/laws): (1) a later token never changes earlier logits; (2) with or
    without a cache, in one pass or many, the same logits; (3) padding anywhere changes nothing; (4) every parameter
    receives a gradient; (5) export then import is the identity; (6) packed documents equal the documents alone;
    (7) `torch.compile(fullgraph=True)` gives the same logits, and 64 decode steps recompile nothing; (8) a fresh
    model's loss is near ln V.
    """

    spec: ModelSpec

    @property
    def config(self) -> Any: ...

    def __call__(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T V"]: ...

    def hidden_states(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        """What the head reads: the last block's output after the final norm."""

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> Any:
        """An empty `layers.cache.Cache` for `batch` rows and positions below `capacity`."""


class Technique(Protocol):
    """A frozen dataclass; `technique(model) -> model` edits a finished model and returns it.

    Laws (every technique on every page): a technique that is `is_identity_at_init` moves no logit; all survive a save
    and a load (the card replays them); all leave the decoder's laws standing, or refuse with a ValueError that says
    why.

    exportable: the page's config and published tensors alone are the edited model (YaRN changes the config's rotary,
    and any reader computes it): such a one is noted when a folder is read, not called again. One that is not (LoRA,
    DyT) makes the saved folder ours alone: config.json then says so, and transformers refuses it.
    """

    is_identity_at_init: ClassVar[bool]
    exportable: ClassVar[bool]

    def __call__(self, model: Any) -> Any: ...


class Batch(Protocol):
    """What a feed yields and an objective reads. `num_tokens` counts real tokens, for throughput."""

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: Any) -> Batch: ...


class Objective(Protocol):
    """An nn.Module that holds the model as `.model`: `objective(batch) -> Loss`.

    Law: splitting a batch in two adds both totals and both counts. So gradient accumulation and data parallelism are
    exact by construction.
    """

    model: Any

    def __call__(self, batch: Any) -> Loss: ...


class Loader(Protocol):
    """An endless stream of micro-batches with a bookmark.

    Law: the rows of a step are a pure function of (seed, step): the same for any number of ranks and any split into
    micro-batches. A feed with state of its own (rollouts) keeps it in the bookmark.
    """

    def batches(self, step: int) -> Sequence[Batch]:
        """This rank's micro-batches of optimiser step `step` (counted from 0)."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; saved in every checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a bookmark; raises ValueError if it belongs to other data."""


@runtime_checkable
class Callback(Protocol):
    """Runs after every optimiser step (QK-Clip, expert-bias balancing). May edit the model; deterministic. Numbers that
    it returns (floats, or scalar tensors, read only when a row is due) go to the metrics log.

    Law: what the passes of a refused step left behind has no part in any later step. (No checkpoint holds it, so a
    resumed run would be another.)"""

    def on_step_end(self, model: Any, step: int) -> Mapping[str, Any] | None: ...

    def on_step_skipped(self, model: Any) -> None:
        """The step changed nothing (a loss that is not finite, no target): forget what its passes left."""


class Evaluator(Protocol):
    """Numbers or texts now and then (evaluation, samples): must leave the model and every random state as they were."""

    @property
    def name(self) -> str: ...

    @property
    def interval(self) -> int: ...

    def evaluate(self, model: Any, step: int) -> Mapping[str, float]: ...


class MetricsCallback(Protocol):
    """Reads every row of metrics that is written and gives advice in words. GuardStop ends a run that cannot come to
    anything. Every process watches the same sums, so all of them stop together."""

    def on_log(self, row: Mapping[str, Any]) -> Sequence[str]: ...


class Reward(Protocol):
    """`reward(group of samples of one prompt) -> one number each`; NaN means unscorable and stays out of the
    statistics."""

    def __call__(self, group: Sequence[Any]) -> Sequence[float]: ...


@dataclass(frozen=True)
class Preset:
    """A published size. hub_id: the repository that these numbers are of. Not each can be read as it lies there: files
    in fp8 are refused, and so are multimodal models of which the page is the language model (`notes` says which).
    `num_parameters` counts tied weights once."""

    name: str
    config: Any
    num_parameters: int | None = None
    hub_id: str | None = None
    notes: str = ""
    eos_token_ids: tuple[int, ...] = field(default=())


def format_list(items: Iterable[Any]) -> str:
    """'a, b and c', for error messages."""
    listed = [str(thing) for thing in items]
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1] if listed else "none"
