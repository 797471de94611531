"""HTML pages from templates. Each extends `base.html`; every value is escaped but those marked as safe."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def render_template(file: Path, **values: Any) -> str:
    """The page of a template with these values; a value that the template reads and nobody gives is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([file.parent, HERE])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clean"] = clean_for_html
    return environment.get_template(file.name).render(**values)


def clean_for_html(text: str) -> str:
    """The text without control characters and without marks that change the direction of writing."""
    return "".join(c for c in str(text) if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
