"""What several tests of hub/ share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.later import Later

peft = Later("peft")


@pytest.fixture(scope="module")
def without_model_cards() -> Iterator[None]:
    """PEFT compiles a template for the README of every adapter, which nobody here reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *given: None)
        yield
