"""Weights that stay in their file: the same model as when read, nobody else's file changed, and whatever is done to a
model works on them."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

import llm_quest as quest
from llm_quest.errors import DataError
from llm_quest.hub import load_save, mmap
from llm_quest.hub.load_save import load, save
from llm_quest.hub.locate import locate_model
from llm_quest.hub.mmap import memory_map_parameters
from llm_quest.hub.validate import validate_folder
from llm_quest.models import FAMILIES
from llm_quest.train.parallel import DistributedContext

TINY = [preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny")]


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """Every page's smallest model, as we write it."""
    place = tmp_path_factory.mktemp("saved")
    return {name: save(quest.build(name, seed=4), place / name) for name in TINY}


def map_weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    seen = validate_folder(locate_model(folder))
    parameters = dict(seen.model.named_parameters())
    return memory_map_parameters(parameters, seen.weight_views, seen.sources, dict.fromkeys(parameters, dtype))


def read(folder: Path, monkeypatch) -> quest.Decoder:
    """Loaded by the definition: every number copied."""
    with monkeypatch.context() as without:
        without.setattr(mmap, "can_replace_mapped_files", lambda: False)
        return load(folder)


def train_one_step(model: torch.nn.Module) -> torch.nn.Module:
    """One step of AdamW on fixed tokens."""
    rows = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(rows).logsumexp(dim=-1).sum().backward()
    optimizer.step()
    return model.requires_grad_(True)


def close(one: torch.nn.Module, other: torch.nn.Module, atol: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", TINY)
def test_mapped_and_read_are_the_same_numbers_on_every_page(model_folders, monkeypatch, name):
    close(load(model_folders[name]), read(model_folders[name], monkeypatch), atol=0)


def test_all_that_we_save_lies_in_its_file_also_what_we_fuse_and_what_is_published_turned(model_folders):
    for name in ("gpt2-tiny", "llama3.2-tiny"):
        model = quest.build(name, seed=4)
        there = map_weights(model_folders[name])
        assert there.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(there[path], parameter) for path, parameter in model.named_parameters())
    assert not map_weights(model_folders["gpt2-tiny"])["blocks.0.feed_forward.layer.up.weight"].is_contiguous()


def test_parts_that_lie_in_another_order_are_read(tmp_path, model_folders, monkeypatch):
    """Sorted by name, as transformers writes them: k, o, q, v apart, gate beside up."""
    write = load_save.write_tensors
    monkeypatch.setattr(load_save, "write_tensors", lambda file, tensors: write(file, dict(sorted(tensors.items()))))
    folder = save(load(model_folders["llama3.2-tiny"]), tmp_path / "sorted")
    there = map_weights(folder)
    assert "blocks.0.mixer.layer.qkv.weight" not in there
    assert "blocks.0.feed_forward.layer.gate_up.weight" in there
    close(load(folder), quest.build("llama3.2-tiny", seed=4), atol=0)


def test_another_dtype_than_the_stored_is_read(tmp_path, model_folders):
    assert map_weights(model_folders["gpt2-tiny"])
    assert not map_weights(model_folders["gpt2-tiny"], torch.bfloat16)
    half = quest.build("gpt2-tiny", dtype=torch.bfloat16)
    assert not map_weights(save(half, tmp_path / "half"))
    turned = {"qkv", "out", "up", "down"}
    there = map_weights(tmp_path / "half", torch.bfloat16)
    assert there
    assert not any(path.split(".")[-2] in turned and path.endswith("weight") for path in there)
    close(load(tmp_path / "half"), half, atol=0)


def test_training_steps_change_the_model_and_not_the_file(model_folders, monkeypatch):
    for name in ("gpt2-tiny", "llama3.2-tiny"):
        file = model_folders[name] / "model.safetensors"
        before = hashlib.sha256(file.read_bytes()).digest()
        model = train_one_step(load(model_folders[name]))
        close(model, train_one_step(read(model_folders[name], monkeypatch)), atol=2e-5)
        assert hashlib.sha256(file.read_bytes()).digest() == before
        close(load(model_folders[name]), quest.build(name, seed=4), atol=0)


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama3.2-tiny"])
def test_a_trained_model_is_saved_over_the_folder_it_lies_in(tmp_path, name):
    folder = save(quest.build(name, seed=4), tmp_path / "model")
    model, other = train_one_step(load(folder)), load(folder)
    for _ in range(2):
        now = copy.deepcopy(model)
        save(model, folder, overwrite=True)
        close(load(folder), now, atol=0)
        close(model, now, atol=0)
        train_one_step(model)
    close(other, quest.build(name, seed=4), atol=0)  # loaded before: still the old numbers


def test_copies_pickles_and_other_dtypes_own_their_memory(model_folders):
    model = load(model_folders["gpt2-tiny"])
    close(copy.deepcopy(model), model, atol=0)
    weight = model.blocks[0].feed_forward.layer.up.weight
    again = pickle.loads(pickle.dumps(weight.detach()))
    assert torch.equal(again, weight)
    assert again.untyped_storage().nbytes() == weight.nbytes, "a copy of the weight, not of the file"
    assert torch.equal(copy.deepcopy(model).bfloat16().norm.weight, model.norm.weight.bfloat16())


def test_training_begins_with_rows_in_memory(model_folders):
    """Sharding and collectives need it, and a resumed run must go on with the bits of the straight one."""
    model = load(model_folders["gpt2-tiny"])
    DistributedContext().parallelize(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert model.head.weight is model.embed.token.weight
    close(model, quest.build("gpt2-tiny", seed=4), atol=0)


def test_numbers_that_are_not_finite_are_found_where_they_lie(tmp_path):
    model = quest.build("gpt2-tiny")
    with torch.no_grad():
        model.blocks[1].feed_forward.layer.up.weight[3, 5] = float("nan")
    with pytest.raises(DataError, match=r"not finite: transformer\.h\.1\.mlp\.c_fc\.weight \(1 numbers\)"):
        load(save(model, tmp_path / "bad"))


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error_and_no_crash(tmp_path):
    folder = save(quest.build("gpt2-tiny"), tmp_path / "m")
    seen = validate_folder(locate_model(folder))
    os.truncate(folder / "model.safetensors", 20_000)
    parameters = dict(seen.model.named_parameters())
    with pytest.raises(DataError, match="became shorter"):
        memory_map_parameters(parameters, seen.weight_views, seen.sources, dict.fromkeys(parameters, torch.float32))
