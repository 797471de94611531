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
class Card:
    """What a model is made of, enough to build it again: the page's name, the numbers, the techniques applied in
    order."""

    page: str
    config: Any
    techniques: tuple[Technique, ...] = ()


@dataclass(frozen=True)
class Share:
    """Which part of the work is mine: this process is number `rank` of `world`."""

    rank: int = 0
    world: int = 1


class MixerCache(Protocol):
    """What one mixer keeps between passes, for B rows.

    Laws: (1) after any sequence of passes a mixer reads from it what it would have seen in one pass; (2) a token
    without a position leaves it unchanged; (3) `rewind(to)` after `stand(to) == to` equals never having seen the tokens
    from `to` on; (4) `repeat`, `keep` act on rows alone.
    """

    def mark(self, at: Sequence[int]) -> None:
        """Row b will not be taken back below position at[b]. Call it while every row stands at at[b]: a recurrent state
        takes its snapshot there. (Made with slack, it also keeps the state after each of the last tokens.)"""

    def stand(self, to: Sequence[int]) -> list[int]:
        """For each row the latest position <= to[b] to which this cache can go back; ValueError where it cannot at
        all."""

    def rewind(self, to: Sequence[int]) -> None:
        """Forget every position >= to[b] of row b. `to` must be what `stand` returned."""

    def repeat(self, n: int) -> None:
        """Every row n times, in place: rows 0,1 become 0,0,1,1 (a group after one prefill)."""

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay (finished rows leave the batch)."""

    def nbytes(self) -> int:
        """Bytes held now."""


@runtime_checkable
class Mixer(Protocol):
    """A layer that moves information between positions: `mixer(x (B,T,D), scope) -> (B,T,D)`.

    Laws: a token whose position is -1 is a no-op (ignored as a key, neither decays nor writes a state); nothing outside
    `scope.visible` is read.
    """

    def __call__(self, x: Tensor, scope: Scope) -> Tensor: ...

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> MixerCache:
        """An empty cache for `batch` rows and positions below `capacity`, able to take back up to `slack` positions."""

    def rescale_logits_(self, gamma: Tensor, shared: str = "query") -> None:
        """Multiply this mixer's attention logits by gamma (H,), per head, however the weights are arranged; a gamma of
        1 leaves its head bit by bit. shared: a name in `layers.attention.SHARING`, for heads that share a key. A mixer
        where rescaling has no effect raises ValueError and says why."""


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

    card: Card

    @property
    def config(self) -> Any: ...

    def __call__(self, tokens: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T V"]: ...

    def hidden(self, tokens: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        """What the head reads: the last block's output after the final norm."""

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> Any:
        """An empty `layers.cache.Cache` for `batch` rows and positions below `capacity`."""


class Technique(Protocol):
    """A frozen dataclass; `technique(model) -> model` edits a finished model and returns it.

    Laws (every technique on every page): a technique that is `neutral_at_birth` moves no logit; all survive a save and
    a load (the card replays them); all leave the decoder's laws standing, or refuse with a ValueError that says why.

    published: the page's config and published tensors alone are the edited model (YaRN changes the config's rotary, and
    any reader computes it): such a one is noted when a folder is read, not called again. One that is not (LoRA, DyT)
    makes the saved folder ours alone: config.json then says so, and transformers refuses it.
    """

    neutral_at_birth: ClassVar[bool]
    published: ClassVar[bool]

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


class Feed(Protocol):
    """An endless stream of micro-batches with a bookmark.

    Law: the rows of a step are a pure function of (seed, step): the same for any number of ranks and any split into
    micro-batches. A feed with state of its own (rollouts) keeps it in the bookmark.
    """

    def at(self, step: int) -> Sequence[Batch]:
        """This rank's micro-batches of optimiser step `step` (counted from 0)."""

    def bookmark(self) -> dict[str, Any]:
        """JSON-able; saved in every checkpoint."""

    def resume(self, bookmark: dict[str, Any]) -> None:
        """Go on from a bookmark; raises ValueError if it belongs to other data."""


@runtime_checkable
class Callback(Protocol):
    """Runs after every optimiser step (QK-Clip, expert-bias balancing). May edit the model; deterministic. Numbers that
    it returns (floats, or scalar tensors, read only when a row is due) go to the metrics log.

    Law: what the passes of a refused step left behind has no part in any later step. (No checkpoint holds it, so a
    resumed run would be another.)"""

    def after_step(self, model: Any, step: int) -> Mapping[str, Any] | None: ...

    def after_refusal(self, model: Any) -> None:
        """The step changed nothing (a loss that is not finite, no target): forget what its passes left."""


class Probe(Protocol):
    """Numbers or texts now and then (evaluation, samples): must leave the model and every random state as they were."""

    @property
    def name(self) -> str: ...

    @property
    def every(self) -> int: ...

    def measure(self, model: Any, step: int) -> Mapping[str, float]: ...


class Watcher(Protocol):
    """Reads every row of metrics that is written and gives advice in words. GuardStop ends a run that cannot come to
    anything. Every process watches the same sums, so all of them stop together."""

    def watch(self, row: Mapping[str, Any]) -> Sequence[str]: ...


class Reward(Protocol):
    """`reward(group of samples of one prompt) -> one number each`; NaN means unscorable and stays out of the
    statistics."""

    def __call__(self, group: Sequence[Any]) -> Sequence[float]: ...


@dataclass(frozen=True)
class Preset:
    """A published size. hub: the repository that these numbers are of. Not each can be read as it lies there: files in
    fp8 are refused, and so are multimodal models of which the page is the language model (`notes` says which).
    `parameters` counts tied weights once."""

    name: str
    config: Any
    parameters: int | None = None
    hub: str | None = None
    notes: str = ""
    eos: tuple[int, ...] = field(default=())


def names(things: Iterable[Any]) -> str:
    """'a, b and c', for error messages."""
    listed = [str(thing) for thing in things]
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1] if listed else "none"
