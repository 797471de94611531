"""The two recipes that look, from settings to a run folder: they learn, go on where they stood, and their runs load and
export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import llm_quest as quest
from llm_quest.cli.classify import classify_image
from llm_quest.data.image_datasets import ImageDataset
from llm_quest.data.images import ImageProcessor
from llm_quest.errors import BusyError, UsageError
from llm_quest.hub.load_tokenizer import load_preprocess, load_tokenizer
from llm_quest.models import clip
from llm_quest.models.build import build, preset
from llm_quest.objectives.classification import classification_loss
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.vit import VitConfig, adapt_to_images, make_image_processor
from llm_quest.recipes.vlm_config import VlmConfig
from llm_quest.report.page import write_report

SMALL_VIT = [
    "data.source=folder", "data.image_size=8", "data.image_mean=[0.5]", "data.image_std=[0.5]", "model.patch_size=4",
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=32", "batch_size=16",
    "precision=fp32", "warmup_steps=2",
]  # fmt: skip
SMALL_VLM = [
    "data.image_size=24", "vision_tower.patch_size=12", "vision_tower.hidden_size=16", 
    "vision_tower.num_hidden_layers=1", "vision_tower.intermediate_size=32", "language_model.hidden_size=16",
    "language_model.num_hidden_layers=1", "language_model.intermediate_size=32", "batch_size=4",
    "precision=fp32", "warmup_steps=1",
    "eval_images=2",
]  # fmt: skip


def two_classes(folder: Path) -> str:
    """Bright above or bright below: learnable in a few steps."""
    random = np.random.default_rng(0)
    for name, rows in (("above", slice(0, 4)), ("below", slice(4, 8))):
        (folder / name).mkdir(parents=True)
        for i in range(60):
            image = random.integers(0, 60, (8, 8)).astype(np.uint8)
            image[rows] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return str(folder)


def vit_run(tmp_path: Path, out: str, *pairs: str) -> Any:
    settings = load_raw_config("vit", [*SMALL_VIT, f"data.path={tmp_path / 'images'}", *pairs])
    return run_recipe(
        get_recipe("vit"),
        parse_config(VitConfig, settings),
        settings,
        tmp_path / out,
        quiet=True,
        log=lambda text: None,
    )


def vlm_run(tmp_path: Path, out: str, *pairs: str) -> Any:
    settings = load_raw_config("vlm", [*SMALL_VLM, *pairs])
    return run_recipe(
        get_recipe("vlm"),
        parse_config(VlmConfig, settings),
        settings,
        tmp_path / out,
        quiet=True,
        log=lambda text: None,
    )


@pytest.mark.parametrize("recipe", ["vit", "cifar10", "vlm"])
def test_the_recipes_that_come_with_the_package_are_valid(recipe: str):
    settings = load_raw_config(recipe)
    assert parse_config(VlmConfig if recipe == "vlm" else VitConfig, settings).recipe in ("vit", "vlm")


def test_a_folder_of_images_is_learned_and_the_run_loads_as_a_model(tmp_path: Path):
    two_classes(tmp_path / "images")
    outcome = vit_run(tmp_path, "run", "max_steps=60", "data.augment.translate=0")
    assert outcome.status == "finished"
    assert outcome.scores["accuracy"] > 0.9
    model = quest.load(tmp_path / "run")
    assert model.config.label_names == ("above", "below")
    assert load_preprocess(tmp_path / "run") == ImageProcessor(8, (0.5,), (0.5,))
    image = Image.open(tmp_path / "images" / "below" / "0.png")
    assert int(model(load_preprocess(tmp_path / "run")(image)[None]).argmax()) == 1
    confusion = json.loads((tmp_path / "run" / "confusion.json").read_text())
    assert confusion["labels"] == ["above", "below"]
    assert [sum(row) for row in confusion["matrix"]] == [12, 12]  # 0.2 of each class
    page = write_report([tmp_path / "run"]).read_text(encoding="utf-8")
    for told in ("Confusion matrix, held out", "above", '<td class="number">48</td>', "macro F1, held out"):
        assert told in page, told


def test_several_labels_of_an_image_are_learned_and_transformers_scores_the_export_alike(tmp_path: Path):
    """Bright above, below, on both sides or on none: two labels, each on or off."""
    random, rows = np.random.default_rng(0), []
    (tmp_path / "images").mkdir()
    for i in range(120):
        image = random.integers(0, 60, (8, 8)).astype(np.uint8)
        labels = [name for name, on in (("above", i % 2), ("below", i % 4 > 1)) if on]
        for name, half in (("above", slice(0, 4)), ("below", slice(4, 8))):
            image[half] += 150 * (name in labels)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "labels": labels})
    (tmp_path / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = ("max_steps=75", "learning_rate=2e-2", "data.augment.translate=0", "class_weights=balanced")
    outcome = vit_run(tmp_path, "run", *pairs)
    assert outcome.scores["accuracy"] > 0.9
    assert json.loads((tmp_path / "run" / "data.json").read_text())["problem_type"] == "multi_label_classification"
    folder = quest.save(quest.load(tmp_path / "run"), tmp_path / "hf", preprocess=load_preprocess(tmp_path / "run"))
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.problem_type == "multi_label_classification"
    pixels = load_preprocess(folder)(Image.open(tmp_path / "images" / "3.png"))[None]
    targets = torch.tensor([[1.0, 1.0]])
    with torch.no_grad():
        scored, logits = theirs(pixels, labels=targets), quest.load(folder)(pixels)
    torch.testing.assert_close(logits, scored.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(classification_loss(logits, targets, 0.0).total / 2, scored.loss, atol=1e-6, rtol=0)
    said = [classify_image(str(folder), tmp_path / "images" / f"{i}.png") for i in range(4)]
    assert [set(one.labels) for one in said] == [set(row["labels"]) for row in rows[:4]]
    assert said[0].lines()[-1] == "labels: none (no probability is above 0.5)"
    assert "above" in write_report([tmp_path / "run"]).read_text(encoding="utf-8")


def test_classes_of_images_are_weighed(tmp_path: Path):
    two_classes(tmp_path / "images")
    said: list[str] = []
    settings = load_raw_config(
        "vit", [*SMALL_VIT, f"data.path={tmp_path / 'images'}", "class_weights={below: 3}", "max_steps=2"]
    )
    config = parse_config(VitConfig, settings)
    run_recipe(get_recipe("vit"), config, settings, tmp_path / "run", quiet=True, log=said.append)
    assert "class weights: above 1, below 3" in said


def test_a_run_goes_on_with_the_bits_of_one_that_was_never_interrupted(tmp_path: Path):
    two_classes(tmp_path / "images")
    whole = vit_run(tmp_path, "whole", "max_steps=8")
    vit_run(tmp_path, "halved", "max_steps=8", "save_steps=4")
    for later in sorted((tmp_path / "halved" / "checkpoints").iterdir())[1:]:
        later.rename(tmp_path / later.name)
    again = vit_run(tmp_path, "halved", "max_steps=8")
    assert again.scores == whole.scores
    for a, b in zip(
        quest.load(tmp_path / "whole").parameters(), quest.load(tmp_path / "halved").parameters(), strict=True
    ):
        assert torch.equal(a, b)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["vit", "vlm"])
def test_checkpointed_activations_give_the_same_bits(tmp_path: Path, recipe: str):
    two_classes(tmp_path / "images")
    run = vit_run if recipe == "vit" else vlm_run
    for name in ("false", "true"):
        run(tmp_path, name, "max_steps=2", f"gradient_checkpointing={name}")
    for a, b in zip(*(quest.load(tmp_path / name).parameters() for name in ("false", "true")), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match="applied to this model already"):
        run(tmp_path, "twice", "max_steps=2", "gradient_checkpointing=true", "techniques=[checkpointing]")


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        ("hyper_connections", "HyperConnections edits language models; this is a {} model"),
        ("multi_token", "MultiTokenPrediction edits language models; this is a {} model"),
        ("score_head", "ScoreHead edits language models; this is a {} model"),
        ("length", "ContextExtension edits language models; this is a {} model"),
        ("{name: dyt, form: llama}", "DyT edits language models; this is a {} model"),
        ("quantize", "Quantize edits language models; this is a {} model"),
    ],
)
def test_techniques_that_need_a_decoder_are_refused_by_name(tmp_path: Path, technique: str, message: str):
    two_classes(tmp_path / "images")
    for run, page in ((vit_run, "vit"), (vlm_run, "vision_language")):
        with pytest.raises(UsageError, match=message.format(page)):
            run(tmp_path, "run", "max_steps=1", "warmup_steps=1", f"techniques=[{technique}]")
    with pytest.raises(UsageError, match="logits of classes are not capped: set final to null"):
        vit_run(tmp_path, "run", "max_steps=1", "warmup_steps=1", "techniques=[softcap]")


def test_the_report_tells_what_was_seen_and_said(tmp_path: Path):
    two_classes(tmp_path / "images")
    vit_run(tmp_path, "looks", "max_steps=2")
    vlm_run(tmp_path, "speaks", "max_steps=2")
    looks, speaks = (write_report([tmp_path / name]).read_text(encoding="utf-8") for name in ("looks", "speaks"))
    for told in ("on 32 images of", "held-out accuracy", "nats per image", "images read"):
        assert told in looks, told
    assert "tokens" not in looks.split("Settings")[0].split("</style>")[1]
    for told in ("held-out caption", "held-out relation", "wanted: ", "describe:"):
        assert told in speaks, told


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path):
    two_classes(tmp_path / "images")
    vit_run(tmp_path, "run", "max_steps=2")
    with pytest.raises(BusyError, match="holds a run of other settings"):
        vit_run(tmp_path, "run", "max_steps=2", "batch_size=8")
    with pytest.raises(BusyError, match="holds a run of another recipe"):
        vlm_run(tmp_path, "run", "max_steps=1")


def test_a_trained_vit_goes_on_with_other_classes_and_another_size(tmp_path: Path):
    two_classes(tmp_path / "images")
    vit_run(tmp_path, "first", "max_steps=2")
    vit_run(tmp_path, "second", "max_steps=2", f"model.load={tmp_path / 'first'}", "data.image_size=16", "batch_size=8")
    assert quest.load(tmp_path / "second").config.image_size == 16


def test_settings_that_do_not_fit_are_refused_with_what_to_do(tmp_path: Path):
    two_classes(tmp_path / "images")
    with pytest.raises(UsageError, match="patch_size 5 must divide images of 8 pixels"):
        vit_run(tmp_path, "a", "model.patch_size=5")
    with pytest.raises(UsageError, match=r"digits are 8 pixels with 1 channels: set data\.image_size=8"):
        vit_run(tmp_path, "b", "data.source=digits", "data.path=null", "data.image_size=16")
    with pytest.raises(UsageError, match="source folder needs a path"):
        vit_run(tmp_path, "c", "data.path=null")
    with pytest.raises(UsageError, match=r"unknown key; allowed here: patch_size"):
        vit_run(tmp_path, "d", "model.pach=2")


def test_scenes_are_learned_from_and_the_run_answers_questions(tmp_path: Path):
    outcome = vlm_run(tmp_path, "run", "max_steps=3")
    assert set(outcome.scores) == {"caption", "color", "count", "relation"}
    model, tokenizer = quest.load(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    assert tokenizer.token_to_id("<image>") == model.config.image_token_id
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_questions_are_learned_at_a_part_of_the_captions_rate(tmp_path: Path):
    captioning_run = [
        "max_steps=4",
        "caption_first_steps=2",
        "question_lr_scale=0.25",
        "lr_scheduler_type=constant",
        "warmup_steps=0",
    ]
    vlm_run(tmp_path, "run", *captioning_run, "learning_rate=1e-2", "logging_steps=1")
    assert [row["learning_rate"] for row in rows(tmp_path / "run")] == pytest.approx([1e-2, 1e-2, 2.5e-3, 2.5e-3])


def test_a_frozen_part_stays_bit_by_bit_what_it_was(tmp_path: Path):
    tower = build(clip.Config(24, 12, 3, 16, 2, 4, 32), seed=5)
    quest.save(tower, tmp_path / "tower", preprocess=ImageProcessor(24, (0.4, 0.4, 0.4)))
    vlm_run(
        tmp_path,
        "run",
        "max_steps=2",
        f"vision_tower.load={tmp_path / 'tower'}",
        "trainable=[projector,language_model]",
        "projector=linear",
    )
    model = quest.load(tmp_path / "run")
    for name, parameter in tower.named_parameters():
        assert torch.equal(model.tower.get_parameter(name), parameter), name
    assert load_preprocess(tmp_path / "run").mean == (0.4, 0.4, 0.4)


def test_captions_of_ones_own_are_trained_on(tmp_path: Path):
    random = np.random.default_rng(0)
    rows = []
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (30, 20, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": f"picture number {i}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    outcome = vlm_run(
        tmp_path,
        "run",
        "max_steps=2",
        f"data.source={tmp_path / 'captions.jsonl'}",
        "data.held_out=0.3",
    )
    assert set(outcome.scores) == {"caption"}


def test_cifar_10_as_it_is_distributed_is_trained_on(tmp_path: Path):
    folder, random = tmp_path / "cifar-10-batches-bin", np.random.default_rng(0)
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = random.integers(0, 256, (4, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    small = [
        "model.hidden_size=16",
        "model.num_attention_heads=2",
        "model.num_hidden_layers=1",
        "model.intermediate_size=32",
        "batch_size=4",
        "precision=fp32",
    ]
    settings = load_raw_config("cifar10", [*small, f"data.path={tmp_path}", "max_steps=2", "warmup_steps=1"])
    outcome = run_recipe(
        get_recipe("vit"),
        parse_config(VitConfig, settings),
        settings,
        tmp_path / "run",
        quiet=True,
        log=lambda text: None,
    )
    assert outcome.status == "finished"
    assert quest.load(tmp_path / "run").config.label_names[0] == "airplane"


def classes(*names: str) -> ImageDataset:
    return ImageDataset(np.zeros((2, 3, 16, 16), np.uint8), np.arange(2), names)


@pytest.mark.parametrize(
    ("known", "wanted", "kept"),
    [
        (("cat", "dog"), ("apple", "pear"), {}),
        (("pear", "apple"), ("apple", "pear"), {0: 1, 1: 0}),
        (("cat", "dog", "emu"), ("dog", "fox"), {0: 1}),
        (("crane", "crane"), ("crane", "dog"), {}),
        (("apple", "pear"), ("apple", "pear"), {0: 0, 1: 1}),
    ],
)
def test_a_head_goes_on_with_the_classes_that_it_knows_by_name(
    known: tuple[str, ...], wanted: tuple[str, ...], kept: dict[int, int]
):
    numbers = replace(preset("vit-tiny").config, num_labels=len(known), label_names=known)
    model: Any = build(numbers, seed=0)
    torch.nn.init.normal_(model.head.bias)
    before = model.head.weight.clone(), model.head.bias.clone()
    after: Any = adapt_to_images(model, classes(*wanted), wanted, seed=1)
    assert after.config.label_names == wanted
    assert after.head.weight.shape[0] == after.config.num_labels == len(wanted)
    for row in range(len(wanted)):
        same = [number for number, old in enumerate(before[0]) if torch.equal(after.head.weight[row], old)]
        assert same == ([kept[row]] if row in kept else [])
        assert after.head.bias[row].item() == (before[1][kept[row]].item() if row in kept else 0.0)


def test_a_run_from_a_model_makes_images_as_its_folder_says(tmp_path: Path):
    two_classes(tmp_path / "images")
    theirs = ImageProcessor(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", crop=True, resize_size=20)
    quest.save(build("vit-tiny", seed=0), tmp_path / "model", preprocess=theirs)
    small = ["data.source=folder", f"data.path={tmp_path / 'images'}", "batch_size=4", "precision=fp32"]
    pairs = [*small, f"model.load={tmp_path / 'model'}", "max_steps=1", "warmup_steps=0"]
    for extra, expected in (
        ([], theirs),
        (["data.image_size=8"], replace(theirs, size=8, resize_size=10)),
        (["data.image_mean=[0.7, 0.7, 0.7]"], replace(theirs, mean=(0.7, 0.7, 0.7))),
    ):
        config = parse_config(VitConfig, load_raw_config("vit", [*pairs, *extra]))
        assert make_image_processor(config, lambda text: None) == expected
    settings = load_raw_config("vit", pairs)
    run_recipe(
        get_recipe("vit"), parse_config(VitConfig, settings), settings, tmp_path / "run", quiet=True,
        log=lambda text: None,
    )  # fmt: skip
    assert load_preprocess(tmp_path / "run") == theirs


def test_images_of_a_folder_need_a_size(tmp_path: Path):
    two_classes(tmp_path / "images")
    with pytest.raises(UsageError, match=r"needs data\.image_size"):
        parse_config(VitConfig, load_raw_config("vit", ["data.source=folder", f"data.path={tmp_path / 'images'}"]))
