"""A head that scores: transformers reads it as a classifier and gives the same numbers, with every tensor random."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.build import preset
from llm_quest.models.decoder import GenerationConfig
from llm_quest.objectives.classification import last_token_outputs
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from tests.later import Later
from tests.objectives.rated import tiny

transformers = Later("transformers")

LABELS = ("no", "yes", "perhaps")
TINY = [(family, one.name) for family in FAMILIES for one in family.presets if one.name.endswith("-tiny")]


def classifier_of(family, name: str) -> str | None:
    return family.classifier(family.publish(preset(name).config)["model_type"])


PRESETS = [name for family, name in TINY if classifier_of(family, name) is not None]


def test_transformers_has_every_classifier_that_a_family_names_and_no_other():
    assert len(PRESETS) >= 10
    for family in FAMILIES:
        for model_type, architecture in family.architectures.items():
            derived = architecture.replace("ForCausalLM", "ForSequenceClassification")
            classifier = family.classifier(model_type)
            assert hasattr(transformers, classifier or derived) is (classifier is not None), model_type


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_gives_the_same_scores(name: str, tmp_path: Path):
    model = ScoreHead(3, LABELS, std=1.0)(tiny(page=name, dtype=torch.float32))
    model.generation_config = GenerationConfig(pad_token_id=0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(quest.save(model, tmp_path / "out"))
    assert [theirs.config.id2label[i] for i in range(3)] == list(LABELS)
    tokens = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).repeat(2, 1)
    tokens[1, 5:], positions[1, 5:] = 0, -1
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=(positions >= 0).long()).logits
        found = last_token_outputs(model, tokens, positions)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def test_a_fresh_head_is_undecided_and_leaves_the_embedding_alone():
    before = tiny(dtype=torch.float32)
    embedding = before.embed.token.weight.clone()
    model = ScoreHead(4)(before)
    out = last_token_outputs(model, torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
    assert -out.log_softmax(1).mean().item() == pytest.approx(math.log(4), abs=0.3)
    assert torch.equal(model.embed.token.weight, embedding)
    assert find_score_head(model) == ScoreHead(4)


def test_with_adapters_the_folder_is_ours_alone(tmp_path: Path):
    model = ScoreHead(2)(LoRA(rank=2)(tiny(dtype=torch.float32)))
    config = json.loads((quest.save(model, tmp_path / "out") / "config.json").read_text())
    assert config["model_type"] == "llm_quest"
    assert quest.load(tmp_path / "out").spec == model.spec


def test_labels_must_be_as_many_as_outputs():
    with pytest.raises(UsageError, match="outputs is 3 and there are 2 labels"):
        ScoreHead(3, ("a", "b"))(tiny())
