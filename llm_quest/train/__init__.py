"""The training loop. The package imports only `contracts.py`, `errors.py`, `files.py`, `tensor_files.py` and the
machine, so it trains anything that satisfies the contracts: an objective (a batch in, a loss out), a loader
(micro-batches, with a state), callbacks and evaluators.

The package can be called: importing anything from it puts the package in the place of `quest.train`, the function of
`llm_quest.api`, to which a call is passed on."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A package whose call is the function of its name in `llm_quest.api`."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return importlib.import_module("llm_quest.api").train(*inputs, **options)


sys.modules[__name__].__class__ = CallableModule
