"""Second floor: edits of a finished model, each a frozen dataclass that you call: `model = LoRA(rank=8)(model)`.

`TECHNIQUES` lists those that stand on a model's card, under the names that recipes and saved models use. A new one is
its file and one line here; the grid law (tests/laws/test_techniques.py) then runs it on every page."""

from __future__ import annotations

TECHNIQUES: dict[str, type] = {}
