"""What a recipe with rows is evaluated on: a part that it holds out, rows of a file of their own, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm_quest.data.document import DropReport
from llm_quest.data.image_text import CaptionDataset, read_caption_rows
from llm_quest.data.images import ImageProcessor
from llm_quest.data.sources import DataSource, load_rows
from llm_quest.errors import UsageError
from llm_quest.recipes.recipe import load_recipe
from tests.recipes.every_recipe import prepare, run_tiny
from tests.recipes.tuned import WORDS, metrics, write_rows

RECIPES = ("pretrain", "sft", "dpo", "reward", "kto", "gkd", "prm", "classify")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    prepare(folder)
    words = WORDS[:3]
    rows = [
        {
            "prompt": f"repeat {w}", "chosen": w, "rejected": "tree", "completion": w, "label": True,
            "text": f"repeat {w} " * 9,
        }
        for w in words
    ]  # fmt: skip
    write_rows(folder / "held.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in rows])
    steps = [{"prompt": row["prompt"], "completions": ["a", "b"], "labels": [True, False]} for row in rows]
    write_rows(folder / "held_steps.jsonl", steps)
    write_rows(
        folder / "held_pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    )
    write_rows(folder / "held_texts.jsonl", [{"text": row["text"]} for row in rows])
    write_rows(folder / "held_labels.jsonl", [{"text": row["text"], "label": "True"} for row in rows])
    return folder


FILES = {
    "pretrain": "held_texts.jsonl", "sft": "held.jsonl", "dpo": "held_pairs.jsonl", "reward": "held_pairs.jsonl",
    "kto": "held_pairs.jsonl", "gkd": "held.jsonl", "prm": "held_steps.jsonl", "classify": "held_labels.jsonl",
}  # fmt: skip


def eval_names(out: Path) -> set[str]:
    return {name for row in metrics(out) for name in row if name.startswith("eval/")}


def data_of(out: Path) -> dict[str, int]:
    facts = json.loads((out / "data.json").read_text())
    names = {"train_rows": "train", "held_out_rows": "held", "train_documents": "train", "val_documents": "held"}
    return {names[key]: value for key, value in facts.items() if key in names}


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_to_evaluate_on_are_given_or_left_out(recipe: str, folder: Path, tmp_path: Path):
    """With held_out=0 or a file everything is trained on; without rows nothing is measured, with a file it is."""
    run_tiny(recipe, folder, tmp_path / "part")
    run_tiny(recipe, folder, tmp_path / "none", "data.held_out=0")
    run_tiny(recipe, folder, tmp_path / "file", f"data.validation={folder / FILES[recipe]}")
    part, none, file = (data_of(tmp_path / name) for name in ("part", "none", "file"))
    assert part["held"] > 0
    assert none["held"] == 0
    assert none["train"] == file["train"] > part["train"]
    assert file["held"] == (6 if recipe == "kto" else 3)
    assert eval_names(tmp_path / "none") == set()
    assert eval_names(tmp_path / "file") == eval_names(tmp_path / "part") != set()


@pytest.mark.parametrize("recipe", ["pretrain", "quickstart", "sft", "dpo", "classify"])
def test_a_part_and_a_file_exclude_each_other(recipe: str):
    assert load_recipe(recipe, ["data.validation=x.jsonl"])[1].data.held_out == 0
    with pytest.raises(UsageError, match=r"held_out=0.2 has no effect beside validation"):
        load_recipe(recipe, ["data.validation=x.jsonl", "data.held_out=0.2"])


@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_the_config_of_a_run_with_a_file_is_read_again(recipe: str, folder: Path, tmp_path: Path):
    for _ in range(2):  # the second time it resumes
        run_tiny(recipe, folder, tmp_path / "run", f"data.validation={folder / FILES[recipe]}")
    assert load_recipe(str(tmp_path / "run"), ())[1].data.held_out == 0


def test_a_policy_needs_prompts_that_it_is_watched_on():
    with pytest.raises(UsageError, match=r"give data.validation, or data.held_out above 0"):
        load_recipe("grpo", ["model.load=x", "data.source=x.jsonl", "data.held_out=0"])
    with pytest.raises(UsageError, match=r"give data.validation, or data.held_out above 0"):
        load_recipe("rpt", ["model.load=x", "data.source=x.jsonl", "data.held_out=0"])


def test_rows_that_are_trained_on_too_are_told(folder: Path, tmp_path: Path):
    run_tiny("sft", folder, tmp_path / "run", f"data.validation={folder / 'pairs.jsonl'}")
    notes = json.loads((tmp_path / "run/data.json").read_text())["notes"]
    assert any("90 of the 90 rows of data.validation: their prompt is trained on too" in note for note in notes)


def test_images_to_evaluate_on_are_a_folder_of_their_own(folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    for kind in ("above", "below"):
        (other / kind).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(other / kind / "0.png")
    run_tiny("vit", folder, tmp_path / "none", "data.held_out=0")
    run_tiny("vit", folder, tmp_path / "file", f"data.validation={other}")
    facts = [json.loads((tmp_path / name / "data.json").read_text()) for name in ("none", "file")]
    assert [one["train_images"] for one in facts] == [40, 40]
    assert [one["val_images"] for one in facts] == [0, 2]
    assert eval_names(tmp_path / "none") == set()
    assert "eval/accuracy" in eval_names(tmp_path / "file")
    with pytest.raises(UsageError, match="validation is a folder beside source=folder"):
        load_recipe("vit", [f"data.validation={other}"])


@pytest.mark.parametrize("recipe", ["sft", "classify"])
def test_the_halves_of_what_is_held_out_are_one_whole(recipe: str, folder: Path, tmp_path: Path):
    for part in ("all", "dev", "test"):
        run_tiny(recipe, folder, tmp_path / part, f"data.eval_part={part}", "data.held_out=0.3")
    whole, dev, test = (data_of(tmp_path / part) for part in ("all", "dev", "test"))
    assert dev["held"] + test["held"] == whole["held"]
    assert min(dev["held"], test["held"]) > 0
    assert {whole["train"], dev["train"]} == {test["train"]}, "what is trained on does not change"
    assert metrics(tmp_path / "dev")[-1] != metrics(tmp_path / "test")[-1]


def test_captions_to_evaluate_on_are_rows_of_their_own(folder: Path, tmp_path: Path):
    images = sorted((folder / "images/above").glob("*.png"))[:6]
    rows = [{"image": str(image), "caption": f"sight {image.stem}"} for image in images]
    train, held = write_rows(tmp_path / "train.jsonl", rows[:4]), write_rows(tmp_path / "held.jsonl", rows[4:])
    preprocess = ImageProcessor(8)
    report = DropReport()
    learned, others = (load_rows([DataSource(str(file))], read_caption_rows, report) for file in (train, held))
    found = CaptionDataset(learned, preprocess, 0.0, "rows", others)
    assert (found.num_train_examples, found.num_eval_examples) == (4, 2)
    assert CaptionDataset(learned, preprocess, 0.0, "rows").num_eval_examples == 0
    halves = [CaptionDataset(learned, preprocess, 0.0, "rows", others, part) for part in ("dev", "test")]
    assert [one.num_eval_examples for one in halves] == [1, 1]
    assert not np.array_equal(*(np.asarray(one.eval_example(0).pixels) for one in halves))
    with pytest.raises(UsageError, match="validation and eval_part have no effect on synthetic_shapes"):
        load_recipe("vlm", [f"data.validation={held}"])


def test_iterative_runs_are_not_made_longer(folder: Path, tmp_path: Path):
    run_tiny("iterative", folder, tmp_path / "run")
    with pytest.raises(UsageError, match=r"trains each policy for 2 steps.*raise num_outer_iterations"):
        run_tiny("iterative", folder, tmp_path / "run", "max_steps=3")
