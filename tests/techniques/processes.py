"""Run by test_processes.py: one process judges `compiled`, and two judge `clip_sharded`; all are forked. They
tell what holds."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llm_quest.data.batch import TokenBatch
from llm_quest.models.build import build
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.number_token import NumberTokenLoss
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.softcap import SoftCap
from tests.laws.subjects import keep_block_kinds_, own, random_tokens

COMPILED: dict[str, tuple[Any, ...]] = {
    "QK-Clip, DyT, lookahead, hyper-connections": (
        QKClip(),
        DyT(form="llama"),
        MultiTokenPrediction(),
        HyperConnections(2),
    ),
    "caps, taps, mHC-lite": (SoftCap(), AttentionTaps(), HyperConnections(2, "lite")),
}


def compiled() -> None:
    """A training pass of the edited model is one graph, and has the eager loss."""
    warnings.simplefilter("ignore")
    values = torch.full((97,), float("nan"))
    values[3:13] = torch.arange(10.0)
    teacher = keep_block_kinds_(build("gpt2-tiny", seed=1)).eval()
    for name, techniques in COMPILED.items():
        model: Any = keep_block_kinds_(build("llama3.2-tiny")).train()
        for technique in techniques:
            model = technique(model)
        objective = NextTokenLoss(
            model, auxiliary=[NumberTokenLoss(values), DistillationLoss(teacher, weight=0.5, beta=0.5)]
        )
        tokens = random_tokens(model, 2, 18)
        batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])
        torch.compiler.reset()
        graph = torch.compile(objective, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(graph(batch).total, objective(batch).total)
        print(name, flush=True)


def clip_sharded(told: str) -> None:
    """Each of two processes sees half of the batch and holds half of every matrix; the clip is that of one process."""
    distributed.init_process_group("gloo")
    rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (2,))
    for page in ("gpt2-tiny", "deepseek-v3-tiny"):
        tokens = random_tokens(build(page), 4, 12)
        clip, whole, half = QKClip(0.5), own(page, torch.float32).train(), own(page, torch.float32).train()
        for model in (clip(whole), clip(half)):
            assert model.spec.techniques == ()
        for block in half.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(half, mesh=mesh)
        whole(tokens)
        half(tokens[2 * rank : 2 * rank + 2])
        largest = [clip.on_step_end(model, 1) for model in (whole, half)]
        assert largest[0]["max_logit"] == largest[1]["max_logit"] > 0.5, largest
        parts = dict(half.named_parameters())
        for name, parameter in whole.named_parameters():
            part = parts[name]
            torch.testing.assert_close(part.full_tensor() if isinstance(part, DTensor) else part, parameter)
        if rank == 0:
            with open(told, "a") as file:
                print(page, file=file)
    distributed.destroy_process_group()
