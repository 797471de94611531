"""LLM Quest: modern LLM architectures, training techniques and papers from scratch in plain PyTorch.

    import llm_quest as quest
    model = quest.load("folder or hub id")                  # Hugging Face layout in; a Decoder in eval mode
    model = quest.build("llama3.2-tiny", seed=0)            # random weights, by preset or config
    logits = model(tokens)                                  # (B,T,V)
    out = quest.generate(model, [[1, 2, 3], [4]], max_new_tokens=32, temperature=0.0)
    quest.save(model, "folder")                             # Hugging Face layout out
    quest.load_adapter(model, "adapter")                    # PEFT's format in; quest.save_adapter out
    quest.presets()                                         # names

The names are fetched when first used, so that `import llm_quest` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load": "llm_quest.hub.load_save",
    "save": "llm_quest.hub.load_save",
    "load_adapter": "llm_quest.hub.load_adapter",
    "save_adapter": "llm_quest.hub.save_adapter",
    "build": "llm_quest.models.build",
    "presets": "llm_quest.models.build",
    "preset": "llm_quest.models.build",
    "generate": "llm_quest.generation.generate",
    "Completion": "llm_quest.generation.stopping",
    "SamplingParams": "llm_quest.generation.sampling",
    "Scope": "llm_quest.scope",
    "Tokenizer": "llm_quest.data.tokenizer",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"llm_quest has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
