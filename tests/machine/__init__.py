"""Profiles of machines, kept: what `auto` means does not depend on how busy the machine of the tests is."""

from __future__ import annotations

import os
from pathlib import Path

PROFILES = Path(__file__).parent / "profiles"


def use_kept_profile() -> None:
    """A profile measured on a busy machine has other rates each time; another form of a product has other last bits."""
    import torch

    from llm_quest.machine.hardware import bf16_support

    name = "avx512_bf16" if bf16_support(torch.device("cpu"))[0] else "avx2"
    os.environ["LLM_QUEST_MACHINE_PROFILE"] = str(PROFILES / f"{name}.json")
