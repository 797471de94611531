"""LLM Quest: modern LLM architectures, training techniques and papers from scratch in plain PyTorch.

    import llm_quest as quest
    model = quest.load("folder or hub id")                  # Hugging Face layout in; a Decoder in eval mode
    model = quest.build("llama3.2-tiny", seed=0)            # random weights, by preset or config
    logits = model(tokens)                                  # (B,T,V)
    out = quest.generate(model, [[1, 2, 3], [4]], max_new_tokens=32, temperature=0.0)
    result = quest.train("sft", model="folder", data="rows.jsonl", max_steps=100)   # a run, with its model
    quest.evaluate(result); quest.generate(result, "text"); quest.chat(result, "question")
    quest.save(model, "folder")                             # Hugging Face layout out
    quest.load_adapter(model, "adapter")                    # PEFT's format in; quest.save_adapter out
    quest.presets()                                         # names

The names are fetched when first used, so that `import llm_quest` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_quest.api import Result as Result
    from llm_quest.api import chat as chat
    from llm_quest.api import evaluate as evaluate
    from llm_quest.api import generate as generate
    from llm_quest.api import train as train
    from llm_quest.data.tokenizer import Tokenizer as Tokenizer
    from llm_quest.generation.sampling import SamplingParams as SamplingParams
    from llm_quest.generation.stopping import Completion as Completion
    from llm_quest.hub.load_adapter import load_adapter as load_adapter
    from llm_quest.hub.load_save import load as load
    from llm_quest.hub.load_save import save as save
    from llm_quest.hub.save_adapter import save_adapter as save_adapter
    from llm_quest.models.build import build as build
    from llm_quest.models.build import preset as preset
    from llm_quest.models.build import presets as presets
    from llm_quest.scope import Scope as Scope

__version__ = "0.1.0"

_EXPORTS = {
    "load": "llm_quest.hub.load_save",
    "save": "llm_quest.hub.load_save",
    "load_adapter": "llm_quest.hub.load_adapter",
    "save_adapter": "llm_quest.hub.save_adapter",
    "build": "llm_quest.models.build",
    "presets": "llm_quest.models.build",
    "preset": "llm_quest.models.build",
    "train": "llm_quest.api",
    "evaluate": "llm_quest.api",
    "generate": "llm_quest.api",
    "chat": "llm_quest.api",
    "Result": "llm_quest.api",
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
