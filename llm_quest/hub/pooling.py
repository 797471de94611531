"""How a folder says that its model makes embeddings: the files of sentence-transformers, as Qwen3-Embedding has them.

      modules.json            [{"type": "X.Transformer"}, {"type": "X.Pooling", "path": "1_Pooling"}, ...]
      1_Pooling/config.json   {"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false, ...}

The embedding is the last token's vector behind the final norm, or the mean of all tokens', perhaps divided by its
length ("X.Normalize").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from llm_quest.errors import DataError, UsageError
from llm_quest.files import load_json

MODULES = "modules.json"
POOLING_MODES: dict[str, Literal["lasttoken", "mean"]] = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
}
"""Field of 1_Pooling/config.json -> what is computed."""


@dataclass(frozen=True)
class Pooling:
    """From the vectors of a text's tokens to its embedding. normalize: to length 1."""

    mode: Literal["lasttoken", "mean"]
    normalize: bool

    def __call__(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, " D"]:
        """In float32."""
        pooled = hidden[-1].float() if self.mode == "lasttoken" else hidden.float().mean(dim=0)
        return functional.normalize(pooled, dim=0) if self.normalize else pooled


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a folder; None where it names none. DataError for damaged files, UsageError for steps that are not
    computed here (a Dense layer, the maximum, several modes at once)."""
    if not (folder / MODULES).is_file():
        return None
    modules = load_json(folder / MODULES, list)
    if not all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in modules):
        raise DataError(f"{folder / MODULES}: a list of objects with a type each was expected")
    kinds = [one["type"].rpartition(".")[2] for one in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UsageError(
            f"{folder / MODULES} names {', '.join(kinds)[:200]}: Transformer, Pooling, Normalize are computed"
        )
    path = modules[1].get("path")
    if not isinstance(path, str) or Path(path).name != path:
        raise DataError(f"{folder / MODULES}: the path {path!r:.80} of Pooling is no name of a folder")
    return Pooling(read_mode(folder / path / "config.json"), normalize="Normalize" in kinds)


def read_mode(file: Path) -> Literal["lasttoken", "mean"]:
    """The one mode that a pooling's config.json turns on. UsageError for another, or several."""
    on = [name for name, value in load_json(file).items() if name.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in POOLING_MODES:
        raise UsageError(
            f"{file}: {', '.join(on)[:200] or 'no mode'} is on; one of {', '.join(POOLING_MODES)} is computed"
        )
    return POOLING_MODES[on[0]]
