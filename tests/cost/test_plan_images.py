"""Plans of runs that look: counted on the run's own model and images, and equal to what can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_quest.cli.train import plan_recipe
from llm_quest.cost.plan_images import ImagePlan, plan_images
from llm_quest.errors import MissingError, UsageError
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.run import build_optimizer
from llm_quest.recipes.vlm import VlmConfig, build_vlm
from tests.recipes.test_vision import SMALL_VIT, SMALL_VLM, two_classes
from tests.recipes.tuned import planning_context


def quiet(text: str) -> None:
    return None


def test_a_vits_plan_by_hand(tmp_path: Path):
    pairs = [*SMALL_VIT, f"data.path={two_classes(tmp_path / 'images')}", "max_steps=10", "micro_batch_size=8"]
    found = plan_recipe("vit", pairs, measure=False, log=quiet)
    assert isinstance(found, ImagePlan)
    patches, width, hidden, tokens = 4, 16, 32, 5
    products = patches * 16 * width + 3 * width * width * tokens + width * width + 2 * width * hidden + width * 2
    pairs_of_tokens = 2 * tokens * width
    no_gradient_of_pixels = 2 * patches * 16 * width
    assert found.flops_per_image == 6 * (products + pairs_of_tokens) - no_gradient_of_pixels
    assert found.flops == found.flops_per_image * 16 * 10
    assert found.memory_total == sum(found.memory.values())
    assert found.checkpoint_bytes == found.memory["weights"] + found.memory["optimizer"]
    assert "10 steps of 16 images" in "\n".join(found.lines())
    json.dumps(found.as_json())


def test_a_vlms_plan_holds_what_its_optimizer_holds():
    settings = load_raw_config("vlm", [*SMALL_VLM, "trainable=[projector,language_model]"])
    config = parse_config(VlmConfig, settings)
    found = plan_images(config, measure=True, log=quiet)
    job = build_vlm(config, planning_context())
    stepper = build_optimizer(config, job.model, job.adamw_parameters)
    loss = job.objective(job.loader.batches(0)[0])
    loss.total.backward()
    stepper.step()
    tensors = [t for state in stepper.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    assert found.memory["optimizer"] == sum(t.nbytes for t in tensors)
    assert found.learned < found.parameters
    assert found.measured
    assert found.seconds == pytest.approx(config.max_steps * found.step_seconds)


def seen_plan(*pairs: str) -> ImagePlan:
    sizes = ("vision_tower.num_hidden_layers=3", "language_model.num_hidden_layers=3", "batch_size=4")
    return plan_images(
        parse_config(VlmConfig, load_raw_config("vlm", [*SMALL_VLM, *sizes, *pairs])), measure=False, log=quiet
    )


def test_checkpointed_activations_are_planned_whichever_way_they_are_asked_for():
    plain, key, entry = (
        seen_plan(*pairs) for pairs in ((), ("gradient_checkpointing=true",), ("techniques=[checkpointing]",))
    )
    assert key.memory == entry.memory
    assert key.memory["activations"] < 0.8 * plain.memory["activations"]
    assert {**key.memory, "activations": 0} == {**plain.memory, "activations": 0}
    assert key.flops == plain.flops, "the second forward pass is no work on the data"


def test_an_adapter_and_frozen_parts_are_planned_as_they_are_trained():
    whole, adapter, frozen = (
        seen_plan(),
        seen_plan("techniques=[{name: lora, rank: 1}]"),
        seen_plan("trainable=[projector]"),
    )
    assert adapter.learned < whole.learned / 2
    assert adapter.memory["gradients"] == 4 * adapter.learned
    assert frozen.flops_per_image < adapter.flops_per_image < whole.flops_per_image


def test_a_technique_that_does_not_fit_is_refused_before_it_is_planned():
    with pytest.raises(UsageError, match="technique hyper_connections: HyperConnections edits language models"):
        seen_plan("techniques=[hyper_connections]")


def test_a_plan_of_images_that_are_not_there_says_what_to_do(tmp_path: Path):
    with pytest.raises(MissingError, match=r"CIFAR-10 is not in .*Unpack cifar-10-binary\.tar\.gz"):
        plan_recipe("cifar10", [f"data.path={tmp_path}"], measure=False, log=quiet)
