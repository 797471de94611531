"""The training loop. It knows only `contracts.py`, `errors.py`, `files.py`, `tensor_files.py` and the machine, so it
trains whatever satisfies the contracts: an objective (a batch in, a loss out), a loader (micro-batches, with a state),
callbacks and evaluators.

The package is also `quest.train(...)`, the function of `llm_quest.api`: as soon as anything imports from a package, its
name in `llm_quest` is the package, so the package itself is called."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A package that is called like the function of its name."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return importlib.import_module("llm_quest.api").train(*inputs, **options)


sys.modules[__name__].__class__ = CallableModule
