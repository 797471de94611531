"""A resumed run is refused where something that decides its numbers is not what it was, and can accept it by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quest.errors import BusyError
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.run_folder import fingerprint_path, iter_loaded, run_identity
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from tests.recipes.tuned import COMMON, base, written

ROWS = [
    {"messages": [{"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": f"{n} {n + 1}"}]}
    for n in range(40)
]
SFT = """
recipe: sft
batch_size: 4
sequence_length: 40
max_steps: 4
save_steps: 2
"""


def train(out: Path, *pairs: str, text: str = SFT, accept: tuple[str, ...] = ()):
    settings = apply_overrides(read_yaml(text + COMMON, "recipe.yaml"), list(pairs))
    recipe = get_recipe("sft")
    config = parse_config(recipe.Config, settings)
    return run_recipe(recipe, config, settings, out, quiet=True, accept=accept, log=lambda line: None)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[str], Path]:
    """A finished run of four steps without its last checkpoint, its settings, and the model it began from."""
    model, out = base(tmp_path / "model"), tmp_path / "run"
    pairs = [f"model.load={model}", f"data.source={written(tmp_path / 'rows.jsonl', ROWS)}"]
    train(out, *pairs)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    return out, pairs, model


def change_weights(model: Path) -> None:
    file = model / "model.safetensors"
    save_file({name: t + torch.rand_like(t) * 1e-3 for name, t in load_file(file).items()}, file)


def test_a_run_whose_base_model_changed_is_refused_and_accepts_it_by_name(run):
    out, pairs, model = run
    change_weights(model)
    with pytest.raises(BusyError, match=r"its model\.load differs(.|\n)*--accept model\.load"):
        train(out, *pairs)
    assert train(out, *pairs, accept=("model.load",)).step == 4
    assert "changed since the checkpoint: model.load" in (out / "events.jsonl").read_text()


def test_settings_that_were_edited_by_hand_are_named(run):
    out, pairs, _ = run
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("adam_epsilon: 1.0e-08", "adam_epsilon: 1.0e-06"))
    assert "1.0e-06" in config.read_text()
    with pytest.raises(
        BusyError, match=r"its settings \(adam_epsilon: 1e-08 -> 1e-06\) differs(.|\n)*--accept settings"
    ):
        train(out, *pairs, "adam_epsilon=1e-6")
    assert train(out, *pairs, "adam_epsilon=1e-6", accept=("settings",)).step == 4


def test_a_run_and_its_model_may_be_moved(run):
    out, pairs, model = run
    moved = model.with_name("moved")
    model.rename(moved)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(moved)))
    assert train(out, pairs[1], f"model.load={moved}").step == 4


def test_what_is_free_on_resume_is_free(run):
    out, pairs, _ = run
    assert train(out, *pairs, "save_steps=3", "logging_steps=1").step == 4


def test_every_load_of_a_config_is_found_and_fingerprints_see_any_training(tmp_path: Path, run):
    tree = {
        "model": {"load": "a"},
        "rewards": [{"name": "model", "load": "b"}],
        "x": {"y": {"load": None}},
        "load": "c",
    }
    assert dict(iter_loaded(tree)) == {"model.load": "a", "rewards.0.load": "b", "load": "c"}
    out, _, model = run
    before, of_run = fingerprint_path(model), fingerprint_path(out)
    assert before == fingerprint_path(model) != of_run
    change_weights(model)
    assert fingerprint_path(model) != before
    assert fingerprint_path(Path("some/hub-id")) == ""


def test_settings_hold_everything_but_what_is_free():
    config = parse_config(
        get_recipe("sft").Config, read_yaml(SFT + COMMON + "model: {load: nowhere}\ndata: {source: x}", "r")
    )
    settings = json.loads(run_identity(config)["settings"])
    assert {"learning_rate", "seed", "model.preset"} <= set(settings)
    assert not {"save_steps", "max_steps", "threads", "model.load", "data.source"} & set(settings)
