"""Reads the pooling of an embedding model: the files of sentence-transformers, as in Qwen3-Embedding.

      modules.json            [{"type": "X.Transformer"}, {"type": "X.Pooling", "path": "1_Pooling"}, ...]
      1_Pooling/config.json   {"pooling_mode": "lasttoken"}; older: {"pooling_mode_lasttoken": true, ...}
      config.json             {"matryoshka_dimensions": [64, 256]}, or {"is_matryoshka": true}: all (vLLM's fields)

The embedding is the last token's vector behind the final norm, or the mean of all tokens', perhaps divided by its
length ("X.Normalize"). A model that was trained so (Matryoshka, Kusupati et al. 2022, arXiv:2205.13147) has embeddings
whose first numbers are an embedding too.

Commonly got wrong: an embedding is cut before it is divided by its length, or it has another length than 1."""

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
TEXT_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")
"""Files about texts: their length and case, and the prompt before them."""
POOLING_MODES: dict[str, Literal["lasttoken", "mean"]] = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
}
"""Field of 1_Pooling/config.json -> the mode of pooling."""


@dataclass(frozen=True)
class Pooling:
    """Pools the vectors of a text's tokens to its embedding. normalize: to length 1. max_tokens: of a text; None: the
    model's context. shorter: how many first numbers are an embedding too: these, or "any"."""

    mode: Literal["lasttoken", "mean"]
    normalize: bool
    max_tokens: int | None = None
    shorter: tuple[int, ...] | Literal["any"] = ()

    def allows(self, dimensions: int, width: int) -> bool:
        """Whether embeddings of a model of this width may have so many numbers."""
        listed = self.shorter == "any" or dimensions in self.shorter
        return dimensions == width or (1 <= dimensions < width and listed)

    def __call__(self, hidden: Float[Tensor, "T D"], dimensions: int | None = None) -> Float[Tensor, " d"]:
        """The embedding, in float32; its first so many `dimensions`."""
        pooled = hidden[-1].float() if self.mode == "lasttoken" else hidden.float().mean(dim=0)
        pooled = pooled[:dimensions]
        return functional.normalize(pooled, dim=0) if self.normalize else pooled


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a folder; None where it names none. DataError for damaged files, UsageError for steps that are not
    computed here (a Dense layer, the maximum, several modes at once)."""
    if not (folder / MODULES).is_file():
        return None
    modules = load_json(folder / MODULES, list)
    if not all(isinstance(module, dict) and isinstance(module.get("type"), str) for module in modules):
        raise DataError(f"{folder / MODULES}: a list of objects with a type each was expected")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UsageError(
            f"{folder / MODULES} names {', '.join(kinds)[:200]}: Transformer, Pooling, Normalize are computed"
        )
    path = modules[1].get("path")
    if not isinstance(path, str) or Path(path).name != path:
        raise DataError(f"{folder / MODULES}: the path {path!r:.80} of Pooling is no name of a folder")
    mode = read_mode(folder / path / "config.json")
    return Pooling(mode, "Normalize" in kinds, read_text_limit(folder), read_matryoshka_dimensions(folder))


def read_mode(file: Path) -> Literal["lasttoken", "mean"]:
    """The one mode that a pooling's config.json turns on. UsageError for another, or several."""
    config = load_json(file)
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if (given := config.get("pooling_mode")) is not None:
        on = [str(one) for one in given] if isinstance(given, list) else [str(given)]
    known = POOLING_MODES | {mode: mode for mode in POOLING_MODES.values()}
    if len(on) != 1 or on[0] not in known:
        raise UsageError(f"{file}: {', '.join(on)[:200] or 'no mode'} is on; one of {', '.join(known)} is computed")
    return known[on[0]]


def read_matryoshka_dimensions(folder: Path) -> tuple[int, ...] | Literal["any"]:
    """The shorter embeddings that config.json names; empty for none. DataError for dimensions that are no numbers."""
    config = load_json(file) if (file := folder / "config.json").is_file() else {}
    listed = config.get("matryoshka_dimensions")
    if listed is None:
        return "any" if config.get("is_matryoshka") is True else ()
    if not isinstance(listed, list) or not all(type(one) is int and one > 0 for one in listed):
        raise DataError(f"{file}: matryoshka_dimensions is {listed!r:.80}; a list of positive numbers was expected")
    return tuple(listed)


def read_text_limit(folder: Path) -> int | None:
    """The maximum number of tokens of a text; None if the folder has no limit. UsageError if its texts are changed
    first."""
    texts, prompts = (load_json(file) if (file := folder / name).is_file() else {} for name in TEXT_FILES)
    if texts.get("do_lower_case") is True:
        raise UsageError(f"{folder / TEXT_FILES[0]}: do_lower_case is on; texts are embedded as they are")
    if (name := prompts.get("default_prompt_name")) is not None:
        raise UsageError(
            f"{folder / TEXT_FILES[1]}: the prompt {name!r:.80} stands before each text; texts are embedded as they are"
        )
    limit = texts.get("max_seq_length")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DataError(f"{folder / TEXT_FILES[0]}: max_seq_length is {limit!r:.80}; a positive number was expected")
    return limit
