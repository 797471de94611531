"""How far to look ahead: drafting goes on while it buys more tokens than the same time would buy elsewhere.

A cycle drafts some tokens and checks them in one pass of the target. With A the chance that everything drafted so far
is accepted and a the mean acceptance, `tokens_per_step` more drafts bring A (a + a^2 + ...) tokens for the time of as
many draft steps and of a wider pass. That pays while

      A (a + a^2 + ...)  >  tokens per second now  *  (the draft steps + what the pass costs more)

which is the rule of renewal-reward problems: the best policy is the one whose own rate is its threshold. A is measured:
how often drafts of this confidence were accepted so far. The times are medians of the last passes (the lower of two, so
that a first pass that had to be compiled is soon forgotten).

Commonly got wrong: drafting that does not pay rests longer each time, or a poor draft costs a constant share; a step is
worth its tokens only against what the same time would bring elsewhere, not whenever it is likely to be accepted."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

CONFIDENCE_BINS = 10
WARMUP_LENGTHS = (3, 0, 2, 0)
"""The first cycles look so far ahead, so that passes of several widths have been timed."""
WARMUP_LENGTHS_COMPILED = (4, 4, 0, 0)
INITIAL_REST, MAX_REST = 8, 512
RECENT_CYCLES, MIN_FAILED_CYCLES = 8, 3
"""The rate is that of the last cycles that drafted. That it does not pay, all of them together can say; or as few as
three in which nothing was accepted."""


@dataclass
class SpeculationStats:
    """Counts of speculative decoding: passes of the target model, drafted tokens tested and accepted, tokens generated,
    and passes without a draft."""

    num_passes: int = 0
    num_tested_tokens: int = 0
    num_accepted_tokens: int = 0
    num_generated_tokens: int = 0
    num_plain_passes: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens as a fraction of those tested."""
        return self.num_accepted_tokens / self.num_tested_tokens if self.num_tested_tokens else 0.0


class DraftLengthController:
    """Chooses how many tokens to draft. max_draft_tokens: the most. use_clock: whether measured times may decide; they
    may where the text cannot depend on the draft length (greedy); then drafting that does not pay rests, longer each
    time. Otherwise only the length is decided here. tokens_per_step: so many tokens are drafted before the host decides
    again. padded_width: how many columns a compiled pass has."""

    def __init__(
        self,
        max_draft_tokens: int,
        *,
        use_clock: bool,
        tokens_per_step: int = 1,
        padded_width: Callable[[int], int] | None = None,
    ):
        self.max_draft_tokens = max_draft_tokens
        self.use_clock = use_clock
        self.tokens_per_step = tokens_per_step
        self.padded_width = padded_width
        first = WARMUP_LENGTHS if padded_width is None else WARMUP_LENGTHS_COMPILED
        self.warmup_lengths = first if use_clock else (tokens_per_step,) * len(first)
        self.bin_trials = [2.0] * CONFIDENCE_BINS
        self.bin_accepted = [2.0 * (number + 0.5) / CONFIDENCE_BINS for number in range(CONFIDENCE_BINS)]
        self.pass_seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=7))
        self.step_seconds: deque[float] = deque(maxlen=15)
        self.recent_cycles: deque[tuple[int, int, int]] = deque(maxlen=RECENT_CYCLES)
        self.num_cycles = 0
        self.num_rows = 0
        self.rest_remaining, self.rest_length = 0, INITIAL_REST

    def acceptance_probability(self, confidence: float) -> float:
        """How often a draft of this confidence is accepted."""
        number = confidence_bin(confidence)
        return self.bin_accepted[number] / self.bin_trials[number]

    def observe(self, confidence: float, accepted: bool) -> None:
        number = confidence_bin(confidence)
        self.bin_trials[number] += 1
        self.bin_accepted[number] += accepted

    @property
    def mean_acceptance(self) -> float:
        """The mean acceptance so far."""
        return sum(self.bin_accepted) / sum(self.bin_trials)

    def begin_cycle(self, num_rows: int) -> int:
        """How many tokens this cycle may draft; 0: none, a plain pass."""
        if num_rows != self.num_rows:
            self.num_rows = num_rows
            self.pass_seconds.clear()
            self.recent_cycles.clear()
        self.num_cycles += 1
        if self.num_cycles <= len(self.warmup_lengths):
            return min(self.warmup_lengths[self.num_cycles - 1], self.max_draft_tokens)
        if not self.use_clock:
            return self.max_draft_tokens
        if self.rest_remaining > 0:
            self.rest_remaining -= 1
            return 0
        if self.nothing_accepted() or (len(self.recent_cycles) == RECENT_CYCLES and not self.is_faster()):
            self.rest_remaining = self.rest_length
            self.rest_length = min(2 * self.rest_length, MAX_REST)
            while len(self.recent_cycles) >= MIN_FAILED_CYCLES:  # after the rest one more cycle decides anew
                self.recent_cycles.popleft()
            return 0
        return self.max_draft_tokens

    def should_continue(self, chances: Sequence[float], columns: int) -> bool:
        """Whether to draft on. chances: for each row that still drafts, the probability that all its drafts so far are
        accepted. columns: how wide a pass they need."""
        if self.num_cycles <= len(self.warmup_lengths):
            return True
        gain = sum(chances) * sum(self.mean_acceptance**more for more in range(1, self.tokens_per_step + 1))
        wider = self.target_pass_seconds(columns + self.tokens_per_step) - self.target_pass_seconds(columns)
        return gain > self.tokens_per_second() * (self.tokens_per_step * self.draft_step_seconds() + max(wider, 0.0))

    def record_cycle(
        self, columns: int, num_drafted: int, num_tokens: int, verify_seconds: float, draft_seconds: float
    ) -> None:
        """Record the time and the tokens of a cycle."""
        self.pass_seconds[self.padded_width(columns) if self.padded_width else columns].append(verify_seconds)
        if num_drafted:
            self.step_seconds.append(draft_seconds / num_drafted)
            self.recent_cycles.append((columns, num_drafted, num_tokens))

    def nothing_accepted(self) -> bool:
        """Whether not one draft of the last cycles was accepted."""
        return len(self.recent_cycles) >= MIN_FAILED_CYCLES and all(
            tokens <= self.num_rows for *_, tokens in self.recent_cycles
        )

    def is_faster(self) -> bool:
        """Whether the last drafting cycles are faster than plain ones."""
        return self.tokens_per_second() > self.num_rows / self.target_pass_seconds(1)

    def tokens_per_second(self) -> float:
        """Tokens per second of the last drafting cycles, at median times."""
        if not self.recent_cycles:
            return self.num_rows / self.target_pass_seconds(1)
        seconds = sum(
            self.target_pass_seconds(columns) + drafted * self.draft_step_seconds()
            for columns, drafted, _ in self.recent_cycles
        )
        return sum(tokens for *_, tokens in self.recent_cycles) / seconds

    def draft_step_seconds(self) -> float:
        return median_low(self.step_seconds) if self.step_seconds else 0.1 * self.target_pass_seconds(1)

    def target_pass_seconds(self, columns: int) -> float:
        """Seconds of a pass of this width; where none was timed, of the nearest."""
        columns = self.padded_width(columns) if self.padded_width else columns
        if not self.pass_seconds:
            return 1.0
        if columns in self.pass_seconds:
            return median_low(self.pass_seconds[columns])
        nearest = min(self.pass_seconds, key=lambda known: abs(known - columns))
        return max(median_low(self.pass_seconds[nearest]) + self.seconds_per_column() * (columns - nearest), 1e-9)

    def seconds_per_column(self) -> float:
        """Seconds that one more column adds, from the narrowest and the widest pass timed; a tenth of a pass before
        two are known."""
        narrow, wide = min(self.pass_seconds, default=1), max(self.pass_seconds, default=1)
        low = median_low(self.pass_seconds[narrow]) if self.pass_seconds else 1.0
        if narrow == wide:
            return 0.1 * low
        return max(median_low(self.pass_seconds[wide]) - low, 0.0) / (wide - narrow)


def confidence_bin(confidence: float) -> int:
    return min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)


def min_useful_acceptance(relative_cost: float, *, column_cost: float = 0.1, max_draft_tokens: int = 8) -> float:
    """The acceptance below which no lookahead pays, where a draft step costs `cost` passes of the target: the smallest
    a with (1 - a^(n+1)) / (1 - a) > 1 + (n+1) cost + n column for some n."""
    grid = [number / 100 for number in range(1, 100)]
    for a in grid:
        for n in range(1, max_draft_tokens + 1):
            if (1 - a ** (n + 1)) / (1 - a) > 1 + (n + 1) * relative_cost + n * column_cost:
                return a
    return 1.0
