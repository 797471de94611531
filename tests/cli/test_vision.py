"""Models that look, as a user meets them at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli.classify import classify_image, is_image_path, unique_names
from llm_quest.cli.main import app
from llm_quest.data.images import ImageProcessor
from llm_quest.data.synthetic_shapes import split_scene
from llm_quest.errors import DataError, UsageError
from llm_quest.models.build import build
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.held_out import evaluate_run
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.vlm_config import VlmConfig
from tests.recipes.test_vision import SMALL_VLM, two_classes, vit_run


def quiet(text: str) -> None:
    return None


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    two_classes(folder / "images")
    vit_run(folder, "run", "max_steps=40", "data.augment.translate=0")
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    settings = load_raw_config("vlm", [*SMALL_VLM, "max_steps=2"])
    run_recipe(get_recipe("vlm"), parse_config(VlmConfig, settings), settings, folder / "run", quiet=True, log=quiet)
    split_scene(0, 0).render(30).save(folder / "scene.png")
    return folder


def run(*words: str, given: str = "") -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, list(words), input=given)
    return result.exit_code, result.stdout, result.exception


def test_an_image_is_classified(vit: Path):
    image = vit / "images" / "below" / "0.png"
    seen = classify_image(str(vit / "run"), image)
    assert seen.label == "below"
    assert sum(seen.probabilities.values()) == pytest.approx(1, abs=1e-5)
    code, out, _ = run("classify", str(vit / "run"), str(image), "--json")
    assert (code, json.loads(out)["label"]) == (0, "below")


def test_a_run_that_looks_is_judged_on_what_it_held_out(vit: Path, vlm: Path):
    marks = evaluate_run(str(vit / "run"), log=quiet)
    assert marks.scores == json.loads((vit / "run" / "summary.json").read_text())["scores"]
    code, out, _ = run("eval", str(vlm / "run"), "--json")
    assert (code, set(json.loads(out)["scores"])) == (0, {"caption", "color", "count", "relation"})


def test_something_is_said_about_an_image(vlm: Path):
    asked = ("generate", str(vlm / "run"), "-p", "describe:", "--image", str(vlm / "scene.png"), "-n", "3", "-q")
    code, out, _ = run(*asked, "--temperature", "0")
    assert (code, out.startswith("describe:")) == (0, True)
    code, out, _ = run(*asked, "--temperature", "0", "--json")
    assert (code, json.loads(out)["images"]) == (0, [str(vlm / "scene.png")])


def test_a_conversation_about_an_image(vlm: Path):
    said = f"describe:\n/reset\nwhere are the red circles?\n/image {vlm / 'scene.png'}\nand here?\n/quit\n"
    code, out, _ = run("chat", str(vlm / "run"), "--image", str(vlm / "scene.png"), "-n", "2", "-q", given=said)
    assert code == 0
    assert out.count("\n") >= 3


def test_names_of_images_are_told_from_text():
    assert is_image_path("a/b.PNG")
    assert not is_image_path("what a day")
    assert not is_image_path("look:\nhere.png")


def test_mistakes_are_answered(vit: Path, vlm: Path, tmp_path: Path):
    scene_file, broken = str(vlm / "scene.png"), tmp_path / "broken.png"
    broken.write_bytes((vlm / "scene.png").read_bytes()[:200])
    with pytest.raises(DataError, match="no image that can be read, or a corrupt one"):
        classify_image(str(vit / "run"), broken)
    with pytest.raises(DataError, match="there is no such image"):
        classify_image(str(vit / "run"), tmp_path / "absent.png")
    with pytest.raises(UsageError, match="is not an image classifier; train one with quest train vit"):
        classify_image(str(vlm / "run"), scene_file)
    text = quest.save(build("llama3.2-tiny"), tmp_path / "text")
    with pytest.raises(UsageError, match="is not an image classifier"):
        classify_image(str(text), scene_file)
    refused = run("generate", str(vlm / "run"), "-p", "a", "--image", scene_file, "--slide")[2]
    assert isinstance(refused, UsageError)
    assert "--slide would drop the image" in str(refused)
    for option in (["--draft", "ngram"], ["--special-tokens"], ["--beams", "2"]):
        refused = run("generate", str(vlm / "run"), "-p", "a", "--image", scene_file, *option)[2]
        assert isinstance(refused, UsageError)
        assert f"{option[0]} does not work with --image" in str(refused)
    refused = run("chat", str(vlm / "run"), "--image", scene_file, "--system", "be kind")[2]
    assert isinstance(refused, UsageError)


def test_a_folder_whose_images_are_made_otherwise_than_its_model_reads_them_is_refused(tmp_path: Path):
    saved = quest.save(build("vit-tiny"), tmp_path / "model", preprocess=ImageProcessor(24))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="makes images of 24 pixels with 3 channels, the model reads 16 with 3"):
        classify_image(str(saved), tmp_path / "a.png")


def test_an_exported_classifier_and_an_exported_model_that_sees_say_what_their_runs_say(
    vit: Path, vlm: Path, tmp_path: Path
):
    assert run("export", str(vit / "run"), str(tmp_path / "vit"))[0] == 0
    image = vit / "images" / "below" / "0.png"
    assert classify_image(str(tmp_path / "vit"), image) == classify_image(str(vit / "run"), image)
    assert run("export", str(vlm / "run"), str(tmp_path / "vlm"))[0] == 0
    asked = ("-p", "describe:", "--image", str(vlm / "scene.png"), "-n", "4", "-q", "--temperature", "0", "--json")
    answers = [json.loads(run("generate", str(folder), *asked)[1]) for folder in (vlm / "run", tmp_path / "vlm")]
    assert answers[0]["tokens"] == answers[1]["tokens"]


def test_an_image_is_classified_whatever_its_name_ends_in(vit: Path, tmp_path: Path):
    for name in ("photo.JFIF", "photo"):
        Image.open(vit / "images" / "below" / "0.png").save(tmp_path / name, "PNG")
        code, out, _ = run("classify", str(vit / "run"), str(tmp_path / name), "--json")
        assert (code, json.loads(out)["label"]) == (0, "below")
    refused = run("classify", str(vit / "run"), "a text")[2]
    assert isinstance(refused, UsageError)
    assert "classifies images, and 'a text' is no image file" in str(refused)


def test_classes_of_one_name_are_told_apart_by_their_number():
    assert unique_names(("crane", "dog", "crane")) == ("crane (0)", "dog", "crane (2)")
