"""The key `techniques` of a recipe: checked with the config, applied, saved, resumed to the bit, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_quest as quest
from llm_quest.cli.export import export_run
from llm_quest.cli.serve import adapter_folder
from llm_quest.errors import UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import config_to_yaml, parse_config
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.finetuning import apply_config_techniques
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.techniques.activation_checkpointing import CheckpointedForward
from llm_quest.techniques.adapter_merge import disable_adapter
from llm_quest.techniques.lora import LoRA, adapter_addresses
from tests.oracles import transformers
from tests.recipes.test_config import GOOD, config_problems
from tests.recipes.test_pretrain import CtrlC, rows, run, weights


def parse_pairs(*pairs: str) -> PretrainConfig:
    return parse_config(PretrainConfig, apply_overrides(read_yaml(GOOD, "my.yaml"), pairs))


def test_names_and_options_are_understood_and_written_out_whole() -> None:
    config = parse_pairs("techniques=[lora, {name: dora, rank: 2, targets: [q, v]}, checkpointing]")
    assert [entry["name"] for entry in config.techniques] == ["lora", "dora", "checkpointing"]
    assert config.techniques[0] == {
        "name": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ("all",), "seed": 0,
        "modules_to_save": (),
    }  # fmt: skip
    assert config.techniques[1]["targets"] == ("q", "v")
    again = parse_config(PretrainConfig, read_yaml(config_to_yaml(config), "written.yaml"))
    assert config_to_yaml(again) == config_to_yaml(config)


def test_gradient_checkpointing_is_the_last_technique_of_every_recipe() -> None:
    config = parse_pairs("techniques=[lora]", "gradient_checkpointing=true")
    assert [entry["name"] for entry in config.all_techniques] == ["lora", "checkpointing"]
    model = quest.build("llama3.2-tiny", seed=0)
    apply_config_techniques(config, model, lambda text: None)
    assert all(isinstance(block.forward, CheckpointedForward) for block in model.blocks)
    assert all(issubclass(get_recipe(name).Config, RunConfig) for name in RECIPES)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("techniques=[lroa]", "no technique is called 'lroa', did you mean 'lora'?; known: lora, rslora"),
        ("techniques=[{rank: 8}]", "is no technique: write its name, or {name: lora, rank: 8}"),
        ("techniques=[{name: lora, rnak: 8}]", "lora has no option 'rnak', did you mean 'rank'?; it has rank, alpha"),
        ("techniques=[{name: lora, rank: many}]", "lora: rank: 'many' is not a whole number"),
        ("techniques=[{name: lora, targets: 3}]", "lora: targets: 3 is not a list (text)"),
        ("techniques=lora", "'lora' is not a list"),
    ],
)
def test_a_wrong_technique_is_told_with_its_place_and_what_is_allowed(pair: str, said: str) -> None:
    lines = config_problems(GOOD, pair)
    assert any(f"argument {pair!r}: techniques" in line and said in line for line in lines), lines


def test_the_largest_logit_and_the_number_loss_are_logged_and_streams_resume(text: Path, tmp_path: Path) -> None:
    pairs = (
        "techniques=[qk_clip, {name: hyper_connections, streams: 2}, multi_token]",
        "number_token_loss={weight: 0.5}",
    )
    lines: list[str] = []
    for file in text.iterdir():
        file.write_text(f"{file.read_text(encoding='utf-8')} 12 7 305 4 " * 3, encoding="utf-8")
    run(text, tmp_path / "whole", *pairs, log=lines.append)
    assert [line.split(";")[0] for line in lines if line.startswith("technique")] == [
        "technique: qk_clip", "technique: hyper_connections", "technique: multi_token",
    ]  # fmt: skip
    for row in rows(tmp_path / "whole"):
        assert row["max_logit"] > 0
        assert row["lookahead_1"] > 0
    counted = [row["number_token"] for row in rows(tmp_path / "whole") if "number_token" in row]
    assert len(counted) > 1, "steps whose rows have numbers"
    assert min(counted) > 0
    run(text, tmp_path / "cut", *pairs, callbacks=(CtrlC(4),))
    run(text, tmp_path / "cut", *pairs)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    model = quest.load(tmp_path / "whole")
    assert [type(technique).__name__ for technique in model.spec.techniques] == [
        "HyperConnections",
        "MultiTokenPrediction",
    ]


def test_the_line_of_a_file_is_named() -> None:
    assert config_problems(GOOD + "techniques:\n  - lora\n  - name: dora\n    rnk: 2\n")[0].startswith(
        "my.yaml:6: techniques.1: dora"
    )


def train_lora(text: Path, out: Path, *pairs: str, **more: Any) -> Any:
    return run(text, out, "techniques=[{name: lora, rank: 2, targets: [q, v]}]", "optim=adamw", *pairs, **more)


def test_lora_trains_its_own_numbers_alone_and_says_what_it_matched(text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train_lora(text, tmp_path / "run", log=said.append)
    model = quest.load(tmp_path / "run")
    assert model.spec.techniques == (LoRA(rank=2, targets=("q", "v")),)
    assert any("technique: lora of q, v in 2 layers (4 matrices)" in line and "are trained" in line for line in said), (
        said
    )
    tokens = torch.arange(20)[None]
    with disable_adapter(model):
        before = model(tokens)
    assert (model(tokens) - before).abs().max() > 1e-3
    assert all(p.requires_grad == (".edits." in name) for name, p in model.named_parameters())


def test_an_interrupted_run_with_an_adapter_ends_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    train_lora(text, tmp_path / "straight")
    assert train_lora(text, tmp_path / "twice", callbacks=(CtrlC(4),)).status == "interrupted"
    assert train_lora(text, tmp_path / "twice").step == 8
    assert weights(tmp_path / "twice") == weights(tmp_path / "straight")


def test_qlora_trains_an_adapter_on_quantized_weights_resumes_to_the_bit_and_exports_the_adapter(
    text: Path, tmp_path: Path
) -> None:
    pairs = ("techniques=[{name: quantize, format: nf4}, {name: lora, rank: 2}]", "optim=adamw")
    run(text, tmp_path / "straight", *pairs)
    assert run(text, tmp_path / "twice", *pairs, callbacks=(CtrlC(4),)).status == "interrupted"
    run(text, tmp_path / "twice", *pairs)
    assert weights(tmp_path / "twice") == weights(tmp_path / "straight")
    model = quest.load(tmp_path / "straight")
    assert all(p.requires_grad == (".edit" in name) for name, p in model.named_parameters())
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(".q")} == {torch.int8}
    with pytest.raises(UsageError, match="base is quantized"):
        export_run(tmp_path / "straight", tmp_path / "whole", merged=True)
    export_run(tmp_path / "straight", tmp_path / "adapter", adapter=True)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_run_with_an_adapter_is_exported_whole_or_alone(text: Path, tmp_path: Path) -> None:
    train_lora(text, tmp_path / "run", "max_steps=4")
    model, tokens = quest.load(tmp_path / "run"), torch.arange(20)[None]
    with pytest.raises(UsageError, match=r"--merge writes the whole model .* --adapter the adapter alone"):
        export_run(tmp_path / "run", tmp_path / "undecided")
    whole = export_run(tmp_path / "run", tmp_path / "whole", merged=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(merged(tokens).logits, model(tokens), rtol=1e-4, atol=2e-5)
    assert whole.parameters == merged.num_parameters()
    export_run(tmp_path / "run", tmp_path / "adapter", adapter=True)
    started = quest.load_adapter(without_adapters(model), tmp_path / "adapter")
    torch.testing.assert_close(started(tokens), model(tokens))
    for served in ("run", "run@last", "adapter"):  # quest serve FOLDER --adapter NAME=...
        with adapter_folder(str(tmp_path / served)) as folder:
            torch.testing.assert_close(quest.load_adapter(without_adapters(model), folder)(tokens), model(tokens))
    run(text, tmp_path / "plain", "max_steps=2")
    with pytest.raises(UsageError, match=r"plain: this model has no adapter"), adapter_folder(str(tmp_path / "plain")):
        pass
    with pytest.raises(UsageError, match="give one of them"):
        export_run(tmp_path / "run", tmp_path / "both", merged=True, adapter=True)


def without_adapters(model: Any) -> Any:
    """The model that was adapted."""
    plain = quest.build(model.config)
    held = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if ".edits." not in name}
    plain.load_state_dict(held)
    return plain


def test_training_goes_on_from_an_adapted_run_and_adapts_it_no_second_time(text: Path, tmp_path: Path) -> None:
    train_lora(text, tmp_path / "first", "max_steps=2")
    on = ["model={load: " + str(tmp_path / "first") + "}", f"tokenizer.load={tmp_path / 'first'}", "max_steps=2"]
    run(text, tmp_path / "second", *on)
    assert adapter_addresses(quest.load(tmp_path / "second")) == adapter_addresses(quest.load(tmp_path / "first"))
    with pytest.raises(UsageError, match=r"technique lora: this model has an adapter already"):
        train_lora(text, tmp_path / "third", *on)


def test_transformers_refuses_a_folder_whose_published_part_is_not_the_model(tmp_path: Path) -> None:
    model = LoRA(rank=2)(quest.build("llama3.2-tiny"))
    folder = quest.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="model type `llm_quest`"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {"model_type", "architectures", "dtype", "llm_quest"}
    assert "quest.load" in (folder / "README.md").read_text()
