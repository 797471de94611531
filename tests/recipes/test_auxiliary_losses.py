"""Every page trains through the recipe; experts are balanced and lookahead modules learn, by settings that have
effect."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_quest.data.packing import HeldOutLoader
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import UsageError
from llm_quest.eval.evaluators import language_model_loss
from llm_quest.models import FAMILIES
from llm_quest.models.build import build
from llm_quest.recipes.auxiliary_losses import AuxiliaryLosses
from llm_quest.recipes.config import config_to_yaml, parse_config
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.yaml_io import read_yaml
from llm_quest.techniques.expert_bias import bias_routers
from tests.recipes.test_pretrain import BASE, CtrlC, rows, run, weights
from tests.recipes.two import by_two

TINY = [preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny")]
QUICK = ("eval_steps=0", "eval_baselines=false", "samples.every_steps=0", "save_steps=0")
NONE = AuxiliaryLosses(None, None, 0.0, None, None)


@pytest.mark.parametrize("name", TINY)
def test_every_page_trains_through_the_recipe_and_its_experts_tell_how_even_they_are(
    text: Path, tmp_path: Path, name: str
):
    outcome = run(text, tmp_path / "run", f"model.preset={name}", "max_steps=3", *QUICK)
    assert outcome.status == "finished"
    history = rows(tmp_path / "run")
    assert history[-1]["loss"] < history[0]["loss"]
    assert "warning" not in (tmp_path / "run" / "events.jsonl").read_text(), "the first loss is about ln V"
    experts = build(name).config
    if {"n_routed_experts", "num_local_experts", "num_experts", "moe"} & {
        key for key, value in vars(experts).items() if value
    }:
        assert history[-1]["max_violation"] > 0
        assert 0 < history[-1]["routing_entropy"] <= math.log(8)
    else:
        assert "max_violation" not in history[-1]


def test_defaults_are_what_the_models_own_parts_are_trained_with():
    assert NONE.resolve(build("llama3.2-tiny")) == NONE
    by_softmax = NONE.resolve(build("mixtral-tiny"))
    assert by_softmax == AuxiliaryLosses(0.001, 0.0, 0.0, None, None)
    by_bias = NONE.resolve(build("mimo-tiny"))
    assert by_bias == AuxiliaryLosses(0.0, 0.0001, 0.0, 0.001, 0.3)
    assert NONE.resolve(build("deepseek-v3-tiny")).mtp_loss_weight == 0.3
    more = AuxiliaryLosses(None, None, 0.01, None, None).resolve(build("mixtral-tiny"))
    assert more.router_coefs == {"load_balancing": 0.001, "z_loss": 0.01}, "one more loss takes none away"
    pooled = AuxiliaryLosses(None, None, 0.0, None, None, router_aux_loss_pooled=True)
    assert pooled.resolve(build("mixtral-tiny")).router_coefs == {"load_balancing_pooled": 0.001}


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        (
            "llama3.2-tiny",
            AuxiliaryLosses(None, None, 0.001, None, None),
            "router_z_loss_coef has no effect: this llama model has no exp",
        ),
        (
            "llama3.2-tiny",
            AuxiliaryLosses(None, None, 0.0, 0.001, None),
            "expert_bias_update_speed has no effect on this llama model: it has no experts",
        ),
        ("mixtral-tiny", AuxiliaryLosses(None, None, 0.0, 0.001, None), "no bias; use router_aux_loss_coef"),
        (
            "mixtral-tiny",
            AuxiliaryLosses(None, None, 0.0, None, 0.3),
            "mtp_loss_weight has no effect: this mixtral model has no multi-token mod",
        ),
        ("mimo-tiny", AuxiliaryLosses(None, None, 0.0, None, None, True), "router_aux_loss_pooled has no effect"),
    ],
)
def test_a_setting_for_a_part_the_model_lacks_is_refused(name: str, parts: AuxiliaryLosses, message: str):
    with pytest.raises(UsageError, match=message):
        parts.resolve(build(name))


def test_the_settings_are_typed_and_written_into_the_run(text: Path, tmp_path: Path):
    pairs = (
        "model.preset=deepseek-v3-tiny",
        "router_z_loss_coef=0.01",
        "expert_bias_update_speed=0.01",
        "mtp_loss_weight=0.1",
        "max_steps=2",
    )
    run(text, tmp_path / "run", *pairs, *QUICK)
    written = parse_config(PretrainConfig, read_yaml((tmp_path / "run" / "config.yaml").read_text(), "config.yaml"))
    assert written.auxiliary_losses == AuxiliaryLosses(0.0, 0.0001, 0.01, 0.01, 0.1)
    assert parse_config(PretrainConfig, read_yaml(config_to_yaml(written), "again.yaml")) == written
    bias = load_file(weights_file(tmp_path / "run", 2))
    moved = bias["blocks.1.feed_forward.layer.router.bias"]
    assert set((moved / 0.01).round().abs().tolist()) <= {0.0, 1.0, 2.0}
    assert moved.abs().max() > 0
    with pytest.raises(UsageError, match=r"router_z_coef: unknown key, did you mean 'router_z_loss_coef'"):
        run(text, tmp_path / "other", *pairs, "router_z_coef=0.01")


def test_balanced_experts_and_lookahead_resume_to_the_same_bits(text: Path, tmp_path: Path):
    quick = ("model.preset=deepseek-v3-tiny", *QUICK)
    run(text, tmp_path / "straight", *quick)
    run(text, tmp_path / "twice", *quick, callbacks=(CtrlC(4),))
    assert run(text, tmp_path / "twice", *quick).step == 8
    assert weights(tmp_path / "twice") == weights(tmp_path / "straight")


def test_activation_checkpointing_counts_no_load_twice(text: Path, tmp_path: Path):
    quick = ("model.preset=deepseek-v3-tiny", "max_steps=4", *QUICK)
    run(text, tmp_path / "plain", *quick)
    run(text, tmp_path / "again", *quick, "gradient_checkpointing=true")
    assert weights(tmp_path / "plain", 4) == weights(tmp_path / "again", 4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_balance_by_the_load_of_both(text: Path, tmp_path: Path, engine: str):
    """The bias moves by the sign of the whole step's load: one process's alone would go another way."""
    pairs = ("model.preset=deepseek-v3-tiny", "max_steps=3", "optim=adamw", "learning_rate=1e-4", *QUICK)
    run(text, tmp_path / "one", *pairs)
    by_two(BASE, [*pairs, f"data.source={text}", f"parallel={engine}"], tmp_path / "two")
    one, two = (load_file(weights_file(tmp_path / name, 3)) for name in ("one", "two"))
    for name in one:
        if name.endswith("router.bias"):
            torch.testing.assert_close(two[name], one[name], atol=1e-7, rtol=0)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert b["next_token"] == pytest.approx(a["next_token"], abs=1e-4)


def test_the_held_out_loss_is_the_next_tokens_alone_and_notes_no_load(text: Path, tmp_path: Path):
    model = build("deepseek-v3-tiny")
    drawn = torch.randint(2, 97, (60,), generator=torch.Generator().manual_seed(0))
    held_out = HeldOutLoader(
        TokenizedDocuments.from_token_lists([drawn.tolist()], vocab_size=97, start=0, end=1),
        sequence_length=61,
        batch_size=1,
    )
    losses = language_model_loss(model, held_out)
    row = torch.tensor([0, *drawn.tolist(), 1])
    expected = torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:])
    assert losses["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert all(router.tokens_per_expert is None for router in bias_routers(model))


def weights_file(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
