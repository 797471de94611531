"""Second floor: edits of a finished model, each a frozen dataclass that you call: `model = LoRA(rank=8)(model)`.

`TECHNIQUES` lists those that are part of what a model is: they stand on its card, under the names that recipes and
saved models use. `TRAINING_TECHNIQUES` lists those that act while a run lasts and leave nothing but weights behind: no
card, no file. A recipe names either: it is called with the model if it can be called, and rides along as a callback if
it has `on_step_end`. A new one is its file, one line here and one example in the grid law
(tests/laws/test_techniques.py), which runs it on every page."""

from __future__ import annotations

from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.context_extension import ContextExtension
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.int8 import Int8Weights
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.score_head import ScoreHead
from llm_quest.techniques.softcap import SoftCap

TECHNIQUES: dict[str, type] = {
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "lora_xs": LoRAXS,
    "tiny_lora": TinyLoRA,
    "int8": Int8Weights,
    "score_head": ScoreHead,
    "hyper_connections": HyperConnections,
    "multi_token": MultiTokenPrediction,
    "length": ContextExtension,
    "softcap": SoftCap,
    "dyt": DyT,
}
TRAINING_TECHNIQUES: dict[str, type] = {
    "checkpointing": ActivationCheckpointing,
    "qk_clip": QKClip,
    "taps": AttentionTaps,
}
