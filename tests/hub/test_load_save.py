"""Real folders in and out: equal logits both ways, and one clear error for everything that can be wrong with a
folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import llm_quest as quest
from llm_quest import atomic_dirs, files
from llm_quest.errors import DataError, MissingError, ResourceError, UsageError
from llm_quest.hub.load_save import load, parse_size, save, write_model_json
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.manifest import MANIFEST_FILE
from llm_quest.models.decoder import GenerationConfig
from llm_quest.train.checkpoint import Checkpoint, save_checkpoint
from tests.oracles import ATOL, RTOL, edit_config, logits_of, save_published, tiny_gpt2, tiny_llama, transformers

MODELS = {
    "gpt2": tiny_gpt2,
    "gpt2, narrow MLP": lambda: tiny_gpt2(n_inner=80),
    "llama, default rope": lambda: tiny_llama(rope="default"),
    "llama, linear rope": lambda: tiny_llama(rope="linear"),
    "llama, llama3 rope": lambda: tiny_llama(rope="llama3"),
    "llama, yarn rope": lambda: tiny_llama(rope="yarn"),
    "llama, untied": lambda: tiny_llama(tie_word_embeddings=False),
    "llama, biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama, one key head": lambda: tiny_llama(num_key_value_heads=1, head_dim=16),
}


def tokens(rows: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(7))


def our_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens())


@pytest.fixture(scope="module")
def reference_folders(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each model's folder as transformers writes it, and its logits."""
    made = {}
    for name, make in MODELS.items():
        model = make()
        folder = save_published(model, tmp_path_factory.mktemp("published") / "model")
        made[name] = folder, logits_of(model, tokens())
    return made


@pytest.fixture
def llama(reference_folders, tmp_path) -> Path:
    """A copy of a good folder, to be damaged."""
    return shutil.copytree(reference_folders["llama, untied"][0], tmp_path / "llama")


@pytest.fixture
def gpt2(reference_folders, tmp_path) -> Path:
    return shutil.copytree(reference_folders["gpt2"][0], tmp_path / "gpt2")


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of model.safetensors; dots are written as two underscores."""
    file = folder / "model.safetensors"
    held = safetensors.torch.load_file(file)
    for name, tensor in changes.items():
        held[name.replace("__", ".")] = tensor
    safetensors.torch.save_file({name: t for name, t in held.items() if t is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_our_logits_are_those_of_transformers(reference_folders, name):
    folder, expected = reference_folders[name]
    torch.testing.assert_close(our_logits(load(folder)), expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("name", [name for name in MODELS if "rope" in name or name == "gpt2"])
def test_the_old_spelling_of_config_json_gives_the_same_model(reference_folders, tmp_path, name):
    from tests.oracles import spell_old

    folder = shutil.copytree(reference_folders[name][0], tmp_path / "old")
    edit_config(folder, spell_old)
    assert torch.equal(our_logits(load(folder)), our_logits(load(reference_folders[name][0])))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_save_with_no_key_missing_or_unexpected(reference_folders, tmp_path, name):
    folder, expected = reference_folders[name]
    save(load(folder), tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits_of(model, tokens()), expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("limit", ["5GB", "30KB"])
@pytest.mark.parametrize("name", MODELS)
def test_export_then_import_is_the_identity(reference_folders, tmp_path, name, limit):
    model = load(reference_folders[name][0])
    save(model, tmp_path / "out", max_shard_size=limit)
    again = load(tmp_path / "out")
    assert again.config == model.config
    assert again.generation_config == model.generation_config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_sharded_folders_of_transformers_are_read_and_ours_are_read_by_it(reference_folders, tmp_path):
    folder, expected = reference_folders["llama, untied"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sharded = save_published(theirs, tmp_path / "theirs", max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    save(load(sharded), tmp_path / "ours", max_shard_size="30KB")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert all(p.stat().st_size < 32_000 for p in (tmp_path / "ours").glob("model-*.safetensors"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(model, tokens()), expected, atol=ATOL, rtol=RTOL)


def test_config_json_says_everything_in_both_spellings_and_names_no_path(reference_folders, tmp_path):
    save(
        load(reference_folders["llama, llama3 rope"][0]),
        tmp_path / "out",
        generation_config=GenerationConfig(bos_token_id=1, eos_token_ids=(2, 3), pad_token_id=0),
    )
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == ["LlamaForCausalLM"]
    assert said["dtype"] == said["torch_dtype"] == "float32"
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 500000.0
    assert said["rope_scaling"]["rope_type"] == said["rope_parameters"]["rope_type"] == "llama3"
    assert (said["head_dim"], said["num_key_value_heads"]) == (24, 2)
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (1, [2, 3], 0)
    assert "transformers_version" not in said
    assert not any(str(tmp_path) in p.read_text(errors="replace") for p in (tmp_path / "out").iterdir())


def test_generation_defaults_are_read_kept_and_written(llama, tmp_path):
    (llama / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": True})
    )
    model = load(llama)
    assert model.generation_config == GenerationConfig(
        bos_token_id=1, eos_token_ids=(2, 5), temperature=0.6, top_p=0.9, do_sample=True
    )
    save(model, tmp_path / "out")
    assert load(tmp_path / "out").generation_config == model.generation_config
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_any_dtype_is_each_number_rounded_once(gpt2, dtype):
    exact, rounded = load(gpt2), load(gpt2, dtype=dtype)
    pairs = zip(exact.parameters(), rounded.parameters(), strict=True)
    assert all(torch.equal(a.to(getattr(torch, dtype)), b) for a, b in pairs)


def test_without_a_wish_the_dtype_is_what_config_json_says_else_what_is_stored(llama, tmp_path):
    save(load(llama).to(torch.bfloat16), tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load(tmp_path / "half").head.weight.dtype == torch.bfloat16
    edit_config(tmp_path / "half", lambda c: (c.pop("dtype"), c.pop("torch_dtype")))
    assert load(tmp_path / "half").head.weight.dtype == torch.bfloat16
    edit_config(tmp_path / "half", lambda c: c.update(torch_dtype="float32"))
    assert load(tmp_path / "half").head.weight.dtype == torch.float32


def test_a_loaded_model_is_in_eval_mode_tied_and_ready_to_be_trained(gpt2):
    model = load(gpt2)
    assert not model.training
    assert model.head.weight is model.embed.token.weight
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(tokens()).sum().backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def test_a_file_replaced_or_deleted_after_loading_changes_nothing(llama, gpt2):
    model = load(llama)
    before = our_logits(model)
    os.replace(gpt2 / "model.safetensors", llama / "model.safetensors")
    assert torch.equal(our_logits(model), before)
    shutil.rmtree(llama)
    assert torch.equal(our_logits(model), before)


def test_the_hubs_gpt2_without_prefix_and_with_its_mask_tensors_is_read(gpt2, reference_folders):
    held = safetensors.torch.load_file(gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 128, 128).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    safetensors.torch.save_file(bare, gpt2 / "model.safetensors")
    torch.testing.assert_close(our_logits(load(gpt2)), reference_folders["gpt2"][1], atol=ATOL, rtol=RTOL)


def test_a_tied_head_stored_twice_is_one_parameter_where_it_is_equal_and_two_where_not(gpt2):
    embedding = safetensors.torch.load_file(gpt2 / "model.safetensors")["transformer.wte.weight"]
    edit_weights(gpt2, lm_head__weight=embedding.clone())
    tied = load(gpt2)
    assert tied.head.weight is tied.embed.token.weight
    edit_weights(gpt2, lm_head__weight=embedding + 1)
    own = load(gpt2)
    assert own.config.tie_word_embeddings is False
    torch.testing.assert_close(own.head.weight, own.embed.token.weight + 1)


def test_everything_wrong_is_listed_in_one_error(llama):
    held = safetensors.torch.load_file(llama / "model.safetensors")
    bad = held["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    edit_weights(
        llama,
        model__norm__weight=None,
        lm_head__weight=None,
        model__layers__0__mlp__up_proj__weight=bad,
        model__layers__0__surprise=torch.ones(1),
        model__layers__1__mlp__down_proj__weight_scale_inv=torch.ones(1),
        model__layers__1__self_attn__q_proj__weight=held["model.layers.1.self_attn.q_proj.weight"].to(torch.int8),
    )
    with pytest.raises(DataError) as caught:
        load(llama)
    said = "\n".join(caught.value.problems)
    assert "missing: lm_head.weight, model.norm.weight" in said
    assert "unexpected: model.layers.1.mlp.down_proj.weight_scale_inv, model.layers.0.surprise (scales of" in said
    assert "mis-shaped: model.layers.0.mlp.up_proj.weight is (64, 112), config.json makes it (112, 64)" in said
    assert "scales of fp8 weights, of which config.json says nothing" in said
    assert "stored as I8" in said


def test_a_wrong_size_in_config_json_is_one_line_for_all_the_tensors_that_it_concerns(llama):
    edit_config(llama, lambda c: c.update(hidden_size=128, head_dim=16))
    with pytest.raises(DataError) as caught:
        load(llama)
    told = caught.value.problems
    assert 4 < len(told) <= 8
    assert max(map(len, told)) < 400, "names of layers are drawn together"
    assert "mis-shaped" in told[1]
    *_, rest = str(caught.value).splitlines()
    assert rest == f"... and {len(told) - 3} more; quest inspect {llama} lists all"


def test_numbers_that_are_not_finite_are_named_all_of_them(llama):
    nan, inf = torch.full((64,), float("nan")), torch.full((64,), float("inf"))
    edit_weights(llama, model__norm__weight=nan, model__layers__1__input_layernorm__weight=inf)
    with pytest.raises(DataError) as caught:
        load(llama)
    assert "not finite: model.norm.weight (64 numbers)" in str(caught.value)
    assert "not finite: model.layers.1.input_layernorm.weight (64 numbers)" in str(caught.value)


def test_every_missing_and_refused_field_of_config_json_is_listed(llama):
    edit_config(llama, lambda c: [c.pop(f) for f in ("hidden_size", "vocab_size", "num_hidden_layers")])
    edit_config(llama, lambda c: c.update(hidden_act="gelu"))
    with pytest.raises(DataError) as caught:
        load(llama)
    for field in ("hidden_size", "vocab_size", "num_hidden_layers", "hidden_act"):
        assert any(repr(field) in one or f" {field} " in one for one in caught.value.problems)


CONFIGS = {
    "a part of several": (
        {
            "model_type": "gemma5",
            "text_config": {"model_type": "gemma3_text"},
            "vision_config": {"model_type": "siglip"},
        },
        "model_type 'gemma5' is a model of several parts, of which only 'gemma3_text' can be read",
    ),
    "unknown family": ({"model_type": "lama"}, "model_type 'lama' is unknown here; the nearest known is 'llama'"),
    "no family": ({"model_type": None, "architectures": None}, "no 'model_type'"),
    "text for a size": ({"hidden_size": "64"}, "config.json"),
    "no layers": ({"num_hidden_layers": 0}, "layers is 0; a positive whole number"),
    "a billion layers": (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers is 1,000,000,000, which is no plausible size",
    ),
    "a million layers": ({"num_hidden_layers": 10**6}, "1,000,000 layers, but the files hold only"),
    "absurd width": ({"hidden_size": 2**60}, "no plausible size"),
    "no heads": ({"num_attention_heads": 0}, "config.json"),
    "uneven heads": ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
    "odd head": ({"head_dim": 7}, "rotary width 7"),
    "unknown rope": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "'spiral' is unknown"),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantized by gptq; plain floats, fp8, mxfp4 are read",
    ),
    "quantized somehow": ({"quantization_config": {"bits": 4}}, "quantized by an unnamed method"),
    "odd blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
        "weight_block_size is 128",
    ),
    "eos of another kind": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "fewer rows": ({"vocab_size": 90}, "model.embed_tokens.weight are (97, 64), config.json makes it (90, 64)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_no_model_can_be_made_of_says_why(llama, case):
    change, message = CONFIGS[case]
    (llama / "generation_config.json").unlink()
    edit_config(llama, lambda c: c.update(change))
    with pytest.raises(DataError) as caught:
        load(llama)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "{", "[1]", "\xff", "[" * 100_000, " " * 17_000_000])
def test_a_config_that_is_no_json_object_is_refused(llama, text):
    (llama / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"config\.json"):
        load(llama)


def test_a_truncated_file_is_named(llama):
    file = llama / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(DataError, match=r"model\.safetensors: cut off"):
        load(llama)


def test_missing_and_stray_shards_are_named(reference_folders, tmp_path):
    folder = tmp_path / "sharded"
    save(load(reference_folders["llama, untied"][0]), folder, max_shard_size="60KB")
    files = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    files[0].rename(tmp_path / "gone")
    said = json.loads(index.read_text())
    moved = next(name for name, file in said["weight_map"].items() if file == files[1].name)
    said["weight_map"] |= {moved: files[2].name, "model.ghost": files[1].name}
    index.write_text(json.dumps(said))
    with pytest.raises(DataError) as caught:
        load(folder)
    said = "\n".join(caught.value.problems)
    assert f"missing file: {files[0].name}" in said
    assert f"{files[1].name}: holds {moved}, which the index puts into {files[2].name}" in said
    assert "promised by the index but in none of its files" in said
    assert "model.ghost" in said


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x"])
def test_an_index_cannot_point_outside_its_folder(llama, name):
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(DataError, match="no plain file name"):
        load(llama)


def test_pickled_weights_are_read_only_if_allowed_and_never_run(gpt2, reference_folders):
    held = safetensors.torch.load_file(gpt2 / "model.safetensors")
    (gpt2 / "model.safetensors").unlink()
    torch.save(held, gpt2 / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pickled weights here \(pytorch_model\.bin\).*allow_pickle"):
        load(gpt2)
    torch.testing.assert_close(
        our_logits(load(gpt2, allow_pickle=True)), reference_folders["gpt2"][1], atol=ATOL, rtol=RTOL
    )
    torch.save({"x": Harmful(gpt2 / "harmed")}, gpt2 / "pytorch_model.bin")
    with pytest.raises(DataError, match="holds more than tensors"):
        load(gpt2, allow_pickle=True)
    assert not (gpt2 / "harmed").exists()


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_an_embedding_with_fewer_rows_than_tokens_is_refused(llama):
    (llama / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 97}}, "added_tokens": [{"id": 96}]})
    )
    with pytest.raises(DataError, match=r"token id 97, but the embedding has only 97 rows \(ids 0 to 96\)"):
        load(llama)


def test_places_that_hold_no_model_say_so(tmp_path, llama):
    cases = {
        tmp_path / "nowhere": "no folder",
        llama / "config.json": "is a file; give the folder",
        tmp_path: "neither",
    }
    for where, message in cases.items():
        with pytest.raises(DataError, match=message):
            load(where)
    (llama / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        load(llama)
    with pytest.raises(UsageError, match="no dtype is called 'float31'"):
        load(llama, dtype="float31")
    with pytest.raises(UsageError, match="no revisions"):
        load(llama, revision="main")
    with pytest.raises(MissingError, match="device 'cuda:77' is not there"):
        load(llama, device="cuda:77")


def test_a_hub_id_is_found_in_the_local_cache_and_one_that_is_not_names_the_file_and_the_remedy(llama, tmp_path):
    """In a fresh process: the Hub's client reads the place of its cache when it is imported."""
    repo = tmp_path / "home" / "hub" / "models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(llama, repo / "snapshots" / ("0" * 40))
    code = """
import llm_quest as q
from llm_quest.errors import MissingError
print(q.load("someone/small").config.hidden_size)
try: q.load("meta-llama/Llama-3.2-1B")
except MissingError as error: print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    size, missing = done.stdout.split("\n", 1)
    assert size == "64"
    assert "lacks config.json in the local cache while HF_HUB_OFFLINE is set" in missing
    assert "hf download meta-llama/Llama-3.2-1B" in missing


def test_saving_refuses_to_harm_what_is_there(llama, tmp_path):
    model = load(llama)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("three years")
    for overwrite, message in ((False, "not empty"), (True, r"more than a saved model \(thesis\.txt\)")):
        with pytest.raises(UsageError, match=message):
            save(model, full, overwrite=overwrite)
    (tmp_path / "link").symlink_to(full)
    (tmp_path / "file").write_text("x")
    for target, message in (
        (tmp_path / "link", "is a link"),
        (tmp_path / "file", "no folder"),
        (Path("/dev/null"), "no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            save(model, target, overwrite=True)
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]


def test_overwriting_replaces_a_saved_model_wholly(llama, gpt2, tmp_path):
    save(load(llama), tmp_path / "out", max_shard_size="60KB")
    save(load(gpt2), tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out").spec.family == "gpt2"
    assert not list((tmp_path / "out").glob("model-*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "llama", "out"]


def test_a_save_that_fails_leaves_nothing_behind_and_the_old_model_whole(llama, tmp_path, monkeypatch):
    model = load(llama)
    save(model, tmp_path / "out")

    rename = os.rename

    def full_disk(source: Path, target: Path) -> None:
        """Setting the old model aside succeeds, putting the new one in its place does not."""
        if target.name == "out" and not source.name.endswith("-old"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(atomic_dirs, "_exchange_in_one_step", lambda first, second: False)  # as on macOS
    monkeypatch.setattr(files.os, "rename", full_disk)
    with pytest.raises(ResourceError, match="nothing was changed"):
        save(model, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ResourceError, match="0 bytes free"):
        save(model, tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out"]
    load(tmp_path / "out")


def test_files_and_folder_have_the_modes_that_umask_gives(llama, tmp_path):
    model, before = load(llama), os.umask(0o027)
    try:
        save(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}


def write_checkpoints(run: Path, model, *steps: int) -> None:
    """Checkpoints whose final norm says their step."""
    for step in steps:
        with torch.no_grad():
            model.norm.weight.fill_(step)
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        save_checkpoint(run / "checkpoints", Checkpoint(step, {"model": tensors, "optimizer": {}}))


def test_a_run_folder_and_each_of_its_checkpoints_are_loaded(tmp_path):
    run, model = tmp_path / "run", quest.build("llama3.2-tiny", seed=3)
    model.generation_config = GenerationConfig(eos_token_ids=(2,))
    write_checkpoints(run, model, 9, 10)
    with pytest.raises(DataError, match=r"no model\.json"):
        load(run)
    write_model_json(run, model)
    assert load(run).norm.weight[0] == 10
    assert load(run).generation_config == model.generation_config
    assert load(run / "checkpoints" / "step-00000009").norm.weight[0] == 9
    (run / "LATEST").write_text("step-00000009\n")
    assert load(run).norm.weight[0] == 9
    assert load(run).config == model.config


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


DAMAGES = {
    "a flipped bit": (flip_a_bit, "does not have the xxh3_128"),
    "cut short": (truncate, "bytes, its manifest says"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
    "no JSON": (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "cannot be read"),
    "a list": (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), "holds a list"),
    "no files": (lambda folder: (folder / MANIFEST_FILE).write_text('{"format": 2, "step": 2}'), "identity is"),
    "a path out": (
        lambda folder: (folder / MANIFEST_FILE).write_text(
            '{"format": 2, "step": 2, "identity": {}, "files": {"../../x": {}}}'
        ),
        "leads out of the checkpoint",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_loaded(tmp_path, caplog, kind: str):
    damage, reason = DAMAGES[kind]
    run, model = tmp_path / "run", quest.build("llama3.2-tiny", seed=3)
    write_checkpoints(run, model, 1, 2)
    write_model_json(run, model)
    damage(run / "checkpoints" / "step-00000002")
    assert load(run).norm.weight[0] == 1
    assert "step-00000002 is damaged" in caplog.text
    assert reason in caplog.text
    assert "step-00000001 is used" in caplog.text
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    with pytest.raises(DataError, match="is damaged: "):
        load(run / "checkpoints" / "step-00000002")
    damage(run / "checkpoints" / "step-00000001")
    with pytest.raises(DataError, match="has no usable checkpoint"):
        load(run)


@pytest.mark.parametrize("content", ["{", "[]", '{"progress": {}}', '{"progress": {"best_step": [1]}}', "\ud800"])
def test_a_state_that_does_not_say_which_checkpoint_is_the_best_is_named(tmp_path, content: str):
    run, model = tmp_path / "run", quest.build("llama3.2-tiny", seed=3)
    write_checkpoints(run, model, 1)
    write_model_json(run, model)
    (run / "checkpoints" / "step-00000001" / "state.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"state\.json does not say which checkpoint is the best"):
        load(f"{run}@best")


def test_a_checkpoint_that_came_without_its_manifest_is_read_with_a_warning(tmp_path, caplog):
    run, model = tmp_path / "run", quest.build("llama3.2-tiny", seed=3)
    write_checkpoints(run, model, 1)
    write_model_json(run, model)
    (run / "checkpoints" / "step-00000001" / MANIFEST_FILE).unlink()
    assert load(run).norm.weight[0] == 1
    assert "has no MANIFEST.json: its weights are read unverified" in caplog.text


def test_weights_of_a_run_are_read_through_the_door_that_verifies_them():
    """Nobody else looks for checkpoint folders: the writer, the resumed run and `locate_model` check the manifest."""
    package = Path(quest.__file__).parent
    readers = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if any(text in file.read_text(encoding="utf-8") for text in ('"step-', "'step-", "step-*"))
    }
    checked = {"hub/locate.py", "train/checkpoint.py", "train/run_dir.py"}
    sizes_samples_and_references = {
        "report/record.py",
        "report/run_card.py",
        "eval/evaluators.py",
        "recipes/run_folder.py",
    }
    assert readers <= checked | sizes_samples_and_references | {"recipes/reference_model.py"}, readers


@pytest.mark.parametrize(("size", "nbytes"), [(7, 7), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("20mb", 20_000_000)])
def test_sizes_are_decimal_unless_marked_binary(size, nbytes):
    assert parse_size(size) == nbytes


@pytest.mark.parametrize("size", ["", "big", "-1", "0", "5 PB"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match="not understood"):
        parse_size(size)


def test_loading_needs_hardly_more_memory_than_the_weights(tmp_path):
    """In a fresh process, where mapped pages would count; 12 MB are allowed for what importing and threads need."""
    model = quest.build(quest.preset("gpt2-tiny").config.__class__(40_000, 384, 1, 4, 1536, 64))
    save(model, tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    size = weights.stat().st_size
    shutil.copytree(tmp_path / "m", tmp_path / "pickled", ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(safetensors.torch.load_file(weights), tmp_path / "pickled/pytorch_model.bin")
    code = """
import sys, llm_quest as q, llm_quest.hub.load_save
def status(field): return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
for folder in sys.argv[1:]:
    model = None
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    before = status("VmRSS"); model = q.load(folder, allow_pickle=True); print(status("VmHWM") - before)
slow = {"torch.distributed.tensor", "torch._dynamo", "sympy", "tokenizers", "huggingface_hub"} & set(sys.modules)
assert not slow, f"loading a folder imports {slow}: a second or more"
"""
    command = [sys.executable, "-c", code, tmp_path / "m", tmp_path / "pickled"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mapped, pickled = map(int, done.stdout.split())
    assert mapped < 1.2 * size + 12e6
    assert pickled < 1.2 * size + 12e6


def test_a_lone_tokenizer_model_that_is_no_sentencepiece_model_is_named(tmp_path):
    save(quest.build("llama3.2-tiny"), tmp_path / "model")
    (tmp_path / "model/tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "nearest"),
    [("ArceeConfig", "llama"), ("CohereConfig", "cohere2"), ("MambaConfig", None), ("T5Config", None)],
)
def test_the_nearest_known_goes_by_fields_and_not_by_spelling(config: str, nearest: str | None):
    from llm_quest.hub.config import family_for

    with pytest.raises(DataError) as refused:
        family_for(getattr(transformers, config)().to_dict())
    said = str(refused.value)
    assert (f"the nearest known is {nearest!r} by its fields" in said) if nearest else ("; known: " in said)


def test_the_hint_names_what_the_nearest_does_not_have():
    from llm_quest.hub.config import family_for

    hf_config = transformers.LlamaConfig().to_dict() | {"model_type": "glama", "logit_twist": 3}
    with pytest.raises(DataError, match=r"the nearest known is 'llama' by its fields \(which has no logit_twist"):
        family_for(hf_config)
