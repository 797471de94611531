"""What is wrong with a folder is told in at most four lines, on the terminal, as JSON and in Python; `quest inspect`
lists all of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llm_quest.cli.main import app
from llm_quest.cli.output import run_with_exit_code
from llm_quest.errors import LONGEST_LINE, MAX_MESSAGE_LINES, DataError
from llm_quest.hub.inspect import inspect_folder
from tests.recipes.tuned import base

Edit = Callable[[Path], None]


def json_edit(name: str, **changes: Any) -> Edit:
    """Fields of a JSON file changed, or (None) dropped."""

    def edit(folder: Path) -> None:
        file = folder / name
        content = (json.loads(file.read_text()) if file.exists() else {}) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def write_broken(name: str) -> Edit:
    """A file that is no JSON."""

    def edit(folder: Path) -> None:
        (folder / name).write_text("[\n")

    return edit


def lose_shards(folder: Path) -> None:
    """An index that names thirty files, none of which is there."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = {f"t{number}": f"model-{number:05}.safetensors" for number in range(30)}
    json_edit("model.safetensors.index.json", weight_map=files)(folder)


def weights_edit(change: Callable[[dict[str, torch.Tensor]], Mapping[str, Any]]) -> Edit:
    """Tensors replaced, added or (None) dropped."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        held = safetensors.torch.load_file(file)
        held = {name: tensor for name, tensor in (held | change(held)).items() if tensor is not None}
        safetensors.torch.save_file(held, file, metadata={"format": "pt"})

    return edit


LAYER = "model.layers.0."
WEIGHT_FAULTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "a tensor is missing": (weights_edit(lambda held: {LAYER + "mlp.up_proj.weight": None}), ("mlp.up_proj.weight",)),
    "a tensor too many": (weights_edit(lambda held: {LAYER + "surprise": torch.ones(2)}), ("surprise",)),
    "a tensor is turned": (
        weights_edit(
            lambda held: {LAYER + "mlp.down_proj.weight": held[LAYER + "mlp.down_proj.weight"].T.contiguous()}
        ),
        ("mlp.down_proj.weight", "config.json"),
    ),
    "a tensor of whole numbers": (
        weights_edit(lambda held: {LAYER + "self_attn.q_proj.weight": torch.ones(16, 16, dtype=torch.int8)}),
        ("I8",),
    ),
    "forty tensors too many": (
        weights_edit(
            lambda held: {f"{word}.odd{number}": torch.ones(number) for number in range(1, 21) for word in "ab"}
        ),
        ("a.odd1",),
    ),
}
CONFIG_FAULTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no width": (json_edit("config.json", hidden_size=None), ("config.json", "hidden_size")),
    "no vocabulary": (json_edit("config.json", vocab_size=None), ("config.json", "vocab_size")),
    "text for a width": (json_edit("config.json", intermediate_size="x" * 5000), ("config.json", "intermediate_size")),
    "odd activation": (json_edit("config.json", hidden_act="gelu"), ("config.json", "hidden_act")),
    "an end of another kind": (
        json_edit("generation_config.json", eos_token_id={"a": 1}),
        ("generation_config", "eos_token_id"),
    ),
    "no number of layers": (json_edit("config.json", num_hidden_layers=None), ("config.json", "num_hidden_layers")),
    "an unknown field": (json_edit("config.json", use_secret_attention=True), ("config.json", "use_secret_attention")),
    "an unknown scaling": (
        json_edit("config.json", rope_scaling={"rope_type": "spiral", "rope_theta": 1e4}),
        ("config.json", "spiral"),
    ),
    "heads that do not divide": (json_edit("config.json", num_key_value_heads=3), ("config.json", "3 key/value")),
    "an unknown family": (json_edit("config.json", model_type="lama\n" * 30), ("config.json", "model_type")),
    "temperature is text": (
        json_edit("generation_config.json", temperature="hot"),
        ("generation_config", "temperature"),
    ),
}
FILE_FAULTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "weights cut short": (lambda folder: os.truncate(folder / "model.safetensors", 5000), ("model.safetensors",)),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors",)),
    "a config that is no JSON": (write_broken("config.json"), ("config.json",)),
    "thirty shards that are missing": (lose_shards, ("model-00000.safetensors",)),
    "a tokenizer that is no JSON": (write_broken("tokenizer.json"), ("tokenizer.json",)),
}
FAULTS = WEIGHT_FAULTS | CONFIG_FAULTS | FILE_FAULTS
NUMBERS = {"not finite": (weights_edit(lambda held: {n: t * float("nan") for n, t in held.items()}), ("norm.weight",))}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    base(folder, num_hidden_layers=2)
    return folder


def damage(good: Path, folder: Path, names: list[str]) -> Path:
    """A copy with those faults, weights first: afterwards they may be gone."""
    shutil.copytree(good, folder)
    for name in sorted(names, key=list(FAULTS).index):
        FAULTS[name][0](folder)
    return folder


def terminal_message(
    arguments: list[str], patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], list[str]]:
    """The lines of a command that fails, and the problems of its JSON; both forms say the same."""
    told = []
    for options in ([], ["--json"]):
        patch.setattr(sys, "argv", ["quest", *arguments, *options])
        capsys.readouterr()
        assert run_with_exit_code(lambda: app(prog_name="quest")) == DataError.exit_code
        told.append(capsys.readouterr())
    lines, as_json = told[0].err.splitlines(), json.loads(told[1].out)["error"]
    assert "\n".join(lines) == as_json["message"]
    assert 1 <= len(lines) <= 4, told[0].err
    assert max(map(len, lines)) <= LONGEST_LINE + len("quest: "), told[0].err
    return lines, as_json["problems"]


def check_folder(
    folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str = ""
) -> list[str]:
    """What loading found; `quest inspect` lists all of it, whole, and the message says so where it has no room."""
    lines, problems = terminal_message(["generate", str(folder), "-p", "x"], patch, capsys)
    listed = "\n".join(inspect_folder(folder, check_weights=bool(option)).problems)
    head, *others = problems
    assert head.removeprefix(f"{folder} cannot be loaded: ") in listed
    for one in others:
        assert one.removeprefix("- ") in listed
    if len(lines) < len(problems):
        assert lines[-1].endswith(f"... and {len(problems) - 3} more; quest inspect{option} {folder} lists all")
    return problems


@pytest.mark.parametrize("name", [*FAULTS, *NUMBERS])
def test_one_fault_is_told_with_its_file_and_field(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (edit, words) = damage(model_folder, tmp_path / "m", []), (FAULTS | NUMBERS)[name]
    edit(folder)
    found = check_folder(folder, monkeypatch, capsys, " --weights" if name in NUMBERS else "")
    assert all(word in "\n".join(found) for word in words), found


def test_two_to_eight_faults_are_told_in_four_lines(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, longest = random.Random(0), 0
    for number in range(12):
        readable = [*WEIGHT_FAULTS, *CONFIG_FAULTS] if number % 2 else list(FAULTS)
        names = generator.sample(readable, 2 + number % 7)
        folder = damage(model_folder, tmp_path / f"m{number}", names)
        longest = max(longest, len(check_folder(folder, monkeypatch, capsys)))
    assert longest > MAX_MESSAGE_LINES, "some folders have more problems than a message shows"


def test_numbers_are_looked_at_whatever_else_is_wrong_with_the_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = damage(model_folder, tmp_path / "m", [])
    NUMBERS["not finite"][0](folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    found = inspect_folder(folder, check_weights=True).problems
    assert any(one.startswith("missing: model.embed_tokens.weight") for one in found)
    assert sum(one.startswith("not finite: ") for one in found) == len(weights)
    json_edit("config.json", rms_norm_eps="x")(folder)
    assert sum(one.startswith("not finite: ") for one in inspect_folder(folder, check_weights=True).problems) > 0
