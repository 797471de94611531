"""Laws on a device: every family computes there what the CPU computes in float64; so do attention's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import llm_quest as quest
from benchmarks.cuda_graph import StaticDecodeStep
from benchmarks.gpu_setting import Result, Setting
from llm_quest.generation.compiled import compile_for_model, decode_step
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.scaled_dot_product import explicit_attention, fused_attention
from llm_quest.models.decoder import Decoder
from llm_quest.scope import CausalMask, MaskSpec, Scope
from tests.laws.option_grid import (
    DTYPES,
    Cell,
    all_cells,
    decode,
    eager_step,
    model_after_technique,
    typical_error,
    verdict,
)
from tests.laws.subjects import own, random_tokens
from tests.laws.test_decoder import limit

KINDS = ("gpt2-tiny", "llama3.2-tiny", "gemma3-tiny", "qwen3.5-tiny")
"""One family of each kind for what compiles: learned positions, rotary positions, rings, states."""
SMALL_GRADIENT_ERROR = 1e-5


def laws(setting: Setting) -> Iterator[Result]:
    """Whole, padded and packed rows, gradients and cached decoding of every family; texts; compiled steps; then every
    technique, as far as the time goes."""
    for page in setting.families:
        for name, dtype in DTYPES.items():
            yield judge(f"{page}, {name}: rows", partial(rows_equal, setting, page, dtype))
            yield judge(f"{page}, {name}: gradients", partial(gradients_equal, setting, page, dtype))
            yield judge_cell(Cell("none", page, name, False), setting)
        yield judge(f"{page}, float64: greedy text", partial(texts_equal, setting, page))
    for page in [page for page in KINDS if page in setting.families]:
        for name in DTYPES:
            yield judge_cell(Cell("none", page, name, True), setting)
            yield judge(f"{page}, {name}: graph", partial(graph_equals, setting, page, name))
    for cell in all_cells():
        if cell.technique != "none" and not cell.compiled and cell.page in setting.families:
            yield judge_cell(cell, setting)


def judge(name: str, law: Callable[[], tuple[float, float]]) -> Result:
    """A law returns its error and its limit."""
    try:
        error, largest = law()
    except Exception as error_:
        return Result(name, f"{type(error_).__name__}: {str(error_)[:300]}", ok=False)
    return Result(
        name, "holds" if error <= largest else "FAILS", error, f"error (limit {largest:.2g})", ok=error <= largest
    )


def judge_cell(cell: Cell, setting: Setting) -> Result:
    said = verdict(cell, str(setting.device), setting.backend)
    form = "compiled steps" if cell.compiled else "cached steps"
    return Result(f"{cell.page}, {cell.technique}, {cell.dtype}: {form}", said, ok=not said.startswith("FAILS"))


def rows_equal(setting: Setting, page: str, dtype: torch.dtype) -> tuple[float, float]:
    """Whole, padded and packed rows on the device against float64 on the CPU."""
    model, exact = own(page, dtype).requires_grad_(False), own(page, dtype).double().requires_grad_(False)
    tokens, row = random_tokens(model, 2, 12), torch.arange(12)
    padded = torch.stack([row, (row - 3).clamp(min=-1)])
    packed, segments = torch.cat((row[:5], row[:7])).expand(2, -1), (row >= 5).long().expand(2, -1)
    there, errors = model.to(setting.device), []
    for positions, documents in ((row.expand(2, -1), None), (padded, None), (packed, segments)):
        moved = None if documents is None else documents.to(setting.device)
        ours = there(tokens.to(setting.device), Scope(positions.to(setting.device), segment_ids=moved)).cpu()
        expected = exact(tokens, Scope(positions, segment_ids=documents))
        errors.append(typical_error(ours[positions >= 0], expected[positions >= 0]))
    return max(errors), limit(there, dtype)


def gradients_equal(setting: Setting, page: str, dtype: torch.dtype) -> tuple[float, float]:
    """The gradient with respect to all parameters together against float64 on the CPU: off by at most twice what the
    CPU is off in the same dtype (a router's choice and a recurrent state make that very different between families)."""
    exact = gradient(own(page, dtype).double())
    here, there = gradient(own(page, dtype)), gradient(own(page, dtype).to(setting.device))
    error, allowed = ((found - exact).norm() / exact.norm() for found in (there, here))
    return error.item(), max(2 * allowed.item(), SMALL_GRADIENT_ERROR)


def gradient(model: Decoder) -> Tensor:
    """Of the loss, all parameters in one vector, on the CPU."""
    device = next(model.parameters()).device
    tokens = random_tokens(model, 2, 12).to(device)
    model(tokens)[:, :-1].double().log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten().cpu().double() for part in found])


def texts_equal(setting: Setting, page: str) -> tuple[float, float]:
    """How many greedy tokens after ragged prompts differ from those of the CPU."""
    prompts = [random_tokens(own(page), 1, length, seed=length)[0].tolist() for length in (3, 9, 6)]
    texts = []
    for device in ("cpu", setting.device):
        made = quest.generate(own(page).to(device), prompts, max_new_tokens=8, temperature=0.0, eos_token_id=())
        texts.append([token for row in made for token in row.tokens])
    return float(sum(a != b for a, b in zip(*texts, strict=True))), 0.0


@torch.inference_mode()
def graph_equals(setting: Setting, page: str, dtype: str) -> tuple[float, float]:
    """Compiled steps as a CUDA graph against eager steps."""
    model = model_after_technique(Cell("none", page, dtype, True)).to(setting.device)
    tokens = random_tokens(model, 2, 10).to(setting.device)
    graphs: list[StaticDecodeStep] = []

    def graph_step(model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        step = decode_step if setting.tiny else compile_for_model(decode_step, model)
        graphs[:] = graphs or [StaticDecodeStep(step, model, tokens, positions, cache)]
        return graphs[0](tokens, positions).clone()

    error = typical_error(decode(model, tokens, graph_step), decode(model, tokens, eager_step))
    return error, limit(model, DTYPES[dtype])


def attention_kernels(setting: Setting) -> Iterator[Result]:
    """Every kernel against the definition in float64 on the CPU, and its time at a training shape in bfloat16."""
    batch, length = (1, 64) if setting.tiny else (4, 4096)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, 64, generator=draw).bfloat16() for heads in (8, 2, 2))
    causal, row = CausalMask.CAUSAL, torch.arange(length)
    documents = Scope((row % (length // 4)).expand(batch, -1), segment_ids=(row // (length // 4)).expand(batch, -1))
    masks: dict[str, MaskSpec] = {
        "causal": causal,
        "documents": documents.build_mask(documents.position_ids, documents.segment_ids, None),
    }
    there = [part.to(setting.device) for part in (q, k, v)]
    for name, run, mask in kernel_forms(setting, masks, documents):
        one = [part[:1].double() for part in (q, k, v)]
        expected_mask = mask[:1] if isinstance(mask, Tensor) else mask
        try:
            error = typical_error(run(*there)[:1].cpu(), explicit_attention(*one, expected_mask, scale=0.125))
            seconds = setting.seconds(partial(run, *there))
        except Exception as refusal:
            yield Result(name, f"not available here: {str(refusal)[:160]}")
            continue
        pairs = length * length / (2 if mask is causal else 8)
        flops = 4 * batch * 8 * 64 * pairs / seconds / 1e12
        yield Result(name, "" if error < 0.02 else "FAILS", flops, f"TFLOP/s (error {error:.1g})", ok=error < 0.02)


def kernel_forms(
    setting: Setting, masks: dict[str, MaskSpec], documents: Scope
) -> Iterator[tuple[str, Callable[..., Tensor], MaskSpec]]:
    """PyTorch's kernels one by one, and flex attention with the rule of visibility as a function."""
    causal, tensor = masks["causal"], masks["documents"]
    assert isinstance(tensor, Tensor)
    there = tensor.to(setting.device)

    def kernel(backend: SDPBackend, mask: MaskSpec) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return fused_attention(q, k, v, mask, scale=0.125)

        return run

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        yield f"{backend.name.lower()}, causal", kernel(backend, causal), causal
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        yield f"{backend.name.lower()}, documents as a mask tensor", kernel(backend, there), tensor
    yield "flex_attention, documents", flex_documents(setting, documents), tensor


def flex_documents(setting: Setting, documents: Scope) -> Callable[..., Tensor]:
    """Flex attention over packed documents: causal within each, blocks without a visible key are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert documents.segment_ids is not None
    segments = documents.segment_ids.to(setting.device)
    batch, length = segments.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (segments[b, q] == segments[b, k]) & (k <= q)

    blocks = create_block_mask(visible, batch, None, length, length, device=str(setting.device))
    attend = flex_attention if setting.tiny else torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [part.transpose(1, 2).contiguous() for part in (q, k, v)]
        return attend(*heads, block_mask=blocks, scale=0.125, enable_gqa=True).transpose(1, 2)

    return run
