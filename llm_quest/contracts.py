"""The package's contracts: Protocols whose docstrings state their laws, and the small carriers `Loss`, `ModelSpec`,
`ParameterScale`, `DataShard` and `Preset`.

Words: *family* (a file of models/), *layer* (knows no family), *mixer* (a layer that moves information between
positions), *scope* (what a pass may see), *cache* (what mixers keep between passes), *technique* (an edit of a finished
model), *objective* (a batch in, a loss out), *loader* (micro-batches with a state_dict), *rollouts* (a loader whose
rows the policy samples), *reward* (a group of samples in, numbers out), *recipe* (one kind of run), *paper* (a claim,
its experiment, its verdict). Shape letters are listed in `llm_quest/layers/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llm_quest.scope import Scope


LogFn = Callable[[str], None]
"""Shows one line to the person who runs a command."""


class Loss(NamedTuple):
    """The value of an objective: a *sum* and a count, so that the mean is `total / count`.

    total: scalar tensor with gradient. count: scalar tensor (float32) without gradient; the objective never divides by
    it. metrics: name -> (sum, count) pairs of scalar tensors, reported as their ratio over the whole step."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]
    metrics: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelSpec:
    """What a model is built from: the family's name, its config, and the techniques applied, in order."""

    family: str
    config: Any
    techniques: tuple[Technique, ...] = ()


@dataclass(frozen=True)
class ParameterScale:
    """What a parametrization makes of one parameter (`models/parametrization.py`). init: of its first values (of 1 + w
    for a norm centered at 0). lr, weight_decay, eps: of AdamW's. muon: of Muon's update, for each of the matrices
    stacked in it."""

    role: str
    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    muon: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class DataShard:
    """The part of the work of this process: number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class ProcessGroup(Protocol):
    """The processes that share the work: which part is this one's, and everybody's values in the order of ranks."""

    @property
    def data_shard(self) -> DataShard: ...
    def all_gather(self, thing: Any) -> list[Any]: ...


class SingleProcess:
    """A process group of one."""

    data_shard = DataShard()

    def all_gather(self, thing: Any) -> list[Any]:
        return [thing]


class LayerCache(Protocol):
    """What one mixer keeps between passes, for B rows.

    Laws: (1) after any sequence of passes a mixer reads from it what it would have seen in one pass; (2) a token
    without a position leaves it unchanged; (3) `rewind(positions)`, where `latest_rewind(positions) == positions`,
    equals never having seen the tokens from `positions` on; (4) `batch_repeat_interleave`, `batch_select_indices`
    and `batch_concat` act on rows alone."""

    def snapshot(self, positions: Sequence[int]) -> None:
        """Row b will not be rewound below positions[b]. Called while every row stands at positions[b]: a recurrent
        state is copied there. (With max_rewind, the states after each of the last tokens are kept as well.)"""

    def latest_rewind(self, positions: Sequence[int]) -> list[int]:
        """For each row the latest position <= positions[b] to which this cache can be rewound; ValueError if there is
        none."""

    def rewind(self, positions: Sequence[int]) -> None:
        """Forget every position >= positions[b] of row b. `positions` must be what `latest_rewind` returned."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in place: rows 0,1 become 0,0,1,1 (a group after one prefill)."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone (finished rows leave the batch)."""

    def batch_concat(self, others: Sequence[Any], order: Sequence[int]) -> None:
        """Append the rows of the same mixer's other caches, which are emptied; row b is then row order[b] of all (rows
        of like length are read together)."""

    def nbytes(self) -> int:
        """Bytes in use."""


@runtime_checkable
class Mixer(Protocol):
    """A layer that moves information between positions: `mixer(x (B,T,D), scope) -> (B,T,D)`.

    Laws: a token whose position is -1 is a no-op (ignored as a key; neither decays nor writes a state); nothing outside
    `scope.attention_mask` is read."""

    def __call__(self, x: Tensor, scope: Scope) -> Tensor: ...

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> LayerCache:
        """An empty cache for `batch_size` rows and positions below `capacity`; it can rewind `max_rewind` positions."""

    def rescale_logits_(self, gamma: Tensor, key_share: str = "query") -> None:
        """Multiply this mixer's attention logits by gamma (H,), per head, however its weights are laid out; a gamma of
        1 leaves its head bit by bit. key_share: a name in `layers.attention.KEY_SHARE_RULES`, for heads that share a
        key. Raises ValueError, with the reason, where rescaling has no effect."""


@runtime_checkable
class Decoder(Protocol):
    """`model(input_ids (B,T), scope=None, inputs_embeds=None) -> logits (B,T,V)` = `head(hidden_states(...))`. Without
    a scope: causal, from position 0.

    Laws, one parametrized test over all families (tests/laws): (1) a later token never changes earlier logits; (2) with
    or without a cache, in one pass or many, the logits are the same; (3) padding anywhere changes nothing; (4) every
    parameter receives a gradient; (5) export then import is the identity; (6) packed documents equal the documents
    alone; (7) `torch.compile(fullgraph=True)` gives the same logits, and 64 decode steps recompile nothing; (8) a new
    model's loss is near ln V."""

    spec: ModelSpec

    @property
    def config(self) -> Any: ...

    def __call__(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T V"]: ...

    def hidden_states(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        """What the head reads: the last block's output after the final norm."""

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> Any:
        """An empty `layers.kv_cache.Cache` for `batch_size` rows and positions below `capacity`."""


class Technique(Protocol):
    """An edit of a finished model, as a frozen dataclass: `technique(model) -> model`.

    Laws (every technique on every family): one that is `is_identity_at_init` changes no logit; all survive a save and a
    load (`replay_techniques`); all keep the decoder's laws, or refuse with a ValueError that says why.

    exportable: the family's config and published tensors alone are the edited model (YaRN changes the config's rotary,
    and any reader computes it); when a folder is read, such a technique is recorded and not applied again. A folder
    with one that is not (LoRA, DyT) loads here alone: its config.json says so, and transformers refuses it."""

    is_identity_at_init: ClassVar[bool]
    exportable: ClassVar[bool]

    def __call__(self, model: Any) -> Any: ...


class Batch(Protocol):
    """What a loader yields and an objective reads. `num_tokens` counts real tokens, for throughput."""

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: Any) -> Batch: ...


class Objective(Protocol):
    """An nn.Module that holds the model as `.model`: `objective(batch) -> Loss`.

    Law: splitting a batch in two adds both totals and both counts. Gradient accumulation and data parallelism are
    therefore exact."""

    model: Any

    def __call__(self, batch: Any) -> Loss: ...


class Loader(Protocol):
    """An endless stream of micro-batches.

    Law: the rows of a step are a pure function of (seed, step): the same for any number of ranks and any split into
    micro-batches. A loader with state of its own (rollouts) saves it in its state_dict."""

    def batches(self, step: int) -> Sequence[Batch]:
        """This rank's micro-batches of optimizer step `step` (counted from 0)."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; saved in every checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; ValueError if it belongs to other data."""


@runtime_checkable
class RewindableLoader(Protocol):
    """A loader with state that `batches` changes."""

    def rewind(self) -> None:
        """Undo the last call of `batches`: its step was given up, and will be asked for again after a resumption."""


@runtime_checkable
class Callback(Protocol):
    """Runs after every optimizer step (QK-Clip, expert-bias balancing). It may edit the model and is deterministic. The
    numbers that it returns (floats, or scalar tensors, read only when a row is logged) go to the metrics.

    Law: what the passes of a skipped step measured has no part in any later step. (No checkpoint holds it, so a resumed
    run would differ.)"""

    def on_step_end(self, model: Any, step: int) -> Mapping[str, Any] | None: ...

    def on_step_skipped(self, model: Any) -> None:
        """The step changed nothing (a loss that is not finite, no target): discard what its passes measured."""


class Evaluator(Protocol):
    """Numbers or texts at intervals (evaluation, samples). It leaves the model and every random state as they were."""

    @property
    def name(self) -> str: ...

    @property
    def interval(self) -> int: ...

    def evaluate(self, model: Any, step: int) -> Mapping[str, float]: ...


class ObservableRouter(Protocol):
    """A router of a mixture of experts that calls `observe_routing` with what each pass chose, which has
    `tokens_per_expert()`. weight (E,D): a row for each expert."""

    weight: Any
    observe_routing: Callable[[Any], None] | None


class MetricsCallback(Protocol):
    """Reads every row of metrics that is logged and returns advice in words. It raises GuardStop to end a run that
    cannot recover. Every process reads the same sums, so that all stop together. collapse_since: of a run that has
    gone wrong, the step of the last row that was well; None for one that is well, or never was."""

    @property
    def collapse_since(self) -> int | None: ...

    def on_log(self, row: Mapping[str, Any]) -> Sequence[str]: ...


class Reward(Protocol):
    """`reward(group of samples of one prompt) -> one number each`; NaN means that a sample cannot be scored, and is
    left out of the statistics."""

    def __call__(self, group: Sequence[Any]) -> Sequence[float]: ...


@dataclass(frozen=True)
class Preset:
    """A published size. hub_id: the repository with these numbers. Not every repository can be read: files in fp8 are
    refused, and so are multimodal models whose language model this family is (`notes` says which). `num_parameters`
    counts tied weights once."""

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
