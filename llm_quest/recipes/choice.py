"""A table as the schema of a recipe's key: its keys are the values that are allowed, the help and the error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic_core import CoreSchema, core_schema


class Choice:
    """Annotation of a key whose value is a name in a table, so that nothing lists the names a second time.

    loss_type: Annotated[str, Choice(PREFERENCE_LOSSES)] = "dpo"
    """

    def __init__(self, table: Mapping[str, Any]):
        self.names = list(table)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(self.names)

    def __str__(self) -> str:
        return "one of " + ", ".join(self.names)


def find_choices(annotation: Any, metadata: Iterable[Any] = ()) -> list[Choice]:
    """The choices of a field: among its own annotations, and among those of the parts of its type."""
    parts = [one for part in get_args(annotation) for one in find_choices(part, getattr(part, "__metadata__", ()))]
    return [one for one in metadata if isinstance(one, Choice)] + parts
