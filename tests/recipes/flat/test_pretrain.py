"""The flat file and the package: the same weights and batches give the same losses, step by step, and the same weights
at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_quest.data.batch import TokenBatch
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.flat import pretrain as flat
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw, make_lr_schedule

STEPS = 12
CONFIG = flat.LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
)
TRAINING = flat.PretrainArguments(
    max_steps=STEPS,
    batch_size=6,
    micro_batch_size=2,
    sequence_length=16,
    learning_rate=1e-2,
    warmup_steps=3,
    max_grad_norm=0.5,
)


def build_package_model() -> Decoder:
    rotary = RotaryEmbedding(8, CONFIG.rope_theta)
    return build(
        llama.Config(61, 32, 2, 4, 2, 8, 48, 16, rotary, True, rms_norm_eps=CONFIG.rms_norm_eps), seed=3
    ).train()


def as_flat(model: Decoder) -> flat.Llama:
    """The package's weights in the flat file's model."""
    made = flat.Llama(CONFIG)
    state = dict(model.named_parameters())
    named = {"embed.weight": state["embed.token.weight"], "norm.weight": state["norm.weight"]}
    for i in range(CONFIG.num_hidden_layers):
        block = f"blocks.{i}."
        q, k, v = state[f"{block}mixer.layer.qkv.weight"].split([32, 16, 16])
        gate, up = state[f"{block}feed_forward.layer.gate_up.weight"].chunk(2)
        named |= {f"{block}attention.{name}.weight": part for name, part in (("q", q), ("k", k), ("v", v))}
        named |= {f"{block}ffn.gate.weight": gate, f"{block}ffn.up.weight": up}
        named |= {
            f"{block}attention.out.weight": state[f"{block}mixer.layer.out.weight"],
            f"{block}ffn.down.weight": state[f"{block}feed_forward.layer.down.weight"],
            f"{block}attention_norm.weight": state[f"{block}mixer.norm.weight"],
            f"{block}ffn_norm.weight": state[f"{block}feed_forward.norm.weight"],
        }
    made.load_state_dict({name: tensor.detach().clone() for name, tensor in named.items()})
    return made


def batches() -> list[tuple[Tensor, Tensor]]:
    generator, text = torch.Generator().manual_seed(1), torch.arange(4000) ** 2 % 61
    return [flat.sample_rows(text, TRAINING, generator) for _ in range(STEPS)]


@dataclass
class Given:
    """A feed of these batches, two rows at a time."""

    steps: Sequence[tuple[Tensor, Tensor]]

    def batches(self, step: int) -> list[TokenBatch]:
        inputs, targets = self.steps[step]
        return [TokenBatch(*pair) for pair in zip(inputs.split(2), targets.split(2), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """It has no state."""


class Losses:
    """A display that remembers."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def start(self, step: int, steps: int) -> None: ...

    def log_metrics(self, row: dict[str, Any]) -> None:
        self.seen.append(row["loss"])

    def log_event(self, text: str) -> None: ...

    def close(self) -> None: ...


def test_the_flat_model_is_the_page() -> None:
    model = build_package_model()
    tokens = batches()[0][0]
    torch.testing.assert_close(as_flat(model)(tokens), model(tokens), rtol=0, atol=2e-6)


def test_every_step_loses_what_the_assembled_recipe_loses() -> None:
    model = build_package_model()
    plain = as_flat(model)
    given, losses = batches(), Losses()
    train(
        NextTokenLoss(model),
        Given(given),
        make_adamw(model, lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay),
        make_lr_schedule(STEPS, warmup_steps=TRAINING.warmup_steps, min_lr_ratio=TRAINING.min_lr_ratio),
        TrainingArguments(max_steps=STEPS, max_grad_norm=TRAINING.max_grad_norm, logging_steps=1),
        logger=losses,
    )
    optimizer = flat.build_adamw(plain, TRAINING)
    flatly = [flat.train_step(plain, optimizer, *given[step], step, TRAINING) for step in range(STEPS)]
    assert losses.seen == pytest.approx(flatly, abs=2e-5)
    assert flatly[-1] < flatly[0] - 0.5
    for name, weight in as_flat(model).named_parameters():
        torch.testing.assert_close(weight, plain.get_parameter(name), rtol=0, atol=2e-4, msg=name)


def test_it_learns_a_file_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = flat.LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        intermediate_size=96,
    )
    monkeypatch.setattr(flat, "LlamaConfig", lambda: small)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    flat.main(str(tmp_path / "text.txt"), steps=12)
    told = capsys.readouterr().out
    first = float(told.split("step    0")[1].split()[0])
    last = float(told.split("held out: ")[1].split()[0])
    assert first == pytest.approx(math.log2(256), abs=0.5)
    assert last < first - 1
    assert "The " in told
