"""Every recipe takes its model from any of its alternatives, each given alone on the command line, and a run of any
length: what a recipe brings as a default gives way to what is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from llm_quest.cli.train import DryRunResult, start_training
from llm_quest.errors import UsageError
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.family import Family
from llm_quest.recipes.config import RECIPES_DIR, load_raw_config, recipe_names
from llm_quest.recipes.dependent_defaults import ALTERNATIVES
from llm_quest.recipes.recipe import load_recipe
from tests.recipes.tuned import base

IMAGE_FAMILIES = {"vit": "vit", "vlm": "vision_language"}
"""Recipes that read images -> their family."""
WITHOUT_A_MODEL = {"rpt_control": "its model is the one that rpt_run began with"}


def dry_config(recipe: str, *pairs: str) -> Any:
    checked = start_training(recipe, pairs, out=None, dry_run=True, log=lambda text: None)
    assert isinstance(checked, DryRunResult)
    return checked.config


def families_of(recipe: str) -> tuple[Family, ...]:
    image_family = IMAGE_FAMILIES.get(load_raw_config(recipe).tree["recipe"])
    return FAMILIES if image_family is None else tuple(one for one in VISION_FAMILIES if one.name == image_family)


RECIPES = [name for name in recipe_names() if load_raw_config(name).tree["recipe"] not in WITHOUT_A_MODEL]
TEXT_RECIPES = [name for name in RECIPES if load_raw_config(name).tree["recipe"] not in IMAGE_FAMILIES]
FAMILY_SHARE, PRESET_SHARE = 3, 12


def presets_of(family: Family) -> list[str]:
    return [f"preset={preset.name}" for preset in family.presets]


def forms_of(recipe: str) -> list[str]:
    """Of a recipe that reads texts a part of the families and presets: the next recipe has the next part."""
    families = [f"family={family.name}" for family in families_of(recipe)]
    presets = [form for family in families_of(recipe) for form in presets_of(family)]
    if recipe not in TEXT_RECIPES:
        return families + presets
    number = TEXT_RECIPES.index(recipe)
    return families[number % FAMILY_SHARE :: FAMILY_SHARE] + presets[number % PRESET_SHARE :: PRESET_SHARE]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_family_or_a_preset_alone_is_the_model(recipe: str):
    """A family without sizes has those of its -tiny preset; a recipe's own rows are as long as the model can see."""
    for form in forms_of(recipe):
        name, _, value = form.partition("=")
        if name == "preset" and recipe in ("vit", "cifar10") and not value.endswith("-tiny"):
            continue  # a published size in patches of 16 pixels, of images of 8 or 32
        config = dry_config(recipe, f"model.{form}")
        assert {key: getattr(config.model, key) for key in ALTERNATIVES} == {
            **dict.fromkeys(ALTERNATIVES), name: value
        }, form  # fmt: skip


def test_every_family_and_preset_is_the_model_of_some_recipe():
    tried = {form for recipe in TEXT_RECIPES for form in forms_of(recipe)}
    assert tried == {form for family in FAMILIES for form in (f"family={family.name}", *presets_of(family))}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_folder_alone_is_the_model(recipe: str, tmp_path: Path):
    folder = base(tmp_path / "model")
    config = dry_config(recipe, f"model.load={folder}")
    assert {key: getattr(config.model, key) for key in ALTERNATIVES} == {
        **dict.fromkeys(ALTERNATIVES), "load": str(folder)
    }  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_given_models_are_refused(recipe: str):
    family = families_of(recipe)[0]
    with pytest.raises(UsageError, match=re.escape("family and load given")):
        dry_config(recipe, f"model.family={family.name}", "model.load=somewhere")


@pytest.mark.parametrize("recipe", sorted({*recipe_names()} - {"rpt_control"}))
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_recipe_runs_for_a_few_steps(recipe: str, steps: int):
    config = dry_config(recipe, f"max_steps={steps}")
    assert config.max_steps == steps
    assert config.warmup_steps <= -(-steps // 5)


def commands_in_comments() -> list[tuple[str, ...]]:
    """`quest train NAME ...` in the head of a recipe's file, perhaps over two lines."""
    found = []
    for name in recipe_names():
        head = " ".join(
            line.lstrip("# ").rstrip()
            for line in (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        )
        for match in re.finditer(r"quest train (\w+)((?: [\w.]+=(?:'[^']*'|\"[^\"]*\"|[^\s,;)]+))+)", head):
            found.append((match[1], *shlex.split(match[2])))
    return found


@pytest.mark.parametrize("command", commands_in_comments(), ids=" ".join)
def test_the_command_in_the_head_of_a_recipe_passes(command: tuple[str, ...], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any(pair.startswith("model.load=") for pair in command):
        base(tmp_path / "FOLDER")
    dry_config(*command)


def test_there_are_commands_in_the_heads_of_recipes():
    assert {name for name, *_ in commands_in_comments()} >= {"pretrain", "sft", "dpo", "grpo", "rpt", "classify", "vit"}


def test_a_warm_up_that_is_given_stays_and_one_too_long_is_refused():
    assert dry_config("pretrain", "max_steps=20").warmup_steps == 1
    assert dry_config("pretrain", "max_steps=5000").warmup_steps == 50
    assert dry_config("pretrain", "max_steps=20", "warmup_steps=15").warmup_steps == 15
    arguments = "argument 'warmup_steps=30' and argument 'max_steps=20': warmup_steps 30 is more than max_steps 20"
    with pytest.raises(UsageError, match=arguments):
        dry_config("pretrain", "max_steps=20", "warmup_steps=30")


def test_a_file_of_ones_own_has_a_warm_up_that_fits(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: pretrain\nmodel: {family: llama}\nmax_steps: 10\n")
    assert load_recipe(str(file), ())[1].warmup_steps == 1
    file.write_text(file.read_text() + "warmup_steps: 8\n")
    assert load_recipe(str(file), ())[1].warmup_steps == 8
    assert load_recipe(str(file), ["max_steps=5"])[1].warmup_steps == 4


def test_a_length_that_is_asked_for_does_not_give_way(tmp_path: Path):
    assert dry_config("pretrain", "model.preset=gpt2-tiny").sequence_length == 64
    with pytest.raises(UsageError, match="sequence_length 256 is longer than the model's context of 64"):
        dry_config("pretrain", "model.preset=gpt2-tiny", "sequence_length=256")
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: pretrain\nmodel: {preset: gpt2-tiny}\nsequence_length: 256\n")
    with pytest.raises(UsageError, match="longer than the model's context"):
        dry_config(str(file))


def test_the_size_of_a_presets_head_follows_from_its_width():
    """llama3.2-1b: 2048 / 32 = 64; with 1024, 32. Qwen3 0.6B sets 128 beside 1024 / 16: it stays."""
    from llm_quest.recipes.pretrain import resolve_model_config

    def head_dim(*pairs: str) -> int:
        _, config, settings = load_recipe("pretrain", pairs)
        return int(resolve_model_config(config, settings).head_dim)

    assert head_dim("model.preset=llama3.2-1b", "model.config.hidden_size=1024") == 32
    assert head_dim("model.preset=llama3.2-1b", "model.config.hidden_size=1024", "model.config.head_dim=64") == 64
    assert head_dim("model.preset=qwen3-0.6b", "model.config.hidden_size=512") == 128


def test_a_width_whose_export_transformers_refuses_is_refused_before_the_training():
    pairs = ["model.config.hidden_size=256", "model.config.num_attention_heads=6"]
    with pytest.raises(UsageError, match="multiple of num_attention_heads 6, or transformers refuses the export"):
        load_recipe("pretrain", pairs)
    assert load_recipe("pretrain", [*pairs[:1], "model.config.num_attention_heads=8"])
    assert load_recipe("pretrain", ["model.preset=qwen3-tiny", *pairs, "model.config.num_key_value_heads=2"])


def test_rotary_positions_of_a_fresh_model_may_have_every_scaling_that_is_read():
    """What `read_scaling` reads is a key of the config; a table of its own once lacked LongRoPE's factors."""
    from llm_quest.recipes.pretrain import resolve_model_config

    factors = "[1, 1, 2, 2, 3, 3, 4, 4]"
    rotary = f"{{rope_type: longrope, factor: 4, short_factor: {factors}, long_factor: {factors}}}"
    pairs = ["model.preset=llama3.2-tiny", "model.config.head_dim=16", f"model.config.rotary={rotary}"]
    _, config, settings = load_recipe("pretrain", pairs)
    assert resolve_model_config(config, settings).rotary.scaling.long_factor == (1, 1, 2, 2, 3, 3, 4, 4)
    with pytest.raises(UsageError, match="did you mean 'short_factor'"):
        load_recipe("pretrain", [*pairs[:2], f"model.config.rotary={rotary.replace('short_f', 'shor_f')}"])


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "grpo"])
def test_a_model_of_images_is_refused_where_text_is_read(recipe: str):
    with pytest.raises(UsageError, match="vit reads images: quest train vit trains it"):
        dry_config(recipe, "model.preset=vit-tiny")


def test_a_tokenizer_beside_a_model_that_brings_its_own_is_refused(tmp_path: Path):
    folder = base(tmp_path / "model")
    with pytest.raises(UsageError, match="tokenizer has no effect on a model that is loaded"):
        start_training(
            "sft", [f"model.load={folder}", "tokenizer.vocab_size=300"], out=tmp_path / "run", log=lambda text: None
        )
