"""Techniques: edits of a finished model, each a frozen dataclass that you call: `model = LoRA(rank=8)(model)`.

`TECHNIQUES` lists those that are part of the model: `model.spec` records them, under the names that recipes and saved
models use. `TRAINING_TECHNIQUES` lists those that act during a run and change nothing but weights: neither spec nor
file records them. A recipe names either: one that can be called is called with the model, and one that has
`on_step_end` is also a callback. A new technique is its file, one line here and one example in the grid law
(tests/laws/test_techniques.py), which runs it on every family.
"""

from __future__ import annotations

from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.context_extension import ContextExtension
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from llm_quest.techniques.neftune import NEFTune
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.quantize import Quantize
from llm_quest.techniques.score_head import ScoreHead
from llm_quest.techniques.softcap import SoftCap
from llm_quest.techniques.value_head import ValueHead

TECHNIQUES: dict[str, type] = {
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "lora_xs": LoRAXS,
    "tiny_lora": TinyLoRA,
    "quantize": Quantize,
    "score_head": ScoreHead,
    "value_head": ValueHead,
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
    "neftune": NEFTune,
}
ACT_IN_TRAINING_MODE = ("qk_clip", "neftune")
"""Techniques that do nothing in evaluation mode, in which objectives that score a policy put the model."""
