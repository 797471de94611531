"""Speed on a device, as shares of what it can do: matrix products and memory, training and decoding a Llama of 1B, a
GRPO step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llm_quest as quest
from benchmarks.cuda_graph import StaticDecodeStep
from benchmarks.gpu_setting import Result, Setting
from llm_quest.cost.profile import matmul_peak
from llm_quest.data.batch import TokenBatch
from llm_quest.generation.compiled import compile_for_model, decode_step
from llm_quest.layers.kv_cache import Cache
from llm_quest.models.build import preset
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import Scope
from llm_quest.train.optimizers import make_adamw

SHAPE, TINY_SHAPE = "llama3.2-1b", "llama3.2-tiny"
PROMPT = 128
StepFunction = Callable[[Tensor, Tensor], Tensor]


def peaks(setting: Setting) -> Iterator[Result]:
    """The largest matrix product and a large copy: what the rows below are shares of."""
    size, numbers = (256, 1 << 16) if setting.tiny else (8192, 1 << 29)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        setting.peaks[name] = matmul_peak(size, dtype, setting.device) * 1e9
        yield Result(f"matrix product, {name}, {size}", value=setting.peaks[name] / 1e12, unit="TFLOP/s")
    source = torch.empty(numbers, dtype=torch.bfloat16, device=setting.device)
    target = torch.empty_like(source)
    setting.peaks["bandwidth"] = 2 * source.nbytes / setting.seconds(lambda: target.copy_(source))
    yield Result("copy, read and write", value=setting.peaks["bandwidth"] / 1e9, unit="GB/s")


def shape(setting: Setting) -> Any:
    return preset(TINY_SHAPE if setting.tiny else SHAPE).config


def training(setting: Setting) -> Iterator[Result]:
    """A whole step (forward, loss, backward, clip, fused AdamW) in bfloat16 autocast, eager and compiled."""
    rows, length = (2, 32) if setting.tiny else (4, 2048)
    model = quest.build(shape(setting)).to(setting.device).train()
    objective, optimizer = NextTokenLoss(model), make_adamw(model, lr=1e-5)
    tokens = torch.randint(model.config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:]).to(setting.device)

    def total_loss() -> Tensor:
        return objective(batch).total

    def step(loss: Callable[[], Tensor]) -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            mean = loss() / (rows * length)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    flops = training_flops(model, rows, length)
    for form, loss in (("eager", total_loss), ("compiled", torch.compile(total_loss, backend=setting.backend))):
        seconds = setting.seconds(partial(step, loss), repeats=1 if setting.tiny else 5)
        share = flops / seconds / setting.peaks["bfloat16"] if "bfloat16" in setting.peaks else None
        yield Result(
            f"{rows} rows of {length}, bf16, {form}", value=rows * length / seconds, unit="tokens/s", share=share
        )


def training_flops(model: Decoder, rows: int, length: int) -> float:
    """Forward and backward: 6 for every weight that is multiplied and token, and causal attention."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    weights -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 6 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return float(rows * length * (6 * weights + attention))


@torch.inference_mode()
def decoding(setting: Setting) -> Iterator[Result]:
    """One token a row and step, bfloat16 weights: the step alone, eager, compiled and as a CUDA graph; then
    transformers' `generate` at the same shape."""
    steps = 4 if setting.tiny else 64
    model = quest.build(shape(setting), dtype=torch.bfloat16).to(setting.device).requires_grad_(False)
    compiled = decode_step if setting.tiny else compile_for_model(decode_step, model)
    forms: dict[str, Callable[..., StepFunction]] = {
        "eager": lambda cache, *first: eager_step(model, cache),
        "compiled": lambda cache, *first: lambda *inputs: compiled(model, *inputs, cache),
        "CUDA graph": lambda cache, *first: StaticDecodeStep(compiled, model, *first, cache),
    }
    for rows in (1, 32):
        for form, make_step in forms.items():
            seconds = step_seconds(setting, model, rows, steps, make_step)
            share = step_bytes(model, rows, steps) / seconds / setting.peaks.get("bandwidth", float("inf")) or None
            yield Result(f"batch {rows}, bf16, {form}", value=rows / seconds, unit="tokens/s", share=share)
        if not setting.tiny:
            yield transformers_row(setting, rows, steps)


def eager_step(model: Decoder, cache: Cache) -> StepFunction:
    """The step of `generate`: all rows are at one position, which the host knows."""
    at = PROMPT

    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        nonlocal at
        at += 1
        return model(tokens, Scope(positions, cache=cache, max_seq_len=at, unpadded=True))[:, -1]

    return step


def step_seconds(
    setting: Setting, model: Decoder, rows: int, steps: int, make_step: Callable[..., StepFunction]
) -> float:
    """Seconds of one greedy step after a prompt: the median of three runs of several steps."""
    prompt = torch.randint(model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(setting.device)
    cache = model.new_cache(rows, PROMPT + 6 * steps + 8)
    model.head(model.hidden_states(prompt, Scope.unpadded(prompt, cache=cache))[:, -1])
    tokens, positions = prompt[:, -1:], torch.full_like(prompt[:, -1:], PROMPT)
    step = make_step(cache, tokens, positions)

    def run() -> None:
        nonlocal tokens, positions
        for _ in range(steps):
            tokens = step(tokens, positions).argmax(-1, keepdim=True)
            positions = positions + 1

    return setting.seconds(run, repeats=3, warm_up=1 if setting.tiny else 2) / steps


def step_bytes(model: Decoder, rows: int, steps: int) -> float:
    """What a step has to read: the weights that are multiplied, and the keys and values of the text so far."""
    config = model.config
    weights = sum(p.nbytes for p in model.parameters())
    weights -= 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return float(weights + rows * per_token * (PROMPT + 3 * steps))


def transformers_row(setting: Setting, rows: int, steps: int) -> Result:
    """transformers' `generate` at the same shape, its prefill included."""
    name = f"batch {rows}, bf16, transformers' generate"
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return Result(name, "not run: transformers is not installed")
    from llm_quest.models.llama import FAMILY

    config = AutoConfig.for_model("llama", **FAMILY.publish(shape(setting)))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(setting.device).eval()
    prompt = torch.zeros(rows, PROMPT, dtype=torch.int64, device=setting.device)
    length = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    seconds = setting.seconds(
        lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **length), repeats=3
    )
    return Result(name, value=rows * steps / seconds, unit="tokens/s")


def grpo(setting: Setting) -> Iterator[Result]:
    """A GRPO step at the 11M Llama shape of `benchmarks.alignment`, against TRL's in turn."""
    try:
        import trl  # noqa: F401
    except ImportError:
        yield Result("a step against TRL", "not run: trl is not installed")
        return
    from benchmarks import alignment
    from benchmarks.pairs import race

    tokenizer, model = alignment.tokenizer_of_its_own(), quest.build(alignment.CONFIG).to(setting.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        quest.save(model, folder / "model", tokenizer=tokenizer)
        forms = {
            "TRL, bf16": alignment.trls(folder, 1, "bf16", setting.device),
            "ours, bf16": alignment.ours(model, tokenizer, "bf16", 1, {}, setting.device),
        }
        for row in race(forms, pairs=3):
            words = f"{row.times_reference:.2f} x TRL ({row.low:.2f}-{row.high:.2f})"
            yield Result(f"{row.name}, 8 prompts x 8 samples x 64 tokens", words, 1 / row.seconds, "steps/s")
