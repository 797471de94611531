"""Tokens added to a model: nothing that it computed changes, new rows are means, and the folder is read everywhere."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import llm_quest as quest
from llm_quest.cli.main import app
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.recipes.finetuning import StartModelConfig, load_for_finetuning, require_trained_token_rows
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.token_rows import add_token_rows, add_tokens, resize_token_embeddings
from tests.later import Later
from tests.tokenizer_kinds import KINDS, tokenizer_of

transformers = Later("transformers")

TINY = [one.name for page in FAMILIES for one in page.presets if one.name.endswith("-tiny")]


@pytest.mark.parametrize("name", TINY)
def test_old_tokens_keep_their_logits_and_new_ones_have_the_mean(name):
    model = build(name, seed=1, dtype="float64")
    rows, tokens = model.config.vocab_size, torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        hidden, before = model.hidden_states(tokens), model(tokens)
    parameters = len(list(model.parameters()))
    resize_token_embeddings(model, rows + 3)
    with torch.no_grad():
        after = model(tokens)
        grown = model(torch.tensor([[3, rows + 2]]))
        assert torch.equal(model.hidden_states(tokens), hidden)
    assert after.shape[-1] == grown.shape[-1] == model.config.vocab_size == rows + 3
    assert torch.allclose(after[..., :rows], before, rtol=1e-12, atol=1e-13)
    assert len(list(model.parameters())) == parameters
    mean = model.head.weight[:rows].mean(dim=0)
    assert torch.equal(model.head.weight[rows:], mean.expand(3, -1))
    assert torch.equal(model.embed.token.weight[rows], model.embed.token.weight[:rows].mean(dim=0))


def test_transformers_means_are_the_same():
    from tests import oracles

    theirs = oracles.tiny_llama(seed=2)
    ours = theirs.get_input_embeddings().weight.detach().clone()
    theirs.resize_token_embeddings(ours.shape[0] + 2, mean_resizing=True)
    grown = theirs.get_input_embeddings().weight[-2:]
    assert torch.allclose(grown, ours.mean(dim=0).expand(2, -1), atol=1e-3)  # theirs draws around the mean


def test_a_padded_embedding_gives_its_rows_away():
    model = build("llama3.2-tiny", seed=1)
    rows = model.config.vocab_size
    kept = model.embed.token.weight[: rows - 2].detach().clone()
    add_token_rows(model, [rows - 1])
    others = torch.cat([kept, model.embed.token.weight[rows - 2 : rows - 1]])
    assert model.config.vocab_size == rows
    assert torch.allclose(model.embed.token.weight[rows - 1], others.mean(dim=0), atol=1e-7)
    assert torch.equal(model.embed.token.weight[: rows - 2], kept)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_one_id_and_other_text_keeps_its_ids(kind):
    before = tokenizer_of(kind)
    tokenizer = before.with_added_tokens(["<think>", "</think>"]).with_added_tokens(["<|call|>"], special=True)
    size = before.vocab_size
    assert [tokenizer.token_to_id(name) for name in ("<think>", "</think>", "<|call|>")] == [size, size + 1, size + 2]
    assert tokenizer.encode("The quick brown fox") == before.encode("The quick brown fox")
    assert size in tokenizer.encode("a<think>b")
    assert size + 2 not in tokenizer.encode("a<|call|>b")
    assert size + 2 in tokenizer.encode("a<|call|>b", allow_special_tokens=True)
    assert tokenizer.hash != before.hash
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == (before.eos_token_ids, before.bos_token_id)
    with pytest.raises(UsageError, match="'<think>' cannot be added"):
        tokenizer.with_added_tokens(["<think>"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tokenizer_of("byte-level")
    sizes = replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    return quest.save(build(sizes, seed=0), tmp_path / "model", tokenizer=tokenizer)


def test_the_command_writes_a_folder_that_transformers_reads(folder: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        app(["tokens", "add", str(folder), str(tmp_path / "more"), "<think>", "</think>", "--special", "--json"])
    assert stopped.value.code == 0
    told = json.loads(capsys.readouterr().out)
    size = tokenizer_of("byte-level").vocab_size
    assert (told["ids"], told["rows_before"], told["rows"]) == ({"<think>": size, "</think>": size + 1}, size, size + 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "more")
    ids = tokenizer.encode("The<think>fox</think>", add_special_tokens=False)
    assert ids.count(size) == ids.count(size + 1) == 1
    ours = quest.load(tmp_path / "more")
    with torch.no_grad():
        assert torch.allclose(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-4)


def test_fine_tuning_begins_with_new_tokens(folder: Path):
    start = StartModelConfig(load=str(folder), add_tokens=("<think>",), add_special_tokens=("<|call|>",))
    model, tokenizer = load_for_finetuning(start)
    assert model.config.vocab_size == tokenizer.vocab_size == tokenizer_of("byte-level").vocab_size + 2
    assert "<|call|>" in tokenizer.special_tokens
    assert "<think>" not in tokenizer.special_tokens


def test_an_end_token_that_was_named_and_had_no_row_gets_one(folder: Path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|eot|>"}))
    rows = quest.load(folder).config.vocab_size
    model, tokenizer = load_for_finetuning(StartModelConfig(load=str(folder)))
    assert tokenizer.eos_token_ids == (rows,)
    assert model.config.vocab_size == rows + 1


def test_mistakes_are_named(folder: Path):
    model, tokenizer = build("llama3.2-tiny", seed=0), Tokenizer.load(folder)
    with pytest.raises(UsageError, match="it can get more, not 5"):
        resize_token_embeddings(model, 5)
    LoRA(rank=2)(model)
    with pytest.raises(UsageError, match="before techniques are applied; this model has LoRA"):
        add_tokens(model, tokenizer, ["<think>"])


@pytest.mark.parametrize(
    ("technique", "refused"), [("{name: lora}", True), ("{name: lora, modules_to_save: [embed.token]}", False)]
)
def test_an_adapter_that_would_freeze_the_new_rows_is_refused(technique: str, refused: bool):
    entry = yaml.safe_load(technique)
    config = SimpleNamespace(model=StartModelConfig(load="x", add_tokens=("<think>",)), techniques=(entry,))
    found = pytest.raises(UsageError, match=r"lora freezes the embedding.*modules_to_save \[embed.token\]")
    with found if refused else nullcontext():
        require_trained_token_rows(config)
