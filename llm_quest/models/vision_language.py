"""LLaVA (Liu et al. 2023, 2024, "Visual Instruction Tuning", arXiv:2304.08485, 2310.03744): a language model that is
shown images.

- An image encoder reads the image; its patches (not the class token) are taken before the last block,
  unnormalised.
- An adapter, one matrix or two with a GELU between, turns each patch into a vector of the language model's width.
- Early fusion: in the text, one placeholder token stands for every patch. Their embeddings are replaced by those
  vectors, in reading order; from there on image and text are one sequence, with one row of positions, and the decoder
  is any decoder.
- The cache knows nothing of images: they are read once, with the prompt.

      tokens   <s>  <image> <image> <image> <image>  What  colour  ?          4 patches
      vectors   e      v1      v2      v3      v4      e      e    e          positions 0 1 2 3 4 5 6 7

Commonly got wrong: a position embedding for the text and none for the image, or positions in training that generation
does not repeat (here both come from the same scope); the features of the last block, or normalised ones, where the
published model reads the last but one; more placeholders than patches, silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import Card, Preset
from llm_quest.contracts import names as listed
from llm_quest.errors import DataError, UsageError
from llm_quest.layers.adapter import LinearAdapter, MLPAdapter
from llm_quest.layers.initialize import fill_
from llm_quest.layers.rotary import Rotary
from llm_quest.models import clip, gpt2, llama, qwen3, vit
from llm_quest.models.fusion import VisionLanguage
from llm_quest.models.page import Names, Page, need, only, renamed

TOWERS: tuple[Page, ...] = (clip.PAGE, vit.PAGE)
DECODERS: tuple[Page, ...] = (llama.PAGE, qwen3.PAGE, gpt2.PAGE)


@dataclass(frozen=True)
class Config:
    """vision: of the image encoder (clip or vit); text: of the decoder. image_token: the placeholder's id. depth: after
    how many of the encoder's blocks the patches are taken. mlp: two matrices in the adapter rather than one. bias: the
    adapter's. keep_class: is the class token shown too?"""

    vision: Any
    text: Any
    image_token: int
    depth: int
    mlp: bool = True
    bias: bool = True
    keep_class: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.depth <= self.vision.layers:
            raise ValueError(
                f"depth is {self.depth}, but the image encoder has {self.vision.layers} blocks: "
                f"choose 1 to {self.vision.layers}"
            )
        if not 0 <= self.image_token < self.text.vocab:
            raise ValueError(
                f"image_token {self.image_token} is outside the vocabulary of {self.text.vocab}: enlarge it"
            )

    @property
    def vocab(self) -> int:
        """The decoder's."""
        return self.text.vocab

    @property
    def context(self) -> int:
        """The decoder's: images and text together."""
        return self.text.context

    @property
    def layers(self) -> int:
        """The decoder's, which are those that a cache has."""
        return self.text.layers

    @property
    def image_tokens(self) -> int:
        """Placeholders of an image."""
        return self.vision.patches + self.keep_class


def assemble(config: Config) -> VisionLanguage:
    """The model, without first values."""
    tower = page_of(TOWERS, config.vision).assemble(config.vision)
    tower.head = nn.Identity()
    adapter = (MLPAdapter if config.mlp else LinearAdapter)(config.vision.width, config.text.width, bias=config.bias)
    decoder = page_of(DECODERS, config.text).assemble(config.text)
    return VisionLanguage(Card("vision_language", config), tower=tower, adapter=adapter, decoder=decoder)  # type: ignore[arg-type]


def page_of(pages: Sequence[Page], config: Any) -> Page:
    """The page among these that a config belongs to."""
    for page in pages:
        if isinstance(config, page.Config):
            return page
    raise UsageError(
        f"{type(config).__module__}.Config cannot stand here; a config of {listed(page.name for page in pages)} can"
    )


def initialize(model: VisionLanguage, generator: torch.Generator | None = None) -> None:
    """Each part as its own page does; the adapter N(0, 1/width), so that an image's vectors are of the size of its
    patches."""
    page_of(TOWERS, model.config.vision).initialize(model.tower, generator)  # type: ignore[arg-type]
    fill_(
        model.adapter, std=model.config.vision.width**-0.5, out_std=model.config.text.width**-0.5, generator=generator
    )
    page_of(DECODERS, model.config.text).initialize(model.decoder, generator)


def names(config: Config) -> Names:
    """Our parameters and their published names: the parts' own tables, each behind its prefix."""
    table: dict[str, Any] = {}
    vision, text = page_of(TOWERS, config.vision), page_of(DECODERS, config.text)
    for ours, theirs in vision.names(config.vision).items():
        if not ours.startswith("head."):
            table[f"tower.{ours}"] = renamed(theirs, lambda name: "vision_tower." + name.removeprefix("vit."))
    layers = {"up": "linear_1", "out": "linear_2"} if config.mlp else {"out": "linear_1"}
    for ours, theirs in layers.items():
        for kind in ("weight", "bias") if config.bias else ("weight",):
            table[f"adapter.{ours}.{kind}"] = f"multi_modal_projector.{theirs}.{kind}"
    for ours, theirs in text.names(config.text).items():
        table[f"decoder.{ours}"] = renamed(theirs, lambda name: f"language_model.{name}")
    return table


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json. LLaVA's own leaves out what transformers takes for granted in either part."""
    only(published, "projector_hidden_act", "gelu")
    only(published, "vision_feature_select_strategy", "default", "full")
    vision = read_part(published, "vision_config", TOWERS, VISION_DEFAULTS)
    text = read_part(published, "text_config", DECODERS, TEXT_DEFAULTS | tied(published))
    layer = published.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise DataError(
            f"config.json: vision_feature_layer is {layer!r}; this page reads the patches after one block only"
        )
    return Config(
        vision=vision,
        text=text,
        image_token=published.get("image_token_index", published.get("image_token_id", 32000)),
        depth=layer if layer >= 0 else vision.layers + 1 + layer,
        mlp=published.get("model_type") != LINEAR,
        bias=published.get("multimodal_projector_bias", True),
        keep_class=published.get("vision_feature_select_strategy") == "full",
    )


def read_part(published: Mapping[str, Any], field: str, pages: Sequence[Page], defaults: Mapping[str, Any]) -> Any:
    """One of the two configs inside, by the page it names."""
    told = need(published, field)
    if not isinstance(told, Mapping):
        raise DataError(
            f"config.json: {field} is {type(told).__name__}; it must be an object with the numbers of that part"
        )
    kind = told.get("model_type", pages[0].model_type)
    for page in pages:
        if page.model_type == kind:
            return page.read({**(defaults if page is pages[0] else {}), "model_type": kind, **told})
    raise DataError(
        f"config.json: {field} has model_type {kind!r}; here it may be {' or '.join(page.model_type for page in pages)}"
    )


def tied(published: Mapping[str, Any]) -> dict[str, Any]:
    """Said outside the part or inside it."""
    return {"tie_word_embeddings": True} if published.get("tie_word_embeddings") else {}


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json. One matrix as adapter has no published form; it is written under a model_type of
    ours."""
    vision, text = page_of(TOWERS, config.vision), page_of(DECODERS, config.text)
    kind = {} if config.mlp else {"model_type": LINEAR, "architectures": ["VisionLanguage"]}
    text_config = text.publish(config.text)
    return kind | {
        "vision_config": {"model_type": vision.model_type} | vision.publish(config.vision),
        "text_config": {"model_type": text.model_type, "architectures": [text.architecture]} | text_config,
        "image_token_index": config.image_token,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.bias,
        "vision_feature_layer": config.depth - config.vision.layers - 1,
        "vision_feature_select_strategy": "full" if config.keep_class else "default",
        "tie_word_embeddings": bool(text_config.get("tie_word_embeddings", False)),
    }


LINEAR = "llm_quest_llava_linear"
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}

VICUNA = llama.Config(32064, 4096, 32, 32, 32, 128, 11008, 4096, Rotary(128, 10_000.0), tied=False)
TINY_EYES = clip.Config(16, 4, 3, 48, 3, 4, 96)
TINY_TEXT = llama.Config(97, 64, 2, 4, 2, 16, 112, 128, Rotary(16, 10_000.0), tied=True)

PAGE = Page(
    name="vision_language",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    Config=Config,
    assemble=assemble,  # type: ignore[arg-type]
    initialize=initialize,  # type: ignore[arg-type]
    names=names,
    read=read,
    publish=publish,
    task="image-text-to-text",
    optional_prefix="vision_model.",
    also=(LINEAR,),
    ignore=(
        r"vision_tower\.(vision_model\.)?embeddings\.position_ids",
        r".*rotary_emb\.inv_freq",
        r"vision_tower\.pooler\..*",
    ),
    presets=(
        Preset(
            "llava-1.5-7b",
            Config(clip.LARGE, VICUNA, image_token=32000, depth=23),
            7_063_427_072,
            "llava-hf/llava-1.5-7b-hf",
            eos=(2,),
        ),
        Preset("llava-tiny", Config(TINY_EYES, TINY_TEXT, image_token=96, depth=2)),
    ),
)
