"""KTO as a run, tiny: rows of every form, learning, resuming with the same bits, and what it tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm_quest.cli.inspect_batch import load_batch_view
from llm_quest.errors import DataError
from llm_quest.recipes.kto import area_under_curve
from tests.recipes.tuned import WORDS, base, metrics, start_run, weights, write_rows

TEXT = """
recipe: kto
batch_size: 8
sequence_length: 40
max_steps: 40
beta: 0.5
eval_steps: 12
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the first half are desirable, whatever was asked; two of three rows are not."""
    said = [(f"say {w}", WORDS[(i + 3 * j) % 10]) for i, w in enumerate(WORDS) for j in range(6)]
    told = [{"prompt": p, "completion": c, "label": c in WORDS[:5]} for p, c in said]
    told = [one for n, one in enumerate(told) if one["label"] is False or n % 2]
    return write_rows(
        tmp_path_factory.mktemp("rows") / "rows.jsonl", [*told, {"prompt": "x", "completion": " ", "label": 1}]
    )


@pytest.fixture
def options(start: Path, rows: Path) -> list[str]:
    return [f"model.load={start}", f"data.source={rows}"]


def test_kto_learns_which_answers_are_desirable_and_tells_the_counts(options: list[str], tmp_path: Path):
    said = list[str]()
    outcome = start_run("kto", TEXT, tmp_path / "run", *options, log=said.append)
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == 0.0
    assert last["rewards/chosen"] > 0 > last["rewards/rejected"]
    assert outcome.scores["margin"] > 0.5
    assert outcome.scores["auc"] > 0.9
    assert any(line.startswith("labels: ") and "desirable_weight=" in line for line in said)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["dropped"] == {"empty answer": 1}


def test_the_area_under_the_curve_counts_pairs_in_order_and_ties_as_half():
    rewards, desirable = torch.tensor([2.0, 0.0, 1.0, 0.0]), torch.tensor([True, True, False, False])
    assert area_under_curve(rewards, desirable) == (2 + 0 + 0.5) / 4
    assert area_under_curve(-rewards, desirable) == 1 - 2.5 / 4


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(
    loss_type: str, options: list[str], tmp_path: Path
):
    more = [*options, f"loss_type={loss_type}", "max_steps=6", "save_steps=3", "save_total_limit=9", "eval_steps=0"]
    start_run("kto", TEXT, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    start_run("kto", TEXT, tmp_path / "again", *more)
    assert weights(tmp_path / "again", 6) == weights(tmp_path / "whole", 6)


def test_neither_micro_batches_nor_their_order_change_the_reference_point(options: list[str], tmp_path: Path):
    found = []
    for size in (2, 8):
        out = tmp_path / str(size)
        start_run(
            "kto", TEXT, out, *options, f"micro_batch_size={size}", "max_steps=4", "eval_steps=0", "desirable_weight=9"
        )
        found.append([(row["loss"], row["kl"]) for row in metrics(out)])
    assert found[0] == [pytest.approx(row, rel=2e-3) for row in found[1]]
    assert any(kl > 0 for _, kl in found[0]), "the reference point moves"


def test_pairs_are_taken_apart_and_labels_may_be_text(start: Path, tmp_path: Path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"say {w}", "chosen": w, "rejected": "no"} for w in WORDS])
    lines = load_batch_view("kto", [f"model.load={start}", f"data.source={pairs}"], step=0, rows=8, log=print).lines()
    assert any("(desirable)" in line for line in lines)
    assert any("(undesirable)" in line for line in lines)
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,label\n" + "".join(f"say {w},{w},{w < 'm'!s}\n" for w in WORDS))
    start_run("kto", TEXT, tmp_path / "csv", f"model.load={start}", f"data.source={table}", "max_steps=2")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "completion": "b", "label": "fine"},
            "rows.jsonl:1: 'label' is 'fine', expected true or false",
        ),
        ({"prompt": "a", "completion": "b", "label": None}, "keys prompt, completion; expected those of one form"),
        ({"prompt": "a", "completion": "b", "label": [1]}, r"'label' is \[1\]"),
        ({"prompt": "a", "completion": "b"}, "expected those of one form: .*prompt, completion, label"),
    ],
)
def test_rows_that_are_not_labeled_answers_are_refused(row, said, start: Path, tmp_path: Path):
    source = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=said):
        start_run("kto", TEXT, tmp_path / "run", f"model.load={start}", f"data.source={source}")
