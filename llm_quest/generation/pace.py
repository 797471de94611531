"""How far to look ahead: drafting goes on while it buys more tokens than the same time would buy elsewhere.

A cycle drafts some tokens and checks them in one pass of the target. With A the chance that everything drafted so far
is accepted and a the mean acceptance, `stride` more drafts bring A (a + a^2 + ...) tokens for the time of as many draft
steps and of a wider pass. That pays while

      A (a + a^2 + ...)  >  tokens per second now  *  (the draft steps + what the pass costs more)

which is the rule of renewal-reward problems: the best policy is the one whose own rate is its threshold. A is measured:
how often drafts of this confidence were accepted so far. The times are medians of the last passes (the lower of two, so
that a first pass that had to be compiled is soon forgotten)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

BINS = 10
FIRST = (3, 0, 2, 0)
"""The first cycles look so far ahead, so that passes of several widths have been timed."""
FIRST_COMPILED = (4, 4, 0, 0)
REST, LONGEST_REST = 8, 512
RECENT, HOPELESS = 8, 3
"""The rate is that of the last cycles that drafted. That it does not pay, all of them together can say; or as few as
three in which nothing was accepted."""


@dataclass
class Tally:
    """What speculation did: passes of the target, drafts that were tested, drafts accepted, tokens written, and passes
    without any draft."""

    passes: int = 0
    tested: int = 0
    accepted: int = 0
    tokens: int = 0
    plain: int = 0

    @property
    def acceptance(self) -> float:
        """Of the drafts that were tested."""
        return self.accepted / self.tested if self.tested else 0.0


class Pace:
    """most: the longest lookahead. timed: may the clock decide? It may where the text cannot depend on the lookahead
    (greedy); then a draft that does not pay rests, longer each time. Otherwise only how far to look is decided here.
    stride: so many tokens are drafted before the host is asked. padded: how many columns a compiled pass has."""

    def __init__(self, most: int, *, timed: bool, stride: int = 1, padded: Callable[[int], int] | None = None):
        self.most = most
        self.timed = timed
        self.stride = stride
        self.padded = padded
        first = FIRST if padded is None else FIRST_COMPILED
        self.first = first if timed else (stride,) * len(first)
        self.tried = [2.0] * BINS
        self.held = [2.0 * (number + 0.5) / BINS for number in range(BINS)]
        self.passes: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=7))
        self.steps: deque[float] = deque(maxlen=15)
        self.recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT)
        self.cycles = 0
        self.rows = 0
        self.resting, self.rest = 0, REST

    def chance(self, confidence: float) -> float:
        """How often a draft of this confidence is accepted."""
        number = bin_of(confidence)
        return self.held[number] / self.tried[number]

    def learn(self, confidence: float, accepted: bool) -> None:
        number = bin_of(confidence)
        self.tried[number] += 1
        self.held[number] += accepted

    @property
    def mean(self) -> float:
        """The mean acceptance."""
        return sum(self.held) / sum(self.tried)

    def begin(self, rows: int) -> int:
        """How many tokens this cycle may draft; 0: none, a plain pass."""
        if rows != self.rows:
            self.rows = rows
            self.passes.clear()
            self.recent.clear()
        self.cycles += 1
        if self.cycles <= len(self.first):
            return min(self.first[self.cycles - 1], self.most)
        if not self.timed:
            return self.most
        if self.resting > 0:
            self.resting -= 1
            return 0
        if self.hopeless() or (len(self.recent) == RECENT and not self.pays()):
            self.resting = self.rest
            self.rest = min(2 * self.rest, LONGEST_REST)
            while len(self.recent) >= HOPELESS:  # after the rest one more cycle decides anew
                self.recent.popleft()
            return 0
        return self.most

    def goes_on(self, chances: Sequence[float], columns: int) -> bool:
        """Draft on? chances: per row that still drafts, that all its drafts so far are accepted. columns: how wide a
        pass they need."""
        if self.cycles <= len(self.first):
            return True
        gain = sum(chances) * sum(self.mean**more for more in range(1, self.stride + 1))
        wider = self.cost(columns + self.stride) - self.cost(columns)
        return gain > self.rate() * (self.stride * self.step() + max(wider, 0.0))

    def note(self, columns: int, drafted: int, tokens: int, verifying: float, drafting: float) -> None:
        """What a cycle took and brought."""
        self.passes[self.padded(columns) if self.padded else columns].append(verifying)
        if drafted:
            self.steps.append(drafting / drafted)
            self.recent.append((columns, drafted, tokens))

    def hopeless(self) -> bool:
        """Was not one draft of the last cycles accepted?"""
        return len(self.recent) >= HOPELESS and all(tokens <= self.rows for *_, tokens in self.recent)

    def pays(self) -> bool:
        """Are the last drafting cycles faster than plain ones?"""
        return self.rate() > self.rows / self.cost(1)

    def rate(self) -> float:
        """Tokens per second of the last drafting cycles, at median times."""
        if not self.recent:
            return self.rows / self.cost(1)
        seconds = sum(self.cost(columns) + drafted * self.step() for columns, drafted, _ in self.recent)
        return sum(tokens for *_, tokens in self.recent) / seconds

    def step(self) -> float:
        return median_low(self.steps) if self.steps else 0.1 * self.cost(1)

    def cost(self, columns: int) -> float:
        """Seconds of a pass this wide; where none was timed, from the nearest."""
        columns = self.padded(columns) if self.padded else columns
        if not self.passes:
            return 1.0
        if columns in self.passes:
            return median_low(self.passes[columns])
        nearest = min(self.passes, key=lambda known: abs(known - columns))
        return max(median_low(self.passes[nearest]) + self.column() * (columns - nearest), 1e-9)

    def column(self) -> float:
        """Seconds that one more column adds, from the narrowest and the widest pass timed; a tenth of a pass before
        two are known."""
        narrow, wide = min(self.passes, default=1), max(self.passes, default=1)
        low = median_low(self.passes[narrow]) if self.passes else 1.0
        if narrow == wide:
            return 0.1 * low
        return max(median_low(self.passes[wide]) - low, 0.0) / (wide - narrow)


def bin_of(confidence: float) -> int:
    return min(int(confidence * BINS), BINS - 1)


def least_acceptance(cost: float, *, column: float = 0.1, most: int = 8) -> float:
    """The acceptance below which no lookahead pays, where a draft step costs `cost` passes of the target: the smallest
    a with (1 - a^(n+1)) / (1 - a) > 1 + (n+1) cost + n column for some n."""
    grid = [number / 100 for number in range(1, 100)]
    for a in grid:
        for n in range(1, most + 1):
            if (1 - a ** (n + 1)) / (1 - a) > 1 + (n + 1) * cost + n * column:
                return a
    return 1.0
