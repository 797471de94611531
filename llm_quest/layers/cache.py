"""What mixers keep between passes. Each mixer makes its own part, so a hybrid model needs no hybrid cache.

A token at position p lies in slot p + 1, so that padding (p = -1) lands in slot 0, the spare that nobody ever sees:

      position   -1   0   1   2   3             ring of 3 slots:  position  -1   0   1   2   3   4
      slot        0   1   2   3   4                               slot       0   1   2   3   1   2

A ring serves a mixer that looks back at most `window` tokens; it has `slack` more slots than the window, so that up to
`slack` tokens more can be taken back (speculative decoding). Where each token lies is worked out once per pass and
number of slots, not per layer. Eager code reads only the filled slots; a compiled step sees all of them (constant
shapes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quest.contracts import MixerCache
from llm_quest.scope import Plain, Scope, Sight


class Cache:
    """One model's memory of B rows: the layers' parts and, per number of slots, the positions that lie in them."""

    def __init__(self, layers: Sequence[MixerCache], batch: int, capacity: int):
        self.layers = list(layers)
        self.batch = batch
        self.capacity = capacity
        self.shelves: dict[int, Shelf] = {}

    def shelf(self, slots: int) -> Shelf:
        """Where tokens lie in a part with so many slots."""
        if slots not in self.shelves:
            self.shelves[slots] = Shelf(slots)
        return self.shelves[slots]

    def mark(self, at: Sequence[int]) -> None:
        """Row b will not be taken back below position at[b]."""
        for layer in self.layers:
            layer.mark(at)

    def rewind(self, to: Sequence[int]) -> list[int]:
        """Take every row b back to at most position to[b]; returns where *all* layers can stand: feed from there."""
        asked: list[int] = []
        while asked != (to := list(to)):  # a lower stand of one layer is put to all the others again
            asked = to
            for layer in self.layers:
                to = layer.stand(to)
        for layer in self.layers:
            layer.rewind(to)
        for shelf in self.shelves.values():
            shelf.rewind(to)
        return asked

    def parts(self) -> list[MixerCache | Shelf]:
        """All that is kept per row."""
        return [*self.layers, *self.shelves.values()]

    def repeat(self, n: int) -> None:
        """Every row n times, side by side: a group of samples after one prefill."""
        self.batch *= n
        for part in self.parts():
            part.repeat(n)

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay."""
        self.batch = rows.shape[0]
        for part in self.parts():
            part.keep(rows)

    def nbytes(self) -> int:
        """Bytes of keys, values and states held now."""
        return sum(layer.nbytes() for layer in self.layers)


@dataclass(frozen=True)
class Filing:
    """One pass's dealings with a shelf. row (B,1), slot (B,T): where each token goes; before, after (B, slots+1):
    positions lying in the slots before and after the pass; start: the common slot of a plain pass's first token, where
    it is known; fresh: nothing lay there before; whole: rows 0..n without gap or padding."""

    row: Tensor
    slot: Tensor
    before: Tensor
    after: Tensor
    start: int | None
    fresh: bool
    whole: bool
    reach: int | None


class Shelf:
    """The positions (B, slots+1) lying in the slots of all parts that have this many; -1 where a slot is free.

    whole: rows lie in slots 1..run without gap or padding. highest (B,): the latest position a ring has ever held, so
    what lies `slots` below it is overwritten for good, also after a rewind."""

    def __init__(self, slots: int):
        self.slots = slots
        self.positions: Tensor | None = None
        self.highest: Tensor | None = None
        self.whole = True
        self.run = 0

    def file(self, scope: Scope, ring: bool) -> Filing:
        """Find slots for this pass's tokens and note their positions."""
        positions, fresh = scope.positions, self.positions is None
        reach = known_reach(scope)
        if reach is not None and reach > self.slots and not ring:
            raise ValueError(
                f"this pass reaches position {reach - 1}, but the cache was made for {self.slots} positions: "
                "make it larger (new_cache(batch, capacity)) or let the window slide"
            )
        if self.positions is None:
            self.positions = positions.new_full((positions.shape[0], self.slots + 1), -1)
        start = reach - positions.shape[1] if scope.is_plain and reach is not None else None
        # asks the pass first: a compiled step, whose start is a tensor, is then the same graph after any earlier pass
        self.whole = start is not None and self.whole and start <= self.run
        if self.whole and reach is not None:
            self.run = max(self.run, reach)
        before = self.positions
        slot = ring_slots(positions, self.slots) if ring else positions + 1
        self.positions = before.scatter(1, slot, torch.where(slot == 0, -1, positions))
        if ring:
            latest = positions.amax(dim=1)
            self.highest = latest if self.highest is None else torch.maximum(self.highest, latest)
        row = torch.arange(slot.shape[0], device=slot.device)[:, None]
        return Filing(row, slot, before, self.positions, start, fresh, self.whole, reach)

    def rewind(self, to: Sequence[int]) -> None:
        if self.positions is not None:
            limit = torch.tensor(list(to), device=self.positions.device)[:, None]
            self.positions = torch.where(self.positions >= limit, -1, self.positions)
            self.whole = self.whole and len(set(to)) == 1
            self.run = min(self.run, *to)
            if self.highest is not None:
                self.highest = torch.where(limit[:, 0] == 0, -1, self.highest)

    def repeat(self, n: int) -> None:
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(n, dim=0)
        if self.highest is not None:
            self.highest = self.highest.repeat_interleave(n, dim=0)

    def keep(self, rows: Tensor) -> None:
        if self.positions is not None:
            self.positions = self.positions[rows.to(self.positions.device)]
        if self.highest is not None:
            self.highest = self.highest[rows.to(self.highest.device)]


class SlotCache:
    """Named tensors (B, slots+1, ...) filed by position: keys and values, or MLA's latent and rotary key.

    They take dtype and device from the first pass. `window`: how far back the mixer looks; None: everything."""

    def __init__(self, capacity: int, window: int | None = None, slack: int = 0):
        self.slots = capacity if window is None else min(capacity, window + slack)
        self.ring = self.slots < capacity
        self.window = window
        self.shelf: Shelf | None = None
        self.tensors: dict[str, Tensor] = {}

    def extend(self, scope: Scope, **new: Tensor) -> tuple[dict[str, Tensor], Sight]:
        """File new tensors (B,T,...) and return what this pass's queries may read, (B,S,...) each, with who sees whom.

        A pass longer than the ring's slack would overwrite what its first queries still need: it looks at the old slots
        and the new tokens together and files afterwards."""
        assert scope.cache is not None, "extend is called with a cache in the scope"
        self.shelf = shelf = scope.cache.shelf(self.slots)
        filing: Filing = scope.once(("filing", self.slots), lambda: shelf.file(scope, self.ring))
        length = scope.positions.shape[1]
        if filing.fresh:
            self.write(filing, new)
            return new, scope.visible(self.window)
        if self.ring and self.window is not None and length > self.slots - self.window + 1:
            joined = {
                name: torch.cat((self.tensors[name], tensor.to(self.tensors[name])), 1) for name, tensor in new.items()
            }
            keys = torch.cat((filing.before, scope.positions), dim=1)
            self.write(filing, new)
            return joined, scope.once(("joined", self.slots, self.window), lambda: scope.sees(keys, None, self.window))
        self.write(filing, new)
        return self.read(scope, filing)

    def write(self, filing: Filing, new: dict[str, Tensor]) -> None:
        """Copy each token's row to its slot: by a slice where the slots are one common run, else by index."""
        for name, tensor in new.items():
            length = tensor.shape[1]
            if name not in self.tensors:
                self.tensors[name] = room(tensor, self.slots + 1)
            kept = self.tensors[name]
            if filing.start is not None and filing.start + length <= self.slots:
                kept[:, filing.start + 1 : filing.start + 1 + length] = tensor
            else:
                kept.index_put_((filing.row, filing.slot), tensor.to(kept.dtype))

    def read(self, scope: Scope, filing: Filing) -> tuple[dict[str, Tensor], Sight]:
        """The filled slots and their mask; none is needed where one new token closes rows without gap or padding."""
        reach, length = filing.reach, scope.positions.shape[1]
        first, last = 0, self.slots + 1 if reach is None else min(reach, self.slots) + 1
        if filing.whole and reach is not None and length == 1 and reach <= min(self.slots, self.window or reach):
            return {name: kept[:, 1:last] for name, kept in self.tensors.items()}, Plain.ALL
        keys = filing.after[:, first:last]
        mask = scope.once(("slots", self.slots, self.window), lambda: scope.sees(keys, None, self.window))
        return {name: kept[:, first:last] for name, kept in self.tensors.items()}, mask

    def mark(self, at: Sequence[int]) -> None:
        """Slots need no snapshot."""

    def stand(self, to: Sequence[int]) -> list[int]:
        """Anywhere; but a ring has overwritten what a deep rewind would need, and refuses rather than answer
        wrongly."""
        if self.ring and self.shelf is not None and self.shelf.highest is not None and self.window is not None:
            for back, highest in zip(to, self.shelf.highest.tolist(), strict=True):
                if back > 0 and highest - self.slots >= max(back - self.window + 1, 0):
                    needed = highest - back + 1
                    raise ValueError(
                        f"a windowed cache with {self.slots - self.window} slots of slack has overwritten what "
                        f"position {back} looks back at: make it with slack={needed} "
                        "(new_cache(batch, capacity, slack))"
                    )
        return list(to)

    def rewind(self, to: Sequence[int]) -> None:
        """The shelf forgets the positions; what lies in their slots is never seen again."""

    def repeat(self, n: int) -> None:
        for name, kept in self.tensors.items():
            self.tensors[name] = by_head(by_head(kept).repeat_interleave(n, dim=0))

    def keep(self, rows: Tensor) -> None:
        for name, kept in self.tensors.items():
            self.tensors[name] = by_head(by_head(kept).index_select(0, rows.to(kept.device)))

    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self.tensors.values())


def room(like: Tensor, slots: int) -> Tensor:
    """Zeros (B,slots,...) for tensors like this (B,T,...). Keys and values (B,T,G,d) lie in memory head by head: a step
    of decoding then reads each head's slots in one run (twice as fast at batch 32 in bfloat16)."""
    batch, _, *rest = like.shape
    shape = (batch, rest[0], slots, rest[1]) if len(rest) == 2 else (batch, slots, *rest)
    return by_head(like.new_zeros(shape))


def by_head(x: Tensor) -> Tensor:
    """(B,S,G,d) seen as (B,G,S,d), and the other way round; what has no heads as it is."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def known_reach(scope: Scope) -> int | None:
    """One more than the largest position, as a host number; eager code asks the tensor if the caller did not say."""
    if scope.reach is not None or torch.compiler.is_compiling():
        return scope.reach
    return int(scope.positions.max()) + 1


def ring_slots(positions: Tensor, slots: int) -> Tensor:
    """Slot (B,T) of each token in a ring. Tokens that later ones of the same pass would overwrite go to the spare
    slot."""
    stays = (positions >= 0) & (positions > positions.amax(dim=1, keepdim=True) - slots)
    return torch.where(stays, positions % slots + 1, 0)
