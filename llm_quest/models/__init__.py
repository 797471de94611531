"""First floor: one page per family. A new family is its page and one line here."""

from __future__ import annotations

from llm_quest.models import gpt2, llama
from llm_quest.models.page import Page

PAGES: tuple[Page, ...] = (gpt2.PAGE, llama.PAGE)
