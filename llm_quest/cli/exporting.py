"""`quest export RUN FOLDER`: a run's newest checkpoint as a folder that transformers and vLLM load."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError
from llm_quest.hub.files import load, load_tokenizer, save


@dataclass(frozen=True)
class Exported:
    """What was written."""

    run: str
    folder: str
    parameters: int
    dtype: str
    files: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        told = [f"{self.folder}: {self.parameters:,} parameters in {self.dtype}, from {self.run}"]
        return (
            told
            + [f"  {size:>14,} bytes  {name}" for name, size in self.files.items()]
            + [f"check it against transformers: quest verify {self.folder}"]
        )


def export(run: Path, folder: Path, *, dtype: str = "float32", overwrite: bool = False) -> Exported:
    """Write the Hugging Face layout, tokenizer included."""
    if not (run / "model.json").is_file() and not (run / "config.json").is_file() and run.parent.name != "checkpoints":
        raise DataError(f"{run} is no run folder (it has no model.json); give the folder that quest train wrote")
    model = load(run, dtype=dtype)
    save(model, folder, tokenizer=load_tokenizer(run), overwrite=overwrite)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    return Exported(str(run), str(folder), parameters, dtype, files)
