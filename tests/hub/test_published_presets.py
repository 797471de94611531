"""Every preset's own hub id: a tiny model in the layout of that very folder is loaded number for number, and the fields
that its publishers write into config.json are known."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import llm_quest as quest
from llm_quest.contracts import Preset
from llm_quest.hub.config import parse_hf_config
from llm_quest.hub.load_save import load, save
from llm_quest.hub.mxfp4 import VALUES
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.build import family_of

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, dict[str, Any]], tuple[Tensors, dict[str, Any]]]


def as_part_of(wrapper: str, rename: Callable[[str], str], other: str) -> Change:
    """A model of several parts: the numbers in text_config, the tensors under a prefix, beside those of a tower."""

    def change(held: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        inner = {name: value for name, value in config.items() if name not in ("architectures", "dtype", "torch_dtype")}
        outer = {"model_type": wrapper, "architectures": ["X"], "text_config": inner, "vision_config": {"depth": 1}}
        outer |= {"dtype": config["dtype"], "tie_word_embeddings": config["tie_word_embeddings"]}
        return {rename(name): tensor for name, tensor in held.items()} | {other: torch.ones(2)}, outer

    return change


def without_prefix(prefix: str) -> Change:
    return lambda held, config: ({name.removeprefix(prefix): tensor for name, tensor in held.items()}, config)


def in_fp8(held: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Each projection in blocks of 128 with a scale of 1 a block: numbers that fp8 holds stay as they are."""
    stored: Tensors = {}
    for name, tensor in held.items():
        if name.endswith("_proj.weight") and tensor.dim() == 2:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.ones(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128))
        else:
            stored[name] = tensor
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return stored, config | {"quantization_config": blocks}


def in_mxfp4(held: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The experts' matrices in blocks of 32 numbers with a scale of 1/8."""
    stored: Tensors = {}
    for name, tensor in held.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks = mxfp4_blocks(tensor.mT * 8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full_like(blocks[..., 0], 127 - 3)}
        else:
            stored[name] = tensor
    return stored, config | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]}}


def mxfp4_blocks(numbers: Tensor) -> Tensor:
    """(E,out,in) of numbers that a code has -> (E,out,in/32,16)."""
    codes = (numbers[..., None] == torch.tensor(VALUES[:8] + VALUES[9:])).int().argmax(-1)
    codes = (codes + (codes > 7)).to(torch.uint8).unflatten(-1, (-1, 16, 2))
    return (codes[..., 0] | codes[..., 1] << 4).contiguous()


def as_it_is(held: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    return held, config


def qwen3_5_name(name: str) -> str:
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


LAYOUTS: dict[str, Change] = {
    r"openai-community/gpt2.*": without_prefix("transformer."),
    r"google/gemma-3-(4b|12b|27b)-pt": as_part_of(
        "gemma3", lambda name: f"language_model.{name}", "vision_tower.x.weight"
    ),
    r"mistralai/Ministral-3-.*": as_part_of("mistral3", lambda name: f"language_model.{name}", "vision_tower.x.weight"),
    r"Qwen/Qwen3\.5-.*A3B": as_part_of("qwen3_5_moe", qwen3_5_name, "model.visual.x.weight"),
    r"Qwen/Qwen3\.5-\d.*B": as_part_of("qwen3_5", qwen3_5_name, "model.visual.x.weight"),
    r"deepseek-ai/DeepSeek-V3|moonshotai/Kimi-K2-Base|XiaomiMiMo/MiMo-V2-Flash": in_fp8,
    r"openai/gpt-oss-.*": in_mxfp4,
    r".*": as_it_is,
}
"""Hub id -> what its files differ in from those that we write. The first pattern that matches counts."""


def hub_presets() -> Iterator[Preset]:
    for family in (*FAMILIES, *VISION_FAMILIES):
        yield from (preset for preset in family.presets if preset.hub_id)


WHOLE = ("image-text-to-text", "zero-shot-image-classification")
"""Tasks of models of several parts, which are loaded whole."""
PRESETS = {preset.name: preset for preset in hub_presets()}


def layout(preset: Preset) -> Change:
    """A model that reads images is itself the model of several parts."""
    if family_of(preset.config).pipeline_tag in WHOLE:
        return as_it_is
    hub_id = str(preset.hub_id)
    return next(change for pattern, change in LAYOUTS.items() if re.fullmatch(pattern, hub_id))


@functools.cache
def tiny_like(name: str) -> str:
    """The tiny preset that is most like this one: of its family, with the same model_type."""
    family = family_of(PRESETS[name].config)
    kind = family.publish(PRESETS[name].config)["model_type"]
    tiny = [one for one in family.presets if one.name.endswith("-tiny")]
    alike = [one for one in tiny if family.publish(one.config)["model_type"] == kind]
    return (alike or tiny)[0].name


@functools.cache
def tiny_model(name: str) -> Any:
    """With numbers that every dtype holds, also fp8 and MXFP4 with a scale of 1/8."""
    model = quest.build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.tensor(VALUES)[torch.randint(16, parameter.shape, generator=generator)] / 8)
    return model


@pytest.mark.parametrize("name", PRESETS)
def test_a_tiny_model_in_the_layout_of_the_presets_hub_id_is_loaded_number_for_number(tmp_path: Path, name: str):
    model = tiny_model(tiny_like(name))
    save(model, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    config = json.loads((tmp_path / "m/config.json").read_text())
    held, config = layout(PRESETS[name])(safetensors.torch.load_file(file), config)
    safetensors.torch.save_file(held, file, metadata={"format": "pt"})
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    ours = load(tmp_path / "m", vision=family_of(model.config).pipeline_tag in WHOLE)
    assert ours.config == model.config
    pairs = zip(ours.named_parameters(), model.named_parameters(), strict=True)
    assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)


COMMON = {"_name_or_path": "x", "transformers_version": "4.46.0", "use_cache": True, "initializer_range": 0.02}
DEEPSEEK = {
    "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1,
    "scoring_func": "sigmoid", "seq_aux": True, "topk_method": "noaux_tc", "auto_map": {"AutoConfig": "c.C"},
    "num_nextn_predict_layers": 1, "hidden_act": "silu", "norm_topk_prob": True,
}  # fmt: skip
QWEN = {"attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
DEEPSEEK_V2 = DEEPSEEK | {"scoring_func": "softmax", "norm_topk_prob": False}
del DEEPSEEK_V2["num_nextn_predict_layers"], DEEPSEEK_V2["topk_method"]
WRITTEN: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V2-Lite": DEEPSEEK_V2 | {"topk_method": "greedy"},
    "deepseek-ai/DeepSeek-V2": DEEPSEEK_V2 | {"topk_method": "group_limited_greedy"},
    "deepseek-ai/DeepSeek-V3": DEEPSEEK,
    "moonshotai/Moonlight-16B-A3B": DEEPSEEK,
    "moonshotai/Kimi-K2-Base": DEEPSEEK | {"model_type": "kimi_k2", "num_nextn_predict_layers": 0},
    "XiaomiMiMo/MiMo-V2-Flash": {
        "attention_dropout": 0.0, "attention_chunk_size": 128, "hybrid_block_size": None, "sliding_window": 128,
        "sliding_window_size": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_shared_experts": None,
        "routed_scaling_factor": None, "rope_scaling": None, "auto_map": {},
    },
    "openai/gpt-oss-20b": {
        "attention_dropout": 0.0, "experts_per_token": 4, "initial_context_length": 4096, "output_router_logits": False,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    },
    "google/gemma-2-2b": {
        "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "attention_dropout": 0.0, "sliding_window_size": 4096,
    },
    "google/gemma-3-1b-pt": {
        "cache_implementation": "hybrid", "attention_dropout": 0.0, "rope_scaling": None, "sliding_window_pattern": 6,
    },
    "Qwen/Qwen3-0.6B": QWEN,
    "Qwen/Qwen3-30B-A3B": QWEN | {"output_router_logits": False, "max_window_layers": 48},
    "Qwen/Qwen2.5-7B": QWEN | {"sliding_window": 131_072, "use_mrope": False},
    "Qwen/Qwen1.5-MoE-A2.7B": QWEN | {"output_router_logits": False, "sliding_window": 32_768},
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {
        "attention_dropout": 0.0, "output_router_logits": False, "full_attention_interval": 4, "rope_scaling": None,
    },
    "Qwen/Qwen3.5-0.8B": {
        "attn_output_gate": True, "full_attention_interval": 4, "mamba_ssm_dtype": "float32", "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "attention_dropout": 0.0,
    },
    "mistralai/Mixtral-8x7B-v0.1": {"attention_dropout": 0.0, "output_router_logits": False, "sliding_window": None},
    "mistralai/Mistral-7B-v0.1": {"attention_dropout": 0.0},
    "meta-llama/Llama-3.2-1B": {"attention_dropout": 0.0, "pretraining_tp": 1, "mlp_bias": False},
    "openai-community/gpt2": {
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "summary_activation": None, "n_ctx": 1024,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "microsoft/phi-4": {
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "mlp_bias": False, "attention_bias": False, "sliding_window": None,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "attention_dropout": 0.0, "max_window_layers": 28, "no_rope_layer_interval": 4, "pretraining_tp": 2,
    },
    "allenai/OLMo-2-1124-7B": {"attention_dropout": 0.0, "rope_scaling": None},
    "allenai/OLMoE-1B-7B-0924": {"attention_dropout": 0.0, "output_router_logits": False, "rope_scaling": None},
    "EleutherAI/pythia-160m": {
        "attention_dropout": 0.0, "classifier_dropout": 0.1, "hidden_dropout": 0.0, "rope_scaling": None,
        "use_parallel_residual": True, "attention_bias": True,
    },
    "bigcode/starcoder2-3b": {
        "attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1, "mlp_type": "default",
        "norm_type": "layer_norm", "use_bias": True,
    },
    "google/vit-base-patch16-224": {"encoder_stride": 16, "attention_probs_dropout_prob": 0.0},
    "openai/clip-vit-large-patch14-336": {"initializer_factor": 1.0, "text_config_dict": None},
}  # fmt: skip
"""Hub id -> fields that its config.json has beside those that we write."""


@pytest.mark.parametrize("hub_id", WRITTEN)
def test_what_the_publishers_write_beside_the_numbers_is_known(hub_id: str):
    preset = next((one for one in PRESETS.values() if one.hub_id == hub_id), None)
    assert preset is not None, "of no preset: name another"
    family = family_of(preset.config)
    config, problems = parse_hf_config(family, family.publish(preset.config) | COMMON | WRITTEN[hub_id])
    assert problems == []
    if hub_id not in CHANGING:
        assert config == preset.config


CHANGING = {
    "deepseek-ai/DeepSeek-V3": "names a multi-token module, which the files decide on",
    "moonshotai/Moonlight-16B-A3B": "likewise",
    "openai-community/gpt2": "dropouts, which our presets leave out",
}
"""Hub ids whose fields say another thing than the preset, and why that is right."""


def test_every_layout_is_of_some_preset():
    used = {id(layout(preset)) for preset in PRESETS.values()}
    assert used == {id(change) for change in LAYOUTS.values()}
