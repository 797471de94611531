"""Parameters that an adapter replaces whole: PEFT's modules_to_save (embedding, output matrix, norms), biases, rows of
chosen tokens, and the embedding's and the head's own low-rank edits, merged.

In a model with tied matrices PEFT edits copies: replacing one of the two unties them. Exceptions are rows of chosen
tokens, which both uses share, and ensure_weight_tying."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm_quest.data.batch import SINGLE_LABEL
from llm_quest.errors import DataError
from llm_quest.hub.published_matrices import LoRAPair
from llm_quest.hub.save_adapter import WEIGHTS
from llm_quest.hub.weight_map import HEAD, SCORE, WeightView, compact_names, export_weight_map, weight_views
from llm_quest.layers.low_rank import row_norms
from llm_quest.models.build import family_of
from llm_quest.models.weight_names import Transposed, published_names
from llm_quest.techniques.score_head import PROBLEM_TYPES, ScoreHead, find_score_head

LM_HEAD = "lm_head"
EMBEDDING = "embed.token.weight"
VOCABULARY = ("lm_head.weight", "embed_tokens.weight", "wte.weight")


class WholeParameters:
    """The parameters of a base model that an adapter changes. folder: of the adapter, for messages. tie: changes of the
    embedding apply to a tied head too."""

    def __init__(self, model: Any, folder: Path, *, tie: bool):
        self.model, self.folder, self.tie = model, folder, tie
        self.touched: set[str] = set()

    @property
    def views(self) -> dict[str, WeightView]:
        """Published name -> its place in the model."""
        return weight_views(self.model, self.table)

    @property
    def table(self) -> Mapping[str, Any]:
        model = self.model
        return export_weight_map(model, family_of(model.config).weight_map(model.config))

    @property
    def embedding(self) -> str:
        """The module that the embedding is published as."""
        table = family_of(self.model.config).weight_map(self.model.config)  # a quantized embedding is not in self.table
        (name,) = published_names([table[EMBEDDING]])
        return name.removesuffix(".weight")

    def is_embedding_or_head(self, module: str) -> bool:
        return module in (LM_HEAD, self.embedding)

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy whole parameters, by their published names."""
        self.add_score_head(tensors)
        for name, tensor in tensors.items():
            if self.tie and name == f"{LM_HEAD}.weight" and f"{self.embedding}.weight" in tensors:
                continue  # the embedding again
            self.untie(name.rpartition(".")[0])
            place = self.views.get(name)
            if place is None:
                raise DataError(
                    f"{self.folder} is an adapter of another base: this model has no {compact_names([name])}"
                )
            view = place.view(self.model.get_parameter(place.parameter))
            if view.shape != tensor.shape:
                cure = "add the tokens to the base first" if name.endswith(VOCABULARY) else "it is of another base"
                shapes = f"{name} is {tuple(tensor.shape)}, this model's is {tuple(view.shape)}"
                raise DataError(f"{self.folder}: {shapes}: {cure}")
            view.copy_(tensor)
            self.touched.add(place.parameter)

    def add_score_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the score head of a reward model's or classifier's adapter, which its base lacks."""
        if SCORE in tensors and find_score_head(self.model) is None:
            read_score_head(self.folder / WEIGHTS, tensors[SCORE].shape[0])(self.model)

    @torch.no_grad()
    def replace_rows(self, rows: Mapping[str, Tensor], indices: Any) -> None:
        """Copy rows of chosen tokens. indices: trainable_token_indices, a list of ids for the embedding, or one for
        each module by its name."""
        for module, values in rows.items():
            chosen = (
                indices.get(module.rpartition(".")[2], indices.get(module)) if isinstance(indices, dict) else indices
            )
            if not isinstance(chosen, list) or len(chosen) != len(values):
                raise DataError(
                    f"{self.folder}: trainable_token_indices does not name the {len(values)} rows of {module}"
                )
            place = self.views[f"{module}.weight"]
            self.model.get_parameter(place.parameter).index_copy_(0, torch.tensor(chosen), values.to(self.like))
            self.touched.add(place.parameter)

    @property
    def like(self) -> Tensor:
        """A tensor of the embedding's dtype and device."""
        return self.model.embed.token.weight  # type: ignore[no-any-return]

    @torch.no_grad()
    def add(self, module: str, pair: LoRAPair, scale: float, *, is_dora: bool) -> None:
        """Merge the low-rank edit of the embedding (whose A is over tokens) or of the head."""
        self.untie(module)
        place = self.views[f"{module}.weight"]
        weight = self.model.get_parameter(place.parameter)
        float_weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        A, B = pair.A.to(float_weight), pair.B.to(float_weight)
        delta = scale * (B @ A if module == LM_HEAD else (B @ A).mT)
        if delta.shape != weight.shape:
            raise DataError(
                f"{self.folder}: {module} is edited as {tuple(delta.shape)}, it is {tuple(weight.shape)} here"
            )
        if is_dora:
            dim = 0 if module == LM_HEAD else 1
            edited = float_weight + delta
            norm = row_norms(edited if dim == 0 else edited.mT)
            gain = pair.magnitude.to(float_weight).flatten() / norm  # type: ignore[union-attr]
            weight.copy_(edited * (gain[:, None] if dim == 0 else gain))
        else:
            weight.copy_(float_weight + delta)
        self.touched.add(place.parameter)

    def matrix(self, module: str) -> Tensor:
        """A published matrix of the base, as (out,in)."""
        entry = next(one for one in self.table.values() if f"{module}.weight" in published_names([one]))
        place = self.views[f"{module}.weight"]
        stored = place.view(self.model.get_parameter(place.parameter)).detach()
        return stored.mT if isinstance(entry, Transposed) else stored

    def untie(self, module: str) -> None:
        """Give the head a matrix of its own where one of two tied ones will change."""
        model = self.model
        is_tied = model.head.weight is model.embed.token.weight
        if not self.is_embedding_or_head(module) or not is_tied or self.tie:
            return
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        config = replace(model.config, tie_word_embeddings=False)
        model.spec = replace(model.spec, config=config)

    def changed(self) -> tuple[str, ...]:
        """Our names of the changed parameters, in the model's order."""
        names = [name for name, _ in self.model.named_parameters() if name in self.touched]
        assert len(names) == len(self.touched), f"{self.touched} are not all parameters; {HEAD} is one"
        return tuple(names)


def read_score_head(file: Path, outputs: int) -> ScoreHead:
    """The head of an adapter's file, with what its scores mean where the header says it (`head_metadata`)."""
    with safe_open(file, framework="np") as stored:
        metadata = stored.metadata() or {}
    try:
        labels = json.loads(metadata.get("labels", "[]"))
    except ValueError:
        labels = []
    is_named = isinstance(labels, list) and len(labels) == outputs
    kind: Any = metadata.get("problem_type")
    kind = kind if kind in PROBLEM_TYPES else SINGLE_LABEL
    return ScoreHead(outputs, tuple(map(str, labels)) if is_named else (), problem_type=kind)
