"""Model families, one file each. A new family is its file and an entry here."""

from __future__ import annotations

from llm_quest.models import (
    clip,
    deepseek_v3,
    gemma,
    gemma1,
    gpt2,
    gpt_neox,
    granite,
    llama,
    llava,
    mimo,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_next,
    smollm3,
    stablelm,
    vit,
)
from llm_quest.models.family import Family

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    llama.FAMILY,
    gpt_neox.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    phi3.FAMILY,
    stablelm.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    olmo2.FAMILY,
    gemma1.FAMILY,
    gemma.FAMILY,
    mixtral.FAMILY,
    qwen3.FAMILY,
    deepseek_v3.FAMILY,
    qwen3_next.FAMILY,
    mimo.FAMILY,
)

VISION_FAMILIES: tuple[Family, ...] = (vit.FAMILY, clip.FAMILY, llava.FAMILY)
"""Families that read images. They have tests of their own (tests/models)."""
