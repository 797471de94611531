"""The promises of `contracts.LayerCache` and `layers.cache.Cache`: whatever was fed, taken back, repeated and dropped,
a pass reads what it would have read in one pass over the tokens that are left."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.kv_cache import Cache, KVCache, NoCache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from tests.laws.subjects import (
    EVERYBODY,
    RINGS,
    Windowed,
    logits_of_rows,
    random_tokens,
    randomize_,
    shared,
    window_decoder,
)

everybody = pytest.mark.parametrize("name", EVERYBODY)
EXACT = {"rtol": 0.0, "atol": 1e-10}


def feed(model: Decoder, cache: Cache, tokens: Tensor, start: int) -> Tensor:
    """Whole rows, all at the same place."""
    return model(tokens, Scope.unpadded(tokens, cache=cache, start=start))


def rewind_rows(cache: Cache, to: list[int]) -> list[int]:
    """Where the rows stand after a rewind: slots go back exactly, a running state perhaps further."""
    stand = cache.rewind(to)
    assert all(at <= asked for at, asked in zip(stand, to, strict=True))
    assert stand == to or not all(isinstance(part, KVCache) for part in cache.layers)
    return stand


class Program:
    """A cache, and beside it what each row should hold. `require_equal` compares the logits of every pass with those
    of the rows alone, without a cache: one pass over all rows that ever were (of a row and its beginnings the row)."""

    def __init__(self, model: Decoder, *, capacity: int, slack: int, seed: int):
        self.model, self.capacity, self.slack = model, capacity, slack
        self.dice = random.Random(seed)
        self.rows: list[list[int]] = [[], [], []]
        self.tops = [0, 0, 0]
        self.cache = model.new_cache(3, capacity, slack)
        self.read: list[tuple[list[int], Tensor]] = []
        """Of each row of each pass: the tokens up to the pass's end, and the logits (T,V) of the last T of them."""

    def feed(self) -> None:
        """Each row some new tokens, none to seven, with padding scattered among them."""
        new = [self.new_tokens(row) for row in self.rows]
        length = max(1, max(map(len, new)) + self.dice.randint(0, 2))
        tokens = torch.zeros(len(new), length, dtype=torch.int64)
        positions = torch.full_like(tokens, -1)
        columns = [sorted(self.dice.sample(range(length), len(part))) for part in new]
        for b, (part, places) in enumerate(zip(new, columns, strict=True)):
            tokens[b, places] = torch.tensor(part, dtype=torch.int64)
            positions[b, places] = torch.arange(len(self.rows[b]), len(self.rows[b]) + len(part))
        logits = self.model(tokens, Scope(positions, cache=self.cache))
        self.rows = [row + part for row, part in zip(self.rows, new, strict=True)]
        self.tops = [max(top, len(row)) for top, row in zip(self.tops, self.rows, strict=True)]
        self.read += [(row, logits[b, columns[b]]) for b, row in enumerate(self.rows)]

    def require_equal(self) -> None:
        longest: list[list[int]] = []
        for row, _ in sorted(self.read, key=lambda one: -len(one[0])):
            if not any(other[: len(row)] == row for other in longest):
                longest.append(row)
        alone = logits_of_rows(self.model, longest)
        for row, logits in self.read:
            expected = next(one for one, other in zip(alone, longest, strict=True) if other[: len(row)] == row)
            torch.testing.assert_close(logits, expected[len(row) - len(logits) : len(row)], **EXACT)

    def new_tokens(self, row: list[int]) -> list[int]:
        count = min(self.dice.randint(0, 7), self.capacity - len(row))
        return [self.dice.randrange(self.model.config.vocab_size) for _ in range(count)]

    def rewind(self) -> None:
        """At most `max_rewind` tokens below the highest place ever filled, as the maker of the cache was promised."""
        lowest = [max(0, top - self.slack) for top in self.tops]
        to = [self.dice.randint(min(low, len(row)), len(row)) for low, row in zip(lowest, self.rows, strict=True)]
        self.rows = [row[:at] for row, at in zip(self.rows, rewind_rows(self.cache, to), strict=True)]

    def repeat(self) -> None:
        if len(self.rows) <= 3:
            self.cache.batch_repeat_interleave(2)
            self.rows = [row for row in self.rows for _ in range(2)]
            self.tops = [top for top in self.tops for _ in range(2)]

    def keep(self) -> None:
        if len(self.rows) > 2:
            stay = self.dice.sample(range(len(self.rows)), len(self.rows) - 1)
            self.cache.batch_select_indices(torch.tensor(stay))
            self.rows = [self.rows[b] for b in stay]
            self.tops = [self.tops[b] for b in stay]


@everybody
@pytest.mark.parametrize("seed", [3])  # a repeat, then a keep, and passes after both
def test_any_program_of_passes_repeats_and_keeps_equals_no_cache(name: str, seed: int):
    program = Program(shared(name), capacity=40, slack=4, seed=seed)
    for _ in range(12):
        program.dice.choices([program.feed, program.repeat, program.keep], [6, 1, 1])[0]()
    program.require_equal()


@everybody
@pytest.mark.parametrize("seed", [4, 9])  # all four, and passes after each
def test_any_program_with_rewinds_equals_never_having_seen_what_was_taken_back(name: str, seed: int):
    program = Program(shared(name), capacity=40, slack=6, seed=seed)
    steps: list[Callable[[], None]] = [program.feed, program.rewind, program.repeat, program.keep]
    for _ in range(12):
        program.dice.choices(steps, [5, 3, 1, 1])[0]()
    program.require_equal()


@everybody
def test_rewind_then_other_tokens_equals_never_having_seen_them(name: str):
    model = shared(name)
    tokens, others = random_tokens(model, 2, 20), random_tokens(model, 2, 20, seed=1)
    cache = model.new_cache(2, 20, max_rewind=4)
    feed(model, cache, tokens[:, :16], 0)
    start = min(rewind_rows(cache, [12, 12]))
    history = torch.cat((tokens[:, :12], others[:, 12:]), dim=1)
    torch.testing.assert_close(feed(model, cache, history[:, start:], start), model(history)[:, start:], **EXACT)


@everybody
def test_rows_are_taken_back_to_places_of_their_own(name: str):
    model = shared(name)
    tokens = random_tokens(model, 3, 14)
    cache = model.new_cache(3, 14, max_rewind=4)
    feed(model, cache, tokens[:, :12], 0)
    back = rewind_rows(cache, [9, 12, 10])
    positions = torch.tensor(back)[:, None]
    logits = model(tokens.gather(1, positions), Scope(positions, cache=cache))
    for b, at in enumerate(back):
        torch.testing.assert_close(logits[b, 0], model(tokens[b : b + 1, : at + 1])[0, -1], **EXACT)


@everybody
def test_a_row_that_stood_still_is_taken_back_to_where_it_stands_while_another_goes_back(name: str):
    """The trail of a running state: each token's state is kept, and idling leaves none that is wrong."""
    model = shared(name)
    tokens = random_tokens(model, 2, 16)
    cache = model.new_cache(2, 16, max_rewind=3)
    feed(model, cache, tokens[:, :6], 0)
    for at in range(6, 13):
        positions = torch.tensor([[at], [-1]])
        model(tokens[:, at : at + 1], Scope(positions, cache=cache))
    assert cache.rewind([11, 6]) == [11, 6]
    positions = torch.tensor([[11, 12], [6, 7]])
    logits = model(tokens.gather(1, positions), Scope(positions, cache=cache))
    torch.testing.assert_close(logits[0], model(tokens[:1, :13])[0, 11:], **EXACT)
    torch.testing.assert_close(logits[1], model(tokens[1:, :8])[0, 6:], **EXACT)


@everybody
def test_a_mark_changes_nothing_that_is_read(name: str):
    model = shared(name)
    tokens = random_tokens(model, 2, 12)
    cache = model.new_cache(2, 12, max_rewind=3)
    feed(model, cache, tokens[:, :8], 0)
    cache.snapshot([8, 8])  # every row stands there: a running state is photographed
    feed(model, cache, tokens[:, 8:10], 8)
    rewind_rows(cache, [9, 8])
    start = min(rewind_rows(cache, [8, 8]))
    assert start == 8, "what was marked can be stood on"
    torch.testing.assert_close(feed(model, cache, tokens[:, 8:], 8), model(tokens)[:, 8:], **EXACT)


@everybody
def test_a_group_after_one_prefill_equals_each_sample_alone(name: str):
    model = shared(name)
    prompts, endings = random_tokens(model, 2, 9), random_tokens(model, 6, 4, seed=1)
    cache = model.new_cache(2, 13)
    feed(model, cache, prompts, 0)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    whole = torch.cat((prompts.repeat_interleave(3, dim=0), endings), dim=1)
    torch.testing.assert_close(feed(model, cache, endings, 9), model(whole)[:, 9:], **EXACT)


@everybody
def test_the_rows_that_stay_read_their_own_past(name: str):
    model = shared(name)
    tokens = random_tokens(model, 4, 12)
    cache = model.new_cache(4, 12)
    feed(model, cache, tokens[:, :8], 0)
    cache.batch_select_indices(torch.tensor([3, 1]))
    assert cache.batch_size == 2
    torch.testing.assert_close(feed(model, cache, tokens[[3, 1], 8:], 8), model(tokens[[3, 1]])[:, 8:], **EXACT)


@everybody
def test_a_pass_without_positions_leaves_the_cache_unchanged(name: str):
    model = shared(name)
    tokens = random_tokens(model, 2, 12)
    cache = model.new_cache(2, 12)
    feed(model, cache, tokens[:, :7], 0)
    model(tokens[:, :4], Scope(torch.full((2, 4), -1), cache=cache))
    torch.testing.assert_close(feed(model, cache, tokens[:, 7:], 7), model(tokens)[:, 7:], **EXACT)


@everybody
def test_positions_that_leave_a_gap_are_read_as_they_stand(name: str):
    """Two plain runs with nothing between: the empty slots in the gap are not keys."""
    model = shared(name)
    tokens = random_tokens(model, 2, 9)
    positions = torch.tensor([0, 1, 2, 3, 6, 7, 8]).expand(2, -1)
    expected = model(tokens[:, :7], Scope(positions))[:, 4:]
    cache = model.new_cache(2, 9, max_rewind=9)
    feed(model, cache, tokens[:, :4], 0)
    logits = [feed(model, cache, tokens[:, i : i + 1], start) for i, start in ((4, 6), (5, 7), (6, 8))]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **EXACT)


@everybody
def test_a_pass_beyond_the_capacity_is_refused_and_says_what_to_do(name: str):
    model = shared(name)
    tokens = random_tokens(model, 1, 12)
    cache = model.new_cache(1, 10)
    feed(model, cache, tokens[:, :9], 0)
    if not any(isinstance(part, KVCache) and not part.is_ring for part in cache.layers):
        feed(model, cache, tokens[:, 9:], 9)  # a ring or a running state has no end
        return
    with pytest.raises(
        ValueError, match=r"reaches position 11, but the cache was made for 10 positions: make it larger"
    ):
        feed(model, cache, tokens[:, 9:], 9)


@everybody
def test_another_number_of_rows_than_the_caches_is_refused(name: str):
    model = shared(name)
    cache = model.new_cache(2, 10)
    feed(model, cache, random_tokens(model, 2, 3), 0)
    for rows in (1, 3):
        with pytest.raises(ValueError, match=rf"this pass has {rows} rows, but the cache was made for 2"):
            feed(model, cache, random_tokens(model, rows, 1), 3)


@everybody
def test_the_bytes_are_those_of_the_slots_and_the_spare_one(name: str):
    model = shared(name)
    cache = model.new_cache(2, 30, max_rewind=1)
    assert cache.nbytes() == 0
    feed(model, cache, random_tokens(model, 2, 3), 0)
    assert cache.nbytes() > 0
    for part, block in zip(cache.layers, model.blocks, strict=True):
        for mixer in (module for module in block.modules() if isinstance(module, GroupedQueryAttention)):
            numbers = mixer.qkv.parts["k"] + mixer.qkv.parts["v"]
            assert part.nbytes() == 2 * (part.num_slots + 1) * numbers * 8


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("slack", [0, 1, 4])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 30])
def test_a_ring_overflows_many_times_and_still_reads_right(name: str, slack: int, chunk: int):
    model = shared(name)
    tokens = random_tokens(model, 2, 60)
    cache = model.new_cache(2, 60, slack)
    assert any(part.is_ring and part.num_slots < 12 for part in cache.layers)
    logits = [feed(model, cache, tokens[:, i : i + chunk], i) for i in range(0, 60, chunk)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), **EXACT)


def test_a_ring_holds_window_plus_slack_slots():
    model = window_decoder(Windowed((5, None)))
    ring, full = model.new_cache(1, 100, max_rewind=3).layers
    assert (ring.num_slots, ring.is_ring) == (8, True)
    assert (full.num_slots, full.is_ring) == (100, False)
    short, _ = model.new_cache(1, 6, max_rewind=3).layers
    assert (short.num_slots, short.is_ring) == (6, False), "a ring larger than the capacity is none"


@pytest.mark.parametrize("slack", [0, 2, 5])
def test_a_ring_goes_back_its_slack_and_one_more_and_refuses_to_go_deeper(slack: int):
    model = randomize_(window_decoder(Windowed((4, None)))).double()
    tokens = random_tokens(model, 1, 30)
    for back in (slack, slack + 1):
        cache = model.new_cache(1, 30, slack)
        feed(model, cache, tokens[:, :20], 0)
        assert cache.rewind([20 - back]) == [20 - back]
        torch.testing.assert_close(
            feed(model, cache, tokens[:, 20 - back :], 20 - back), model(tokens)[:, 20 - back :], **EXACT
        )
    cache = model.new_cache(1, 30, slack)
    feed(model, cache, tokens[:, :20], 0)
    with pytest.raises(ValueError, match=r"has overwritten what position \d+ sees: make it with max_rewind="):
        cache.rewind([20 - slack - 2])


def test_rewinding_twice_may_not_reach_what_the_ring_overwrote_the_first_time():
    model = randomize_(window_decoder(Windowed((4, None)))).double()
    cache = model.new_cache(1, 40, max_rewind=2)
    feed(model, cache, random_tokens(model, 1, 20), 0)
    assert cache.rewind([18]) == [18]
    with pytest.raises(ValueError, match="has overwritten"):
        cache.rewind([16])
    assert cache.rewind([17]) == [17]


def test_a_refused_rewind_takes_nothing_back():
    model = randomize_(window_decoder(Windowed((None, 4)))).double()
    tokens = random_tokens(model, 1, 24)
    cache = model.new_cache(1, 40, max_rewind=2)
    feed(model, cache, tokens[:, :20], 0)
    with pytest.raises(ValueError, match="has overwritten"):
        cache.rewind([10])
    torch.testing.assert_close(feed(model, cache, tokens[:, 20:], 20), model(tokens)[:, 20:], **EXACT)


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_can_always_start_again_from_nothing(name: str):
    model = shared(name)
    tokens, others = random_tokens(model, 2, 30), random_tokens(model, 2, 30, seed=1)
    cache = model.new_cache(2, 60, max_rewind=1)
    feed(model, cache, tokens, 0)
    assert cache.rewind([0, 0]) == [0, 0]
    logits = [feed(model, cache, others[:, i : i + 3], i) for i in range(0, 30, 3)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(others), **EXACT)
    assert cache.rewind([29, 30]) == [29, 30]


class Snapshot:
    """A layer that can only stand at multiples of four, as a recurrent state with snapshots would."""

    ring = False

    def latest_rewind(self, to: list[int]) -> list[int]:
        return [at - at % 4 for at in to]

    def rewind(self, to: list[int]) -> None:
        self.at = list(to)


def test_all_layers_stand_where_the_one_that_can_least_stands():
    early, late = Snapshot(), Snapshot()
    assert Cache([early, late], batch_size=2, capacity=16).rewind([7, 12]) == [4, 12]
    assert early.at == late.at == [4, 12]


def test_a_ring_refuses_the_deeper_place_a_later_layer_asks_for():
    model = randomize_(window_decoder(Windowed((4,)))).double()
    cache = model.new_cache(1, 40, max_rewind=2)
    feed(model, cache, random_tokens(model, 1, 20), 0)
    cache.layers.append(Snapshot())
    with pytest.raises(ValueError, match="has overwritten"):
        cache.rewind([19])


@everybody
def test_a_cache_takes_the_dtype_of_the_first_pass(name: str):
    model = shared(name)
    cache = model.new_cache(1, 4)
    feed(model, cache, random_tokens(model, 1, 2), 0)
    assert {kept.dtype for part in cache.layers if not isinstance(part, NoCache) for kept in part.tensors.values()} == {
        torch.float64
    }
