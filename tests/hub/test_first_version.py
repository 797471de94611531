"""Folders that the first version wrote (tests/data/v1, made as its README says) still load, generate and export: runs
of every family and of techniques, saved models, PEFT adapters, models that see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_quest as quest
from llm_quest.cli.export import export_run
from llm_quest.hub.load_tokenizer import load_preprocess

V1 = Path(__file__).parents[1] / "data" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
NEAR = {"atol": 1e-4, "rtol": 1e-4}
ADAPTED = ("lora", "dora", "lora-xs", "tiny-lora")
PLAIN_RUNS = [
    name
    for name in (*EXPECTED["texts"], *EXPECTED["scores"])
    if name.startswith("runs/") and name.removeprefix("runs/") not in (*ADAPTED, "vlm")
]


def require_greedy(model: Any, expected: dict[str, Any]) -> None:
    """The model writes the tokens that the first version wrote, with their log-probabilities, and finds a fixed row as
    likely."""
    prompts, length = expected["prompts"], len(expected["tokens"][0])
    made = quest.generate(model, prompts, max_new_tokens=length, temperature=0.0, eos_token_id=())
    assert [one.tokens for one in made] == expected["tokens"]
    for one, logprobs in zip(made, expected["logprobs"], strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(logprobs), **NEAR)
    row = torch.tensor(expected["read"]["tokens"])
    with torch.no_grad():
        read = model(row[None, :-1]).log_softmax(-1)[0].gather(-1, row[1:, None])[:, 0]
    torch.testing.assert_close(read, torch.tensor(expected["read"]["logprobs"]), **NEAR)


def require_scores(model: Any, expected: dict[str, Any]) -> None:
    with torch.no_grad():
        scores = model(torch.tensor(expected["tokens"]))
    torch.testing.assert_close(scores, torch.tensor(expected["scores"]), **NEAR)


def require_images(model: Any, expected: dict[str, Any], *, language: bool) -> None:
    """The first numbers of a classifier's logits, or of what a vision-language model makes of images."""
    shape = expected["shape"]
    images = torch.linspace(-1, 1, torch.Size(shape).numel()).sin().view(shape)
    with torch.no_grad():
        seen = model.get_image_features(images) if language else model(images)
    torch.testing.assert_close(seen.flatten()[: len(expected["numbers"])], torch.tensor(expected["numbers"]), **NEAR)


def test_every_folder_of_the_first_version_has_its_expected_numbers():
    folders = {f"{kind}/{one.name}" for kind in ("runs", "saved", "adapters") for one in (V1 / kind).iterdir()}
    assert folders == {name for kind in ("texts", "scores", "images", "adapters") for name in EXPECTED[kind]}
    assert sum(file.stat().st_size for file in V1.rglob("*") if file.is_file()) < 2_000_000


@pytest.mark.parametrize("name", EXPECTED["texts"])
def test_a_model_of_the_first_version_writes_the_same_now_and_saved_again(name: str, tmp_path: Path):
    model = quest.load(V1 / name)
    require_greedy(model, EXPECTED["texts"][name])
    quest.save(model, tmp_path / "again")
    require_greedy(quest.load(tmp_path / "again"), EXPECTED["texts"][name])


@pytest.mark.parametrize("name", EXPECTED["scores"])
def test_a_classifier_of_the_first_version_gives_the_same_scores_now_and_saved_again(name: str, tmp_path: Path):
    model = quest.load(V1 / name)
    require_scores(model, EXPECTED["scores"][name])
    quest.save(model, tmp_path / "again")
    require_scores(quest.load(tmp_path / "again"), EXPECTED["scores"][name])


@pytest.mark.parametrize("name", EXPECTED["images"])
def test_a_model_that_sees_gives_the_same_numbers_now_and_saved_again(name: str, tmp_path: Path):
    model, language = quest.load(V1 / name), name in EXPECTED["texts"]
    require_images(model, EXPECTED["images"][name], language=language)
    quest.save(model, tmp_path / "again", preprocess=load_preprocess(V1 / name))
    require_images(quest.load(tmp_path / "again"), EXPECTED["images"][name], language=language)


@pytest.mark.parametrize("name", EXPECTED["adapters"])
def test_an_adapter_of_the_first_version_lies_on_the_model_it_was_made_for(name: str, tmp_path: Path):
    model = quest.load_adapter(quest.load(V1 / "runs" / "pretrain"), V1 / name).eval()
    require_greedy(model, EXPECTED["adapters"][name])
    quest.save_adapter(model, tmp_path / "again")
    require_greedy(quest.load_adapter(quest.load(V1 / "runs" / "pretrain"), tmp_path / "again").eval(),
                   EXPECTED["adapters"][name])  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_RUNS)
def test_a_run_of_the_first_version_is_exported_with_its_tokenizer(name: str, tmp_path: Path):
    export_run(V1 / name, tmp_path / "folder")
    model = quest.load(tmp_path / "folder")
    if name in EXPECTED["scores"]:
        require_scores(model, EXPECTED["scores"][name])
    else:
        require_greedy(model, EXPECTED["texts"][name])
    assert quest.Tokenizer.load(tmp_path / "folder").hash == quest.Tokenizer.load(V1 / name / "tokenizer").hash


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapted_run_of_the_first_version_is_exported_merged(name: str, tmp_path: Path):
    export_run(V1 / "runs" / name, tmp_path / "merged", merged=True)
    require_greedy(quest.load(tmp_path / "merged"), EXPECTED["texts"][f"runs/{name}"])


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapted_run_of_the_first_version_is_exported_as_an_adapter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(V1)  # its config.yaml says where the model underneath is: runs/pretrain
    export_run(Path("runs") / name, tmp_path / "adapter", adapter=True)
    monkeypatch.chdir(tmp_path)
    require_greedy(quest.load(tmp_path / "adapter"), EXPECTED["texts"][f"runs/{name}"])


def test_the_first_versions_tokenizer_reads_as_it_did():
    tokenizer = quest.Tokenizer.load(V1 / "runs" / "pretrain" / "tokenizer")
    for text, tokens in EXPECTED["encoded"].items():
        assert list(tokenizer.encode(text)) == tokens
        assert tokenizer.decode(tokens) == text
