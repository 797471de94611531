"""Plans of runs that look: counted on the run's own model and images, and equal to what can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_quest.cli.planning_images import ImagePlan, plan_images
from llm_quest.cli.training import foresee
from llm_quest.errors import MissingError
from llm_quest.recipes.config import gather, resolve
from llm_quest.recipes.course import optimizer
from llm_quest.recipes.vision_config import Vlm
from llm_quest.recipes.vlm import assembled
from llm_quest.train.parallel import Parallel
from tests.recipes.test_vision import SMALL_VIT, SMALL_VLM, two_classes


def quiet(text: str) -> None:
    return None


def test_a_vits_plan_by_hand(tmp_path: Path):
    pairs = [*SMALL_VIT, f"images.folder={two_classes(tmp_path / 'images')}", "steps=10", "batch.micro_rows=8"]
    found = foresee("vit", pairs, measure=False, say=quiet)
    assert isinstance(found, ImagePlan)
    patches, width, hidden, tokens = 4, 16, 32, 5
    products = patches * 16 * width + 3 * width * width * tokens + width * width + 2 * width * hidden + width * 2
    pairs_of_tokens = 2 * tokens * width
    assert found.flops_per_image == 6 * (products + pairs_of_tokens)
    assert found.flops == found.flops_per_image * 16 * 10
    assert found.memory_total == sum(found.memory.values())
    assert found.checkpoint_bytes == found.memory["weights"] + found.memory["optimizer"]
    assert "10 steps of 16 images" in "\n".join(found.lines())
    json.dumps(found.as_json())


def test_a_vlms_plan_holds_what_its_optimizer_holds():
    settings = gather("vlm", [*SMALL_VLM, "trained=[adapter,decoder]"])
    config = resolve(Vlm, settings)
    found = plan_images(config, measure=True, say=quiet)
    job = assembled(config, Parallel(), quiet)[0]
    stepper = optimizer(config.optimizer, job.model, job.by_adamw)
    loss = job.objective(job.feed.at(0)[0])
    loss.total.backward()
    stepper.step()
    tensors = [t for state in stepper.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    assert found.memory["optimizer"] == sum(t.nbytes for t in tensors)
    assert found.learned < found.parameters
    assert found.measured
    assert found.seconds == pytest.approx(config.steps * found.step_seconds)


def test_a_plan_of_images_that_are_not_there_says_what_to_do(tmp_path: Path):
    with pytest.raises(MissingError, match=r"CIFAR-10 is not in .*Unpack cifar-10-binary\.tar\.gz"):
        foresee("cifar10", [f"images.folder={tmp_path}"], measure=False, say=quiet)
