"""Other people's libraries, imported by the first test that needs one: collecting the tests does not pay for them."""

from __future__ import annotations

import importlib
from typing import Any


class Later:
    """A module by its name, imported as soon as something of it is asked for (pytest, collecting, asks for `__test__`
    and its like)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") and attribute != "__version__":
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.name), attribute)
