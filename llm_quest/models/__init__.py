"""Model families, one file each. A new family is its file and an entry here."""

from __future__ import annotations

from llm_quest.models import (
    clip,
    clip_model,
    clip_text,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    exaone4,
    gemma,
    gemma1,
    gemma3,
    glm4,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    helium,
    llama,
    llava,
    mimo,
    ministral,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_vision,
    qwen3_next,
    seed_oss,
    siglip,
    smollm3,
    stablelm,
    starcoder2,
    vit,
)
from llm_quest.models.family import Family

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    llama.FAMILY,
    gpt_neox.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
    qwen2.FAMILY,
    phi3.FAMILY,
    stablelm.FAMILY,
    starcoder2.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    cohere2.FAMILY,
    glm4.FAMILY,
    seed_oss.FAMILY,
    helium.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    exaone4.FAMILY,
    gemma1.FAMILY,
    gemma.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
    gpt_oss.FAMILY,
    qwen3.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    qwen3_next.FAMILY,
    mimo.FAMILY,
)

VISION_FAMILIES: tuple[Family, ...] = (
    *(vit.FAMILY, clip.FAMILY, clip_text.FAMILY, clip_model.FAMILY),
    *(llava.FAMILY, gemma3.FAMILY, qwen3_5.FAMILY),
)
"""Families that read images, and CLIP's text encoder. They have tests of their own (tests/models)."""

PART_FAMILIES: tuple[Family, ...] = (siglip.FAMILY, qwen3_5_vision.FAMILY, *FAMILIES, *VISION_FAMILIES)
"""Families of which a part of a model of several may be: towers that are no models of their own here, and the above."""
