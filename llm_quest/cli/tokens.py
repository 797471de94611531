"""`quest tokens add MODEL FOLDER TOKEN...`: adds tokens to a model and writes it as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load_model_and_tokenizer, save
from llm_quest.techniques.token_rows import add_tokens


@dataclass(frozen=True)
class AddedTokens:
    """The result of `quest tokens add`. ids: of each new token. rows: of the embedding, before and after."""

    folder: str
    ids: dict[str, int]
    rows_before: int
    rows: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [f"  {number:>9,}  {token}" for token, number in self.ids.items()]
        return [
            f"{self.folder}: {len(self.ids)} new tokens; the embedding has {self.rows:,} rows (before: "
            f"{self.rows_before:,}), new ones the mean of the others",
            *lines,
            f"train them: quest train sft model.load={self.folder}",
        ]


def add_tokens_to_folder(
    name_or_path: str, folder: Path, tokens: Sequence[str], *, special: bool, overwrite: bool
) -> AddedTokens:
    """Load a model, add tokens to its tokenizer and rows to its embedding, and save both."""
    model, tokenizer = load_model_and_tokenizer(name_or_path)
    if model.spec.techniques:
        raise UsageError(f"{name_or_path} has techniques: quest export it with --merge first, then add tokens")
    rows = model.config.vocab_size
    model, tokenizer = add_tokens(model, tokenizer, () if special else tokens, tokens if special else ())
    save(model, folder, tokenizer=tokenizer, overwrite=overwrite)
    ids = {token: tokenizer.token_to_id(token) for token in tokens}
    return AddedTokens(str(folder), ids, rows, model.config.vocab_size)
