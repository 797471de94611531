"""Context extension: a trained model reads further than it was trained, by a scaling of its rotary frequencies
(`layers/rotary.py`): YaRN (Peng et al. 2023, arXiv:2309.00071), the NTK-aware base, or linear interpolation.

Differs: `yarn` has the ramp of the authors' released code, linear in the pair's index; `yarn_by_wavelength` has the
paper's, linear in the number of turns within the original length.

The config changes with the model, so that a saved folder has the published fields, which any reader computes. YaRN
needs a short training at the new length, and helps even without.

Commonly got wrong: YaRN's factor counts from the length that the model was *trained* at; where part of a head is not
rotated (MLA) the temperature belongs on the whole score, which DeepSeek's field (mscale) does; windowed layers never
see further than before and stay (except where a family publishes one rotation for all layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from llm_quest.errors import UsageError
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.rotary import (
    LinearScaling,
    NTKScaling,
    RopeScaling,
    RotaryEmbedding,
    YaRNScaling,
    yarn_by_wavelength,
)
from llm_quest.models.build import build_meta_model, family_of
from llm_quest.techniques.model_spec import (
    Model,
    attention_layers,
    record_technique,
    require_decoder,
    require_not_applied,
)


@dataclass(frozen=True)
class ContextExtension:
    """Stretches rotary positions to a longer context. factor: how many times longer the context becomes. kind: a name
    in `ROPE_EXTENSIONS`. original: the length that the model was trained at; None: its max_position_embeddings."""

    factor: float = 4.0
    kind: str = "yarn"
    original: int | None = None
    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_EXTENSIONS:
            raise UsageError(
                f"no kind of context extension is called {self.kind!r}; known: {', '.join(ROPE_EXTENSIONS)}"
            )
        if not self.factor >= 1:
            raise UsageError(f"factor {self.factor} is below 1: a length is extended, not cut")
        if self.original is not None and not self.kind.startswith("yarn"):
            raise UsageError(f"original has no effect with kind {self.kind!r}: leave it out")

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        require_not_applied(model, self)
        config = self.extend_config(model.config, attention_layers(model, self)[0])
        reference = dict(build_meta_model(config).named_modules())
        last = [module for path, module in reference.items() if path.startswith("blocks.")]
        for path, mixer in model.named_modules():
            if mixer in attention_layers(model, self):
                like: Any = reference.get(path) or next(one for one in reversed(last) if type(one) is type(mixer))
                mixer.rotary, mixer.attend.scale = like.rotary, like.attend.scale
        model.spec = replace(model.spec, config=config)
        return record_technique(model, self)

    def extend_config(self, config: Any, mixer: Any) -> Any:
        """The config that the extended model's own export is read as."""
        if "rotary" not in {field.name for field in fields(config)}:
            raise UsageError(
                "this model's positions are learned vectors, one for each: they have no frequencies to scale"
            )
        if config.rotary.scaling is not None:
            raise UsageError(
                f"the model's rotation is scaled already ({type(config.rotary.scaling).__name__}): a scaling is "
                "defined on the frequencies it was first trained with; extend the original model"
            )
        if isinstance(mixer, MultiHeadLatentAttention) and self.kind == "yarn_by_wavelength":
            raise UsageError(
                "yarn_by_wavelength has its temperature on rotated numbers alone, and latent attention needs it on the "
                "whole score; take kind yarn"
            )
        original = self.original or config.max_position_embeddings
        scaling = ROPE_EXTENSIONS[self.kind](self.factor, original, config.rotary)
        if isinstance(mixer, MultiHeadLatentAttention) and isinstance(scaling, YaRNScaling):
            scaling = replace(scaling, mscale=1.0, mscale_all_dim=1.0)
        context = round(config.max_position_embeddings * self.factor)
        family = family_of(config)
        longer = replace(config, rotary=replace(config.rotary, scaling=scaling), max_position_embeddings=context)
        read = family.read(family.publish(longer))
        rotations = {field.name: getattr(read, field.name) for field in fields(config)}
        rotations = {name: value for name, value in rotations.items() if isinstance(value, RotaryEmbedding)}
        return replace(longer, **rotations)


ROPE_EXTENSIONS: dict[str, Callable[[float, int, RotaryEmbedding], RopeScaling]] = {
    "yarn": lambda factor, original, rotary: YaRNScaling(factor, original),
    "yarn_by_wavelength": lambda factor, original, rotary: yarn_by_wavelength(
        factor, original, rotary.dim, rotary.rope_theta
    ),
    "ntk": lambda factor, original, rotary: NTKScaling(factor),
    "linear": lambda factor, original, rotary: LinearScaling(factor),
}
