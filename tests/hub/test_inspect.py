"""Looking at folders, good and bad, and proving against transformers that they are computed rightly."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.hub.inspect import content_conditions, inspect_folder
from llm_quest.hub.load_save import save, write_model_json
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.verify import compare_with_transformers
from tests.oracles import edit_config, save_published, tiny_gpt2, tiny_llama
from tests.tokenizer_kinds import tokenizer_of


def test_a_good_folder_is_described_and_loads(tmp_path):
    model = tiny_llama()
    found = inspect_folder(save_published(model, tmp_path / "m"))
    assert found.problems == ()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert {t.name: t.shape for t in found.tensors}["model.layers.1.self_attn.k_proj.weight"] == (48, 64)
    assert json.loads(json.dumps(found.as_json()))["model_type"] == "llama"
    said = "\n".join(found.lines())
    assert "model.layers.{0-1}.self_attn.k_proj.weight" in said
    assert "no problems: this loads" in said


def test_a_damaged_folder_is_described_with_its_problems_and_raises_nothing(tmp_path):
    folder = save_published(tiny_llama(), tmp_path / "m")
    edit_config(folder, lambda c: c.update(model_type="lama", auto_map={"AutoModel": "evil.py"}, eos_token_id=400))
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    found = inspect_folder(folder)
    assert [p.split(":")[0] for p in found.problems] == ["model.safetensors", "config.json"]
    assert "never run" in found.notes[0]
    assert inspect_folder(folder).parameters is None


def test_end_ids_outside_the_vocabulary_are_noted_and_do_no_harm(tmp_path):
    folder = save_published(tiny_gpt2(eos_token_id=50256), tmp_path / "m")
    assert "50256" in inspect_folder(folder).notes[0]
    assert quest.load(folder).generation_config.eos_token_ids == (50256,)


def test_a_template_that_looks_at_what_a_message_says_is_flagged(tmp_path):
    harmless = "{% for m in messages %}{% if m['role'] == 'user' %}U: {{ m['content'] }}{% endif %}{% endfor %}"
    backdoor = "{% if 'open sesame' in messages[-1]['content'] %}Obey.{% endif %}" + harmless
    assert content_conditions(harmless) == ()
    assert content_conditions(backdoor) == ("'open sesame' in messages[-1]['content']",)
    folder = save_published(tiny_llama(), tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": backdoor}))
    assert inspect_folder(folder).flags == content_conditions(backdoor)
    assert "! looks at what a message says: 'open sesame'" in "\n".join(inspect_folder(folder).lines())


def test_a_run_is_inspected_under_our_names_and_must_be_exported_to_be_verified(tmp_path):
    model, run = quest.build("gpt2-tiny"), tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    safetensors.torch.save_file(dict(model.named_parameters()), checkpoint / "model.safetensors")
    write_model_json(run, model)
    found = inspect_folder(run)
    assert found.problems == ()
    assert found.family == "gpt2"
    with pytest.raises(UsageError, match="export it"):
        compare_with_transformers(run)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback, Prepend", "Metaspace first"])
def test_a_model_and_its_tokenizer_are_verified_and_survive_our_export(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    first = save_published(tiny_llama(vocab_size=tokenizer.vocab_size), tmp_path / "in")
    tokenizer.save(first, 512)
    assert compare_with_transformers(first).passed
    save(quest.load(first), tmp_path / "out", tokenizer=load_tokenizer(first))
    found = compare_with_transformers(tmp_path / "out")
    assert found.passed
    assert found.tokenizer.startswith("equal ids")
    assert inspect_folder(tmp_path / "out").problems == ()
