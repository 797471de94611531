"""Second floor: edits of a finished model, each a frozen dataclass that you call: `model = LoRA(rank=8)(model)`.

`TECHNIQUES` lists those that are part of what a model is: they stand on its card, under the names that recipes and
saved models use. `IN_TRAINING` lists those that act while a run lasts and leave nothing but weights behind: no card, no
file. A recipe names either: it is called with the model if it can be called, and rides along as a callback if it has
`after_step`. A new one is its file, one line here and one example in the grid law (tests/laws/test_techniques.py),
which runs it on every page."""

from __future__ import annotations

from llm_quest.techniques.checkpointing import Checkpointing
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.int8 import Int8Weights
from llm_quest.techniques.length import LengthExtension
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA
from llm_quest.techniques.multi_token import MultiToken
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.score_head import ScoreHead
from llm_quest.techniques.softcap import SoftCap
from llm_quest.techniques.taps import Taps

TECHNIQUES: dict[str, type] = {
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "lora_xs": LoRAXS,
    "tiny_lora": TinyLoRA,
    "int8": Int8Weights,
    "score_head": ScoreHead,
    "hyper_connections": HyperConnections,
    "multi_token": MultiToken,
    "length": LengthExtension,
    "softcap": SoftCap,
    "dyt": DyT,
}
IN_TRAINING: dict[str, type] = {
    "checkpointing": Checkpointing,
    "qk_clip": QKClip,
    "taps": Taps,
}
