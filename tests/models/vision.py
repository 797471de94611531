"""Tiny random vision models of transformers, every tensor random, and the folders they are saved to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch

import llm_quest as quest
from tests.oracles import randomize_, save_published, transformers

SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
IMAGE, PATCHES = 96, 16


def their_vit(**overrides: Any) -> Any:
    numbers = SIZES | {"num_hidden_layers": 2, "num_labels": 5, "attn_implementation": "eager"} | overrides
    return randomize_(transformers.ViTForImageClassification(transformers.ViTConfig(**numbers)))


def their_llava(vision: str = "clip", **overrides: Any) -> Any:
    """LLaVA with a CLIP (or ViT) tower of 3 layers and a Llama of 2; placeholder 96, 16 patches."""
    towers = {"clip": transformers.CLIPVisionConfig, "vit": transformers.ViTConfig}
    text = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )  # fmt: skip
    tower = towers[vision](**SIZES, num_hidden_layers=3)
    numbers = {"image_token_index": IMAGE, "image_seq_length": PATCHES} | overrides
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, **numbers)
    return randomize_(transformers.LlavaForConditionalGeneration(config))


CLIP_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "max_position_embeddings": 24, "bos_token_id": 94, "eos_token_id": 95, "pad_token_id": 0,
}  # fmt: skip


def their_clip(hidden_act: str = "quick_gelu", **text: Any) -> Any:
    """CLIP with two encoders of two layers, and 24 numbers for an image or a text."""
    parts = {"vision_config": {**SIZES, "num_hidden_layers": 2}, "text_config": CLIP_TEXT | text}
    acting = {name: part | {"hidden_act": hidden_act} for name, part in parts.items()}
    return randomize_(transformers.CLIPModel(transformers.CLIPConfig(**acting, projection_dim=24)))


GEMMA3_TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
    "max_position_embeddings": 256, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


def their_gemma3(**overrides: Any) -> Any:
    """Gemma 3 with a SigLIP tower of 3 layers, whose 64 patches are pooled to 16: longer than the window of 7."""
    config = transformers.Gemma3Config(
        text_config=GEMMA3_TEXT, vision_config={**SIZES, "patch_size": 4, "num_hidden_layers": 3},
        mm_tokens_per_image=PATCHES, image_token_index=IMAGE, boi_token_index=94, eoi_token_index=95, **overrides,
    )  # fmt: skip
    return randomize_(transformers.Gemma3ForConditionalGeneration(config))


QWEN3_5_TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "pad_token_id": None,
    "eos_token_id": None, "bos_token_id": None, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_num_value_heads": 4, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip
QWEN3_5_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
QWEN3_5_VISION = {
    "depth": 3, "hidden_size": 48, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64, "patch_size": 4,
    "num_position_embeddings": 36,
}  # fmt: skip


def their_qwen3_5(kind: str = "Qwen3_5", **overrides: Any) -> Any:
    """Qwen3.5 (or "Qwen3_5Moe") with a tower of 3 layers: patches of 4, so that images are of multiples of 8."""
    text = QWEN3_5_TEXT | (QWEN3_5_EXPERTS if kind.endswith("Moe") else {})
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=QWEN3_5_VISION, image_token_id=IMAGE, video_token_id=95,
        vision_start_token_id=94, vision_end_token_id=93, **overrides,
    )  # fmt: skip
    model = randomize_(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # so that states live longer than a token
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.5 - 1)
    return model


def qwen_patches(pictures: Sequence[torch.Tensor], side: int = 4) -> dict[str, torch.Tensor]:
    """Images (C,H,W) as transformers' Qwen models read them: every patch twice in time, in blocks of 2 x 2."""
    rows, grids = [], []
    for image in pictures:
        down, across = image.shape[1] // side, image.shape[2] // side
        cut = image.reshape(3, down // 2, 2, side, across // 2, 2, side).permute(1, 4, 2, 5, 0, 3, 6)
        rows.append(cut[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(down * across, -1))
        grids.append([1, down, across])
    return {"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids)}


def load_ours(theirs: Any, **options: Any) -> Any:
    """Ours, from the folder that theirs wrote."""
    with tempfile.TemporaryDirectory() as folder:
        return quest.load(save_published(theirs, folder), vision=True, **options)


def images(number: int, side: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(number, channels, side, side, generator=torch.Generator().manual_seed(7))


def tokens_with_images(
    length: int, *starts: int, patches: int = PATCHES, vocab: int = 96, placeholder: int = IMAGE
) -> torch.Tensor:
    """A row of random tokens for each start, with an image's placeholders from there on."""
    tokens = torch.randint(vocab, (len(starts), length), generator=torch.Generator().manual_seed(3))
    for row, start in zip(tokens, starts, strict=True):
        row[start : start + patches] = placeholder
    return tokens
