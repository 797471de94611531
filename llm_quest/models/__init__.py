"""First floor: one page per family. A new family is its page and one line here."""

from __future__ import annotations

from llm_quest.models import (
    clip,
    deepseek_v3,
    gemma,
    gpt2,
    llama,
    mimo,
    mixtral,
    qwen3,
    qwen3_next,
    vision_language,
    vit,
)
from llm_quest.models.page import Page

PAGES: tuple[Page, ...] = (
    gpt2.PAGE,
    llama.PAGE,
    gemma.PAGE,
    mixtral.PAGE,
    qwen3.PAGE,
    deepseek_v3.PAGE,
    qwen3_next.PAGE,
    mimo.PAGE,
)

VISION_PAGES: tuple[Page, ...] = (vit.PAGE, clip.PAGE, vision_language.PAGE)
"""Those that read images. They have laws of their own (tests/models), for they are no decoders of tokens alone."""
