"""Every technique on every family, in every dtype, eager and compiled, decoding ragged prompts with a cache.

`python -m tests.laws.option_grid --all [PRESET ...]` judges every cell (of these presets) and prints a table, half a
CPU minute a family; `python -m tests.laws.option_grid PART PARTS` judges a part of `suite_cells`, for
test_option_grid.py.

In a process of its own, without the shape-checking import hook, which would be traced too."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_quest.generation.compiled import decode_step
from llm_quest.layers import native
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.weight_formats import FORMATS
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.quantize import Quantize
from tests.laws.compiled import compile_whole
from tests.laws.subjects import TINY, keep_block_kinds_, logits_of_rows, own, random_tokens
from tests.laws.test_decoder import limit
from tests.laws.test_techniques import EXAMPLES, REFUSED

CHANGES: dict[str, tuple[Any, ...]] = {
    "none": (),
    **{name: (example,) for name, example in EXAMPLES.items()},
    **{f"quantize {form}": (Quantize(form),) for form in FORMATS},  # type: ignore[arg-type]
    "quantize nf4, then lora": (Quantize("nf4"), LoRA(rank=2)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARE = len(CHANGES)
EAGER_SHARE = 3
LENGTHS, STEPS = (7, 4), 3
Step = Callable[[Decoder, Tensor, Tensor, Cache], Tensor]


class Cell(NamedTuple):
    """technique: a name in CHANGES."""

    technique: str
    page: str
    dtype: str
    compiled: bool


REFUSED_CELLS: dict[Cell, tuple[type[Exception], str]] = {}
"""Cells that raise -> the error and its words. (A technique that refuses a family whatever the dtype is in
test_techniques.REFUSED.)"""


def all_cells() -> Iterator[Cell]:
    for technique in CHANGES:
        for page in TINY:
            for dtype in DTYPES:
                yield Cell(technique, page, dtype, False)
                yield Cell(technique, page, dtype, True)


def suite_cells() -> list[Cell]:
    """Eagerly in bfloat16 every third pair (in float64 test_techniques judges every pair); eagerly in float32 every
    family with one technique; compiled each technique on a family of its own, in either dtype (test_compiled.py
    compiles every family)."""
    techniques: list[str] = list(CHANGES)
    cells = []
    for cell in all_cells():
        number = techniques.index(cell.technique) + TINY.index(cell.page)
        page = TINY.index(cell.page)
        if cell.compiled:
            judged = number % SHARE == 0 and page < SHARE and cell.dtype == list(DTYPES)[page % len(DTYPES)]
        else:
            judged = number % (EAGER_SHARE if cell.dtype == "bfloat16" else SHARE) == 0
        cells += [cell] if judged else []
    return cells


def part_of_suite(part: int, parts: int) -> list[Cell]:
    """The cells of every so-many-th family."""
    return [cell for cell in suite_cells() if TINY.index(cell.page) % parts == part]


def model_after_technique(cell: Cell) -> Decoder:
    """The model after the technique, with all that it learns moved away from its first values."""
    model = own(cell.page, DTYPES[cell.dtype])
    generator = torch.Generator().manual_seed(1)
    for technique in CHANGES[cell.technique]:
        model = technique(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return keep_block_kinds_(model).eval().requires_grad_(False)


def decode(model: Decoder, tokens: Tensor, step: Step) -> Tensor:
    """Logits (B,STEPS,V): a padded prefill of ragged prompts, then one token a row and pass."""
    cache, longest = model.new_cache(2, 16), max(LENGTHS)
    positions = torch.stack([torch.arange(longest) - (longest - length) for length in LENGTHS]).clamp(min=-1)
    positions, lengths = positions.to(tokens.device), torch.tensor(LENGTHS, device=tokens.device)[:, None]
    model(tokens.gather(1, positions.clamp(min=0)), Scope(positions, cache=cache, max_seq_len=longest))
    logits = []
    for number in range(STEPS):
        positions = lengths + number
        logits.append(step(model, tokens.gather(1, positions), positions, cache))
    return torch.stack(logits, dim=1)


def eager_step(model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    scope = Scope(positions, cache=cache, max_seq_len=int(positions.max()) + 1)
    return model(tokens, scope)[:, -1]


def rows_alone(model: Decoder, tokens: Tensor) -> Tensor:
    """The same logits in float64, without cache and padding. (Of the model itself, which is then in float64.)"""
    exact = model.to("cpu", torch.float64)
    rows = [row[: length + STEPS].tolist() for row, length in zip(tokens.cpu(), LENGTHS, strict=True)]
    return torch.stack([logits[-STEPS:] for logits in logits_of_rows(exact, rows)])


def typical_error(ours: Tensor, exact: Tensor) -> float:
    """Of the median token (a router's choice is discrete: in low precision a token near a tie visits another expert),
    against the norm of the median token."""
    ours, exact = (logits.to("cpu", torch.float64) for logits in (ours, exact))
    return ((ours - exact).norm(dim=-1).median() / exact.norm(dim=-1).median()).item()


@torch.no_grad()
def judge(cell: Cell, device: str = "cpu", backend: str = "eager") -> None:
    """AssertionError, or whatever the cell raises. device: where it runs; the reference is computed on the CPU."""
    model = model_after_technique(cell).to(device)
    tokens = random_tokens(model, 2, max(LENGTHS) + STEPS).to(device)
    eager = decode(model, tokens, eager_step)
    assert eager.dtype is DTYPES[cell.dtype], f"logits are {eager.dtype}"
    if not cell.compiled:
        error = typical_error(eager, rows_alone(model, tokens))
        assert error < limit(model, DTYPES[cell.dtype]), f"off by {error:.2g} from each row alone in float64"
        return
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = decode(model, tokens, compile_whole(decode_step, backend))
    error = typical_error(compiled, eager)
    assert error < limit(model, DTYPES[cell.dtype]), f"compiled is off by {error:.2g} from eager"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"{STEPS} decode steps made {graphs} graphs"


def verdict(cell: Cell, device: str = "cpu", backend: str = "eager") -> str:
    """ "holds", the reason of a refusal that was expected, or the complaint after "FAILS"."""
    expected: tuple[Any, str] | None = REFUSED_CELLS.get(cell)
    if (cell.technique, cell.page) in REFUSED:
        expected = (ValueError, REFUSED[cell.technique, cell.page])
    try:
        judge(cell, device, backend)
    except Exception as error:
        if expected and isinstance(error, expected[0]) and re.search(expected[1], str(error)):
            return f"refused: {expected[1]}"
        return f"FAILS: {type(error).__name__}: {str(error)[:400]}"
    return f"FAILS: should raise {expected[0].__name__}" if expected else "holds"


def main(*arguments: str) -> int:
    torch.set_num_threads(1)
    native.is_loaded()  # compiled code takes the operators in C++ of a library that was built before
    if arguments[0] == "--all":
        return print_table(arguments[1:] or TINY)
    part, parts = map(int, arguments)
    complaints = []
    for cell in part_of_suite(part, parts):
        said = verdict(cell)
        print(f"{' | '.join(map(str, cell))} | {said}", flush=True)
        complaints += [cell] if said.startswith("FAILS") else []
    return len(complaints)


def print_table(pages: Sequence[str]) -> int:
    """A row a family and technique: how many of its four cells hold, or why it refuses."""
    print("| family | technique | float32 and bfloat16, eager and compiled |\n| --- | --- | --- |")
    failures = 0
    for page in pages:
        for technique in CHANGES:
            said = [verdict(cell) for cell in all_cells() if (cell.technique, cell.page) == (technique, page)]
            failures += sum(one.startswith("FAILS") for one in said)
            kinds = [f"{said.count(one)} x {one}" for one in dict.fromkeys(said)]
            print(f"| {page} | {technique} | {', '.join(kinds)} |", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
