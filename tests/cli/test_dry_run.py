"""What a run refuses by its settings alone, `--dry-run` refuses too, with every mistake in one round; and a model that
is chosen on the command line takes the place of the recipe's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from llm_quest.cli.train import DryRunResult, start_training
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import load_raw_config, nested_schema, recipe_names
from llm_quest.recipes.config_schema import ModelConfig
from llm_quest.recipes.recipe import get_recipe, load_recipe
from llm_quest.recipes.run_folder import remove_if_refused
from llm_quest.recipes.schema import StrictModel, describe_field, did_you_mean


def dry_run(recipe: str, *pairs: str) -> DryRunResult:
    checked = start_training(recipe, pairs, out=None, dry_run=True, log=lambda text: None)
    assert isinstance(checked, DryRunResult)
    return checked


@pytest.mark.parametrize(
    ("recipe", "pairs", "said"),
    [
        (
            "dpo",
            ["loss_type=dpo", "label_smoothing=0.1"],
            "label_smoothing 0.1 has no effect on loss_type=dpo; take loss_type=cdpo or robust",
        ),
        ("dpo", ["loss_type=cdpo"], "cdpo needs label_smoothing"),
        ("dpo", ["sync_ref_model=true", "parallel=fsdp"], "sync_ref_model keeps a whole copy"),
        (
            "dpo",
            ["sync_ref_model=true", "precompute_ref_log_probs=false"],
            "sync_ref_model makes a reference model of its own",
        ),
        ("grpo", ["num_generations=1"], "num_generations is 1"),
        ("grpo", ["overlong_buffer_tokens=8"], "overlong_buffer_tokens is 8: give fewer tokens than the budget"),
        ("grpo", ["dynamic_sampling_rounds=2", "keep_zero_std_groups=true"], "keep_zero_std_groups out"),
        ("grpo", ["loss_type=dapo", "keep_zero_std_groups=true"], "keep_zero_std_groups out"),
        ("grpo", ["task=revers"], "no task is called 'revers', did you mean 'reverse'?"),
        ("grpo", ["task=reverse:longst=3"], "the task reverse has no option longst"),
        ("grpo", ["task=gsm8k"], "a fresh model cannot be warmed up on GSM8K"),
        ("iterative", ["num_generations=1"], "num_generations is 1"),
        ("rpt", ["data.source=registers:longst=3"], "the task registers has no option longst"),
        ("rpt", ["num_generations=1"], "num_generations is 1"),
        ("pretrain", ["data.source=builtin:topcs"], "did you mean builtin:topics?"),
        ("pretrain", ["device=tpu"], "'tpu' is not text (auto, cpu, cuda, cuda:1, mps)"),
        ("pretrain", ["router_z_loss_coef=0.1"], "router_z_loss_coef has no effect"),
        ("pretrain", ["expert_bias_update_speed=0.1"], "expert_bias_update_speed has no effect"),
        ("pretrain", ["mtp_loss_weight=0.1"], "mtp_loss_weight has no effect"),
        ("pretrain", ["model.preset=llama3.2-tiny", "sequence_length=4096"], "longer than the model's context"),
        ("vit", ["data.image_size=9"], "digits are 8 pixels with 1 channels"),
        ("vit", ["data.image_std=[0.1, 0.1]"], "1 or 3 channels"),
        ("vit", ["model.patch_size=3"], "patch_size 3 must divide images of 8 pixels"),
        ("vit", ["model.preset=llama3.2-tiny"], "is no ViT"),
        ("vlm", ["vision_tower.patch_size=7"], "vision_tower.patch_size 7 must divide images of 48 pixels"),
        ("vlm", ["language_model.num_attention_heads=5"], "language_model.hidden_size 96 must be an even multiple"),
        (
            "grpo",
            ["model.config.num_attention_heads=5"],
            "num_attention_heads 5 must be a multiple of num_key_value_heads 4",
        ),
        ("rpt", ["model.config.hiden_size=5"], "did you mean 'hidden_size'?"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_by_its_settings(recipe: str, pairs: list[str], said: str):
    with pytest.raises(UsageError, match=re.escape(said)):
        dry_run(recipe, *pairs)


def test_what_is_right_passes():
    for recipe in sorted(set(recipe_names()) - {"rpt_control"}):
        assert dry_run(recipe).config.recipe in RECIPES
    dry_run("pretrain", "mtp_loss_weight=0.1", "techniques=[multi_token]")
    dry_run("dpo", "loss_type=cdpo", "label_smoothing=0.1")
    dry_run("grpo", "num_generations=1", "process_supervision=true", "task=chained", "max_new_tokens=30")


def keys_of(error: UsageError) -> list[str]:
    """The key of each problem."""
    return [found[1] for line in error.problems if (found := re.search(r"['\d]: ([a-z_.]+): ", line))]


def test_mistakes_in_sizes_are_told_with_all_the_others():
    with pytest.raises(UsageError) as error:
        dry_run(
            "quickstart", "learning_rate=0", "model.config.hiden_size=8", "model.config.num_hidden_layers=x",
            "model.config.num_attention_heads=5", "model.config.num_key_value_heads=2",
            "model.config.rotary={rope_thta: 1}",
        )  # fmt: skip
    keys = keys_of(error.value)
    assert sorted(keys) == [
        "learning_rate", "model.config.hidden_size", "model.config.hiden_size", "model.config.num_hidden_layers",
        "model.config.num_key_value_heads", "model.config.rotary",
    ]  # fmt: skip


def test_numbers_at_odds_are_told_with_numbers_that_are_missing():
    with pytest.raises(UsageError) as error:
        dry_run(
            "quickstart",
            "model={family: llama, config: {num_attention_heads: 4, num_key_value_heads: 3, head_dim: 7, "
            "num_hidden_layers: 0}}",
        )
    keys = [key.removeprefix("model.config.") for key in keys_of(error.value)]
    assert sorted(keys) == ["head_dim", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"]


def with_a_model() -> list[str]:
    def field(recipe: str) -> Any:
        return get_recipe(load_raw_config(recipe).tree["recipe"]).Config.model_fields.get("model")

    return [
        name for name in recipe_names() if (found := field(name)) and nested_schema(found.annotation) is ModelConfig
    ]


def test_there_are_recipes_that_build_models():
    assert {"pretrain", "quickstart", "tiny", "grpo", "iterative", "rpt"} <= set(with_a_model())


@pytest.mark.parametrize("recipe", with_a_model())
def test_a_model_chosen_on_the_command_line_takes_the_place_of_the_recipes(recipe: str):
    """preset, page and load work alone, and nothing of the recipe's own model is left."""
    length = [] if recipe in ("grpo", "iterative", "rpt") else ["sequence_length=32"]
    model = dry_run(recipe, "model.preset=gpt2-tiny", *length).config.model
    assert (model.preset, model.family, model.load, model.config) == ("gpt2-tiny", None, None, {})
    model = dry_run(recipe, "model.family=gpt2", *length).config.model
    assert (model.preset, model.family, model.load, model.config) == (None, "gpt2", None, {})
    _, config, _ = load_recipe(recipe, ["model.load=somewhere"])
    assert (config.model.preset, config.model.family, config.model.load, config.model.config) == (
        None, None, "somewhere", {},
    )  # fmt: skip
    assert not isinstance(part := getattr(config, "tokenizer", None), StrictModel) or part.load == "somewhere"


def test_what_was_given_beside_the_model_stays():
    config = dry_run(
        "quickstart", "model.preset=gpt2-tiny", "model.config.num_hidden_layers=3", "sequence_length=32"
    ).config
    assert config.model.config == {"num_hidden_layers": 3}
    assert dry_run("quickstart", "model.family=llama").config.model.config["hidden_size"] == 192
    with pytest.raises(UsageError, match="warmup has no effect on a model that is loaded"):
        load_recipe("grpo", ["model.load=somewhere", "warmup.max_steps=3"])
    with pytest.raises(UsageError, match="preset and family given"):
        load_recipe("quickstart", ["model.preset=gpt2-tiny", "model.family=gpt2"])


def every_field(schema: type[StrictModel]) -> list[Any]:
    found = []
    for field in schema.model_fields.values():
        found.append(field)
        inner = [part for one in (field.annotation, *get_args(field.annotation)) if (part := nested_schema(one))]
        found += [deeper for part in inner for deeper in every_field(part)]
    return found


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_no_words_of_pydantic_stand_in_what_a_key_takes(recipe: str):
    for field in every_field(get_recipe(recipe).Config):
        said = describe_field(field)
        assert not re.search(r"annotation|required=|metadata=|NoneType|<class|typing|Annotated|FieldInfo", said), said


def test_a_limit_inside_a_choice_is_told():
    with pytest.raises(UsageError, match=re.escape("-1 is not a number > 0 or null (largest gradient norm")):
        load_recipe("tiny", ["max_grad_norm=-1"])


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("nothere", None),
        ("nothing", None),
        ("pretrian", "pretrain"),
        ("gpro", "grpo"),
        ("tyni", "tiny"),
        ("rewrad", "reward"),
    ],
)
def test_a_name_is_suggested_where_it_is_near(word: str, meant: str | None):
    assert did_you_mean(word, recipe_names()) == (f", did you mean {meant!r}?" if meant else "")


def refuse(recipe: str, *pairs: str, out: Path) -> None:
    with pytest.raises((UsageError, DataError, MissingError)):
        start_training(recipe, pairs, out=out, quiet=True, log=lambda text: None)


@pytest.mark.parametrize(
    ("recipe", "pairs"),
    [
        ("sft", ["model.load=runs/nothere"]),
        ("grpo", ["model.load=nothere/nothere"]),
        ("grpo", ["task=nothere.jsonl", "model.load=somewhere"]),
        ("rpt", ["data.source=nothere.txt", "model.load=nothere/nothere"]),
        ("pretrain", ["data.source=nothere.txt", "max_steps=5", "warmup_steps=0"]),
    ],
)
def test_a_refused_run_leaves_no_folder(recipe: str, pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refuse(recipe, *pairs, out=tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    refuse("grpo", "model.load=nothere/nothere", out=tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


def test_what_was_learned_before_a_refusal_stays(tmp_path: Path):
    def refuse_late() -> None:
        with remove_if_refused(tmp_path / "run"):
            (tmp_path / "run" / "warmup" / "checkpoints" / "step-00000010").mkdir(parents=True)
            raise UsageError("too late")

    with pytest.raises(UsageError):
        refuse_late()
    assert (tmp_path / "run").is_dir()
