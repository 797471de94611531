"""Published layouts: a table of tiny folders, each in the names and the config.json of a folder on the hub, and the
logits that transformers gives for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import llm_quest as quest
from llm_quest.errors import DataError
from llm_quest.hub.config import family_for, parse_hf_config
from llm_quest.hub.inspect import inspect_folder
from llm_quest.hub.load_save import load, save
from llm_quest.hub.pickled import read_pickled
from llm_quest.hub.safetensors_io import StoredTensor
from tests.family_oracles import DELTA, ORACLES, PARTIAL, SMALL, YARN
from tests.oracles import ATOL, RTOL, edit_config, logits_of, randomize_, save_published, tiny_gpt2, tiny_llama
from tests.oracles import transformers as T

TOKENS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(7))
DENSE = {name: value for name, value in DELTA.items() if "expert" not in name and "moe" not in name}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def edit_names(folder: Path, rename: Callable[[str], str | None]) -> Path:
    """The folder with its tensors renamed; None drops one."""
    held = safetensors.torch.load_file(folder / "model.safetensors")
    new = {rename(name): tensor for name, tensor in held.items()}
    new.pop(None, None)
    safetensors.torch.save_file(new, folder / "model.safetensors", metadata={"format": "pt"})  # type: ignore[arg-type]
    return folder


def text_logits(model: Any) -> Tensor:
    return logits_of(model, TOKENS)


def same_logits(folder: Path, expected: Tensor) -> Any:
    ours = load(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), expected, atol=ATOL, rtol=RTOL)
    return ours


def gemma3_with_images() -> Any:
    text = {**SMALL, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 3, "query_pre_attn_scalar": 20}
    text.pop("attn_implementation")
    config = T.Gemma3Config(
        text_config=text, vision_config={**VISION, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    return randomize_(T.Gemma3ForConditionalGeneration(config))


def qwen3_5_with_images(tied: bool) -> Any:
    text = {**SMALL, **DENSE, "head_dim": 64, "rope_parameters": PARTIAL, "tie_word_embeddings": tied}
    text.pop("attn_implementation")
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    config = T.Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=90, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    model = randomize_(T.Qwen3_5ForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.5 - 1)
    return model


def mistral3_with_images(kind: str, **numbers: Any) -> Any:
    text = {**SMALL, "head_dim": 16, "model_type": kind} | numbers
    text.pop("attn_implementation")
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"head_dim": 16, "intermediate_size": 48, "patch_size": 4, "image_size": 16}
    config = T.Mistral3Config(text_config=text, vision_config=vision, image_token_index=90, tie_word_embeddings=False)
    return randomize_(T.Mistral3ForConditionalGeneration(config))


WRAPPERS = {
    "Mistral-Small-3.1-24B": lambda: mistral3_with_images("mistral", sliding_window=None),
    "Ministral-3-8B": lambda: mistral3_with_images("ministral3", rope_parameters=YARN | {"llama_4_scaling_beta": 0.5}),
    "gemma-3-4b-pt": gemma3_with_images,
    "Qwen3.5-0.8B": lambda: qwen3_5_with_images(tied=True),
    "Qwen3.5-9B": lambda: qwen3_5_with_images(tied=False),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_of_a_model_of_several_parts_is_read_with_a_note(tmp_path, caplog, name: str):
    theirs = WRAPPERS[name]()
    folder = save_published(theirs, tmp_path / "m")
    ours = same_logits(folder, text_logits(theirs))
    assert "the text part is read" in caplog.text
    assert "left out, of other parts of the model: " in caplog.text
    save(ours, tmp_path / "out")
    again, info = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(text_logits(again), text_logits(theirs), atol=ATOL, rtol=RTOL)


def test_what_gemma_3s_text_config_leaves_out_has_its_class_s_values():
    """The published config.json of gemma-3-4b-pt."""
    from llm_quest.hub.layouts import part_of_several
    from llm_quest.models import FAMILIES
    from llm_quest.models.gemma import FAMILY

    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": text | {"rope_scaling": scaling, "sliding_window": 1024}, "vision_config": {},
    }  # fmt: skip
    inner, _ = part_of_several(published, FAMILIES)  # type: ignore[misc]
    assert FAMILY.read(inner) == quest.preset("gemma3-4b").config
    assert inner["torch_dtype"] == "bfloat16"


GEMMA3_4B_IT = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
QWEN3_5_27B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5",
    "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 248057,
    "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
        "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
        "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17408, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
        "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24, "num_hidden_layers": 64,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "use_cache": True, "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "deepstack_visual_indexes": [], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_5",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 5120, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hf_config"), [("gemma3-vision-4b", GEMMA3_4B_IT), ("qwen3.5-vision-27b", QWEN3_5_27B)]
)
def test_the_configs_of_models_with_images_as_they_stand_on_the_hub_are_the_presets(name: str, hf_config: dict):
    config, problems = parse_hf_config(family_for(hf_config), hf_config)
    assert not problems
    assert config == quest.preset(name).config
    for part in ("text_config", "vision_config"):
        _, problems = parse_hf_config(family_for(hf_config), hf_config | {part: hf_config[part] | {"use_new": True}})
        assert "use_new (True): not known to" in "".join(problems)


PREFIXES: dict[str, Callable[[str], str]] = {
    "of AutoModel": lambda name: name.removeprefix("model.").removeprefix("transformer."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "a compiled layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace("h.0.", "h.0._orig_mod."),
    "of DDP": lambda name: f"module.{name}",
    "of DDP, compiled": lambda name: f"module._orig_mod.{name}",
    "of FSDP": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "of a language_model": lambda name: f"language_model.{name}",
}
NOT_PUBLISHED = [("gpt2", "of a language_model")]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [pair for pair in itertools.product(("llama", "gpt2", "qwen3"), PREFIXES) if pair not in NOT_PUBLISHED],
)
def test_prefixes_that_wrappers_leave_are_understood(tmp_path, name: str, prefix: str):
    theirs = {"llama": lambda: tiny_llama(tie_word_embeddings=False), "gpt2": tiny_gpt2, **ORACLES}[name]()
    folder = edit_names(save_published(theirs, tmp_path / "m"), PREFIXES[prefix])
    same_logits(folder, text_logits(theirs))


def test_names_that_mean_one_tensor_are_refused_together(tmp_path):
    folder = save_published(tiny_llama(), tmp_path / "m")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    held["_orig_mod.model.norm.weight"] = torch.zeros(64)
    safetensors.torch.save_file(held, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"stored twice.*_orig_mod\.model\.norm\.weight, model\.norm\.weight"):
        load(folder)


def test_a_prefix_hides_no_tensor_that_does_not_belong(tmp_path):
    folder = edit_names(save_published(tiny_llama(), tmp_path / "m"), lambda name: name.replace("norm.w", "norms.w", 1))
    with pytest.raises(DataError, match=r"missing: .*model\.norm\.weight\n.*unexpected: .*model\.norms\.weight"):
        load(folder)


def test_a_model_without_its_head_says_which_class_saved_it(tmp_path):
    theirs = tiny_llama(tie_word_embeddings=False)
    theirs.model.save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match=r"missing: lm_head\.weight \(saved by LlamaModel, without an output matrix"):
        load(tmp_path / "m")


UNTIED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tiny_gpt2(tie_word_embeddings=False),
    "llama": lambda: tiny_llama(tie_word_embeddings=False),
    "gemma3": lambda: untie_head("gemma3"),
    "qwen3": lambda: untie_head("qwen3"),
}


def untie_head(name: str) -> Any:
    config = ORACLES[name]().config
    config.tie_word_embeddings = False
    return randomize_(T.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("name", UNTIED)
def test_a_head_of_its_own_is_used_whatever_config_json_says(tmp_path, caplog, name: str, said: bool):
    theirs = UNTIED[name]()
    folder = save_published(theirs, tmp_path / "m")
    edit_config(folder, lambda c: c.update(tie_word_embeddings=said))
    expected = text_logits(T.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    torch.testing.assert_close(expected, text_logits(theirs))
    ours = same_logits(folder, expected)
    assert ("a head of its own" in caplog.text) == said
    save(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    again, info = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(text_logits(again), expected, atol=ATOL, rtol=RTOL)


def test_a_tied_matrix_stored_as_the_head_alone_is_the_embedding_too(tmp_path):
    theirs = tiny_llama()
    folder = save_published(theirs, tmp_path / "m")
    edit_names(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    same_logits(folder, text_logits(theirs))


SCORERS = {
    "reward model": ("LlamaForSequenceClassification", "LlamaConfig", 1),
    "classifier": ("Qwen3ForSequenceClassification", "Qwen3Config", 3),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", 2),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_sequence_classifier_is_a_model_with_a_score_head(tmp_path, name: str):
    model, kind, outputs = SCORERS[name]
    sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4} if name == "gpt2" else SMALL
    config = getattr(T, kind)(**{**sizes, "pad_token_id": 0, "num_labels": outputs})
    if outputs == 3:
        config.id2label = {0: "bad", 1: "good", 2: "odd"}
    theirs = randomize_(getattr(T, model)(config))
    theirs.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m")
    (head,) = ours.spec.techniques
    assert (head.outputs, head.labels) == (outputs, ("bad", "good", "odd") if outputs == 3 else ())
    tokens = TOKENS.clamp(min=1)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        torch.testing.assert_close(ours(tokens)[:, -1], expected, atol=ATOL, rtol=RTOL)
        save(ours, tmp_path / "out")
        again, info = getattr(T, model).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info
        again.config.pad_token_id = 0
        torch.testing.assert_close(again.eval()(input_ids=tokens).logits, expected, atol=ATOL, rtol=RTOL)


def vit_config(**more: Any) -> Any:
    return T.ViTConfig(**VISION, image_size=16, patch_size=4, **more)


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_a_vit_without_classes_gives_the_class_tokens_vector(tmp_path):
    """google/vit-base-patch16-224-in21k: a ViTModel, names without `vit.`, a pooler and no classifier."""
    theirs = randomize_(T.ViTModel(vit_config()))
    theirs.save_pretrained(tmp_path / "m")
    names = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert "pooler.dense.weight" in names
    assert "embeddings.cls_token" in names
    ours = load(tmp_path / "m")
    with torch.no_grad():
        expected = theirs(pixel_values=images()).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(images()), expected, atol=ATOL, rtol=RTOL)
        save(ours, tmp_path / "out")
        again = load(tmp_path / "out")
        torch.testing.assert_close(again.state_dict(), ours.state_dict(), atol=0, rtol=0)
        torch.testing.assert_close(again(images()), ours(images()), atol=ATOL, rtol=RTOL)  # mapped elsewhere in memory
        again = T.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(again(pixel_values=images()).logits, expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("old", [False, True])
def test_the_image_encoder_of_a_whole_clip_is_read_with_a_note(tmp_path, caplog, old: bool):
    text = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {**VISION, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
    config = T.CLIPConfig(text_config=text | {"num_attention_heads": 2}, vision_config=vision, projection_dim=12)
    theirs = randomize_(T.CLIPModel(config))
    theirs.save_pretrained(tmp_path / "m")
    if old:
        edit_config(tmp_path / "m", lambda c: c.update(vision_config_dict=c["vision_config"], vision_config={}))
        edit_names(tmp_path / "m", lambda name: name)
    ours = load(tmp_path / "m")
    assert "text_projection (1 tensor)" in caplog.text
    with torch.no_grad():
        expected = theirs.get_image_features(images()).pooler_output
        torch.testing.assert_close(ours(images()), expected, atol=ATOL, rtol=RTOL)
        save(ours, tmp_path / "out")
        again = T.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(again(pixel_values=images()).image_embeds, expected, atol=ATOL, rtol=RTOL)


def test_the_experts_of_a_layer_may_be_stored_as_one_tensor(tmp_path):
    theirs = ORACLES["qwen3_5_moe_text"]()
    folder = save_published(theirs, tmp_path / "m")
    held, fused = safetensors.torch.load_file(folder / "model.safetensors"), {}
    for layer in range(4):
        root = f"model.layers.{layer}.mlp.experts."
        parts = [{p: held.pop(f"{root}{e}.{p}_proj.weight") for p in ("gate", "up", "down")} for e in range(8)]
        fused[f"{root}gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in parts])
        fused[f"{root}down_proj"] = torch.stack([one["down"] for one in parts])
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in (held | fused).items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors")
    same_logits(folder, text_logits(theirs))


def test_an_added_token_without_a_row_is_a_note(tmp_path, caplog):
    """google/gemma-3-1b-pt: 262,144 rows, and <image_soft_token> has id 262,144."""
    folder = save_published(tiny_llama(), tmp_path / "m")
    vocabulary = {chr(0x4E00 + i): i for i in range(97)}
    content = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [{"id": 97, "content": "<image>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    load(folder)
    assert "added tokens without a row, which a prompt may not hold: <image> (97)" in caplog.text
    content["model"]["vocab"]["more"] = 98  # type: ignore[index]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json has token id 98, but the embedding has only 97 rows"):
        load(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, file: str):
    folder = save_published(tiny_llama(), tmp_path / "m")
    if file.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f3d\nsize 988097824\n")
    with pytest.raises(DataError, match=rf"{file}: is a git-lfs pointer, not the file: run `git lfs pull`"):
        load(folder, allow_pickle=True)


def write_pickled_folder(tmp_path: Path, shards: int = 1) -> tuple[Path, Tensor]:
    """What Trainer wrote before safetensors: the weights beside the states of the training."""
    theirs = tiny_llama()
    folder = save_published(theirs, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    state = dict(theirs.named_parameters())
    names = sorted(state)
    weight_map = {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: state[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"state": {}, "param_groups": [{"lr": 1e-3}]}, folder / "optimizer.pt")
    torch.save({"last_epoch": 5}, folder / "scheduler.pt")
    for name in ("training_args.bin", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        torch.save({"a": 1}, folder / name)
    return folder, text_logits(theirs)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_trainers_checkpoint_of_parameters_is_read_where_pickles_are_allowed(tmp_path, monkeypatch, shards: int):
    folder, expected = write_pickled_folder(tmp_path, shards)
    with pytest.raises(DataError, match=r"only pickled weights here \(pytorch_model.*allow_pickle=True"):
        load(folder)
    with torch.no_grad():
        torch.testing.assert_close(load(folder, allow_pickle=True)(TOKENS), expected, atol=ATOL, rtol=RTOL)
    read = [one for file in folder.glob("pytorch_model*.bin") for one in read_pickled(file).values()]
    assert all(isinstance(one, StoredTensor) for one in read)
    monkeypatch.setenv("LLM_QUEST_ALLOW_PICKLE", "1")
    assert load(folder).config.vocab_size == 97
    with pytest.raises(DataError, match="only pickled weights"):
        load(folder, allow_pickle=False)
    if shards > 1:
        (folder / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(DataError, match=r"missing file: pytorch_model-00002-of-00002\.bin"):
            load(folder, allow_pickle=True)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_beside_a_trainings_own_state_are_found(tmp_path, key: str):
    theirs = tiny_llama()
    folder = save_published(theirs, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({key: theirs.state_dict(), "step": 7, "optimizer": {"state": {}}}, folder / "pytorch_model.bin")
    with torch.no_grad():
        ours = load(folder, allow_pickle=True)(TOKENS)
    torch.testing.assert_close(ours, text_logits(theirs), atol=ATOL, rtol=RTOL)


def test_a_classifier_of_tokens_is_called_one(tmp_path):
    T.LlamaForTokenClassification(T.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match=r"unexpected: score\.bias \(a label for each token"):
        load(tmp_path / "m")


def test_weights_of_another_format_are_named(tmp_path):
    folder = save_published(tiny_llama(), tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(DataError, match=r"no model\.safetensors.*only consolidated\.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["deepseek_v3", "mimo_v2_flash"])
def test_a_routers_bias_stays_float32_in_a_bfloat16_folder_in_and_out(tmp_path, name: str):
    folder = save_published(ORACLES[name]().to(torch.bfloat16), tmp_path / "m")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    biases = {key: 6.8 + 0.25 * torch.rand(t.shape) for key, t in held.items() if key.endswith("correction_bias")}
    safetensors.torch.save_file(held | biases, folder / "model.safetensors", metadata={"format": "pt"})
    ours = load(folder)
    assert ours.embed.token.weight.dtype == torch.bfloat16
    save(ours, tmp_path / "out")
    out = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    reference = T.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert biases
    for key, bias in biases.items():
        assert torch.equal(reference[key], bias)
        assert torch.equal(out[key], bias)
    assert {t.dtype for key, t in out.items() if key not in biases} == {torch.bfloat16}


def to_fp8(weight: Tensor, block: tuple[int, int], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, s and the matrix that they stand for: by its definition, number for number."""
    rows, columns = weight.shape
    s = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    q, decoded = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            tile = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = weight[tile].abs().max() / 448
            s[i, j] = 2.0 ** scale.log2().ceil() if kind == "ue8m0" else scale
            q[tile] = (weight[tile] / s[i, j]).to(torch.float8_e4m3fn)
            decoded[tile] = q[tile].to(torch.float32) * s[i, j]
    return q, s.to(torch.float8_e8m0fnu) if kind == "ue8m0" else s, decoded


FP8 = {
    "DeepSeek-V3": ("deepseek_v3", "float32", "model."),
    "DeepSeek-V3.1, powers of two": ("deepseek_v3", "ue8m0", "model."),
    "MiMo-V2-Flash": ("mimo_v2_flash", "float32", "model."),
    "Kimi, within another model": ("deepseek_v3", "float32", "language_model.model."),
}


@pytest.mark.parametrize("name", FP8)
def test_block_scaled_fp8_is_decoded_exactly(tmp_path, name: str):
    """Blocks of 16 x 32: the last ones are partial, as in DeepSeek's kv_a_proj."""
    family, kind, root = FP8[name]
    theirs = ORACLES[family]()
    folder = save_published(theirs, tmp_path / "m")
    held, stored, decoded = safetensors.torch.load_file(folder / "model.safetensors"), {}, {}
    for key, tensor in held.items():
        new = key.replace("model.", root, 1)
        if (tensor.dim() == 2 and key.endswith("_proj.weight")) or "kv_a_proj" in key:
            stored[new], stored[f"{new}_scale_inv"], decoded[key] = to_fp8(tensor, (16, 32), kind)
        else:
            stored[new] = tensor if key.endswith("correction_bias") else tensor.to(torch.bfloat16)
            decoded[key] = stored[new]
    shapes = [t.shape for t in stored.values() if t.dtype == torch.float8_e4m3fn]
    assert any(rows % 16 for rows, _ in shapes) or any(columns % 32 for _, columns in shapes)
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
    edit_config(folder, lambda c: c.update(quantization_config=quantized, torch_dtype="bfloat16", dtype="bfloat16"))
    for dtype in (torch.float32, torch.bfloat16):
        save(load(folder, dtype=dtype), tmp_path / str(dtype))
        ours = safetensors.torch.load_file(tmp_path / str(dtype) / "model.safetensors")
        assert ours.keys() == decoded.keys()
        for key, tensor in ours.items():
            bias = key.endswith("correction_bias")
            assert torch.equal(tensor, decoded[key].to(torch.float32 if bias else dtype)), key
    assert load(folder).embed.token.weight.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "torch.float32/config.json").read_text())


@pytest.mark.parametrize("rows", [1, 48])
def test_one_scale_for_a_matrix_or_for_a_row_is_decoded_too(tmp_path, rows: int):
    folder = save_published(tiny_llama(tie_word_embeddings=False), tmp_path / "m")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    scale = torch.rand(rows, 1) if rows > 1 else torch.tensor(0.37)
    q = (held[name] / scale).to(torch.float8_e4m3fn)
    expected = q.to(torch.float32) * scale
    more = {name: q, f"{name}_scale_inv": scale, name.replace(".weight", ".activation_scale"): torch.ones(())}
    safetensors.torch.save_file(held | more, folder / "model.safetensors")
    edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "fp8", "weight_block_size": None}))
    save(load(folder), tmp_path / "out")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out/model.safetensors")[name], expected)


def test_scales_that_do_not_fit_are_named(tmp_path):
    folder = save_published(tiny_llama(), tmp_path / "m")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    more = {name: held[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(3, 3)}
    safetensors.torch.save_file(held | more, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"unexpected: .*up_proj\.weight_scale_inv \(scales of fp8"):
        load(folder)
    edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}))
    with pytest.raises(
        DataError, match=r"scales of shape \(3, 3\) do not fit a matrix \(112, 64\) in blocks of \(16, 16\)"
    ):
        load(folder)


def test_a_large_number_in_a_field_that_nobody_reads_forbids_nothing(tmp_path):
    folder = save_published(tiny_llama(), tmp_path / "m")
    edit_config(folder, lambda c: c.update(n_params=135_000_000, seed=20_240_601, tokens_seen=11_000_000_000))
    load(folder)


def test_one_fault_in_a_part_is_one_complaint(tmp_path):
    vision = T.CLIPVisionConfig(**VISION, image_size=16, patch_size=4)
    config = T.LlavaConfig(vision_config=vision, text_config=T.BertConfig(), image_token_index=96)
    config.save_pretrained(tmp_path / "m")
    assert [p for p in inspect_folder(tmp_path / "m").problems if "config.json" in p] == [
        "config.json: text_config has model_type 'bert'; here it may be llama or qwen3 or gpt2"
    ]
