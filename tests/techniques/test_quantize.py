"""Quantized models: which numbers they compute, what training an adapter on them changes, saving, and what refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llm_quest as quest
from llm_quest.hub.load_adapter import load_adapter
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.save_adapter import save_adapter
from llm_quest.layers.quantized import QuantizedMatrix
from llm_quest.layers.weight_formats import FORMATS
from llm_quest.models.build import preset
from llm_quest.recipes.technique_entry import parse_technique_entry
from llm_quest.scope import Scope
from llm_quest.techniques.adapter_merge import merge_adapter
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.quantize import Quantize
from llm_quest.tensor_files import SLAB_BYTES, map_huge_pages
from tests.laws.subjects import TINY, own, random_tokens, shared

every_page = pytest.mark.parametrize("page", TINY)
every_format = pytest.mark.parametrize("name", FORMATS)


def quantize_model(page: str, name: str = "int8", dtype: torch.dtype = torch.float64) -> Any:
    return Quantize(name)(own(page, dtype))  # type: ignore[arg-type]


def test_codes_lie_one_behind_the_other_in_large_pages(monkeypatch: pytest.MonkeyPatch):
    """As a loaded model's: a product reads them faster. All of a small model are in one slab."""
    slabs, plain = [], own("llama3.2-tiny")
    monkeypatch.setattr(
        "llm_quest.tensor_files.map_huge_pages", lambda size: slabs.append(size) or map_huge_pages(size)
    )
    small = Quantize("int4")(plain)
    codes = [module.q for module in small.modules() if isinstance(module, QuantizedMatrix)]
    places = [q.data_ptr() for q in codes]
    assert slabs == [SLAB_BYTES]
    assert places == sorted(places)
    assert places[-1] - places[0] < SLAB_BYTES
    assert all(not q.requires_grad for q in codes)


@every_page
@every_format
def test_the_model_is_the_one_whose_matrices_were_rounded(page: str, name: str):
    """In float64: the same logits as the float model with the dequantized matrices, everywhere."""
    small, plain = quantize_model(page, name), own(page)
    rounded = {path: module.weight for path, module in small.named_modules() if isinstance(module, QuantizedMatrix)}
    with torch.no_grad():
        for path, weight in rounded.items():
            path = path.removesuffix(".matrix")
            target: Any = plain.get_parameter(
                path if path.endswith(("experts.gate_up", "experts.down")) else f"{path}.weight"
            )
            target.copy_(weight)
        tokens = random_tokens(plain, 2, 9)
        logits = small(tokens)
        torch.testing.assert_close(logits, plain(tokens), rtol=0, atol=1e-10)
        assert (logits - shared(page)(tokens)).abs().max() > 1e-4


@every_page
def test_it_takes_about_a_quarter_and_nothing_learns(page: str):
    model = quest.build(page)
    matrices = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    before = sum(p.nbytes for p in model.parameters())
    small = Quantize()(model)
    assert sum(p.nbytes for p in small.parameters()) < before - matrices // 2
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize(("name", "bits"), [("int8", 8 + 16 / 128), ("int4", 5), ("nf4", 4.5)])
def test_a_weight_takes_its_bits_and_its_share_of_a_scale(name: str, bits: float):
    matrix = QuantizedMatrix(torch.randn(64, 128, dtype=torch.bfloat16), FORMATS[name])
    assert 8 * (matrix.q.nbytes + matrix.scale.nbytes) / (64 * 128) == bits


@pytest.mark.parametrize("page", ["llama3.2-tiny", "gpt2-tiny", "deepseek-v3-tiny", "mixtral-tiny"])
@every_format
def test_decoding_in_float32_is_reading_at_once(page: str, name: str):
    """One token at a time, and all together: other numbers of rows, the same logits up to float32's rounding."""
    small = quantize_model(page, name, torch.float32)
    tokens = random_tokens(small, 1, 12)
    cache, parts = small.new_cache(1, 12), []
    with torch.no_grad():
        for start in range(12):
            part = tokens[:, start : start + 1]
            parts.append(small(part, Scope.unpadded(part, cache=cache, start=start)))
        torch.testing.assert_close(torch.cat(parts, dim=1), small(tokens), rtol=1e-4, atol=1e-4)


@every_format
def test_a_rows_text_is_the_same_alone_in_a_batch_and_drafted(name: str):
    model = quantize_model("llama3.2-tiny", name, torch.float32)
    prompts = [tokens.tolist() for tokens in random_tokens(model, 6, 9)]
    for how in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 1}):
        together = quest.generate(model, prompts, max_new_tokens=12, eos_token_id=(), **how)
        alone = [quest.generate(model, [one], max_new_tokens=12, eos_token_id=(), **how)[0] for one in prompts]
        assert [one.tokens for one in together] == [one.tokens for one in alone]
    greedy = {"max_new_tokens": 12, "temperature": 0.0, "eos_token_id": ()}
    drafted = quest.generate(model, prompts, draft="ngram", **greedy)
    assert [one.tokens for one in drafted] == [one.tokens for one in quest.generate(model, prompts, **greedy)]


def test_a_capped_head_stays_capped_and_a_tied_one_stays_one():
    tied = Quantize("int4")(quest.build(replace(preset("llama3.2-tiny").config, tie_word_embeddings=True)))
    assert tied.head.matrix is tied.embed.token.matrix
    assert tied.head.matrix.form is FORMATS["int8"], "heads have 8 bits in any format"
    untied = Quantize("int4")(quest.build(replace(preset("llama3.2-tiny").config, tie_word_embeddings=False)))
    assert isinstance(untied.head.matrix, QuantizedMatrix)
    gemma = next(name for name in TINY if name.startswith("gemma2"))
    capped, plain = quantize_model(gemma), own(gemma)
    assert capped.head.softcap == plain.head.softcap is not None


@every_format
def test_saved_as_bytes_and_read_in_another_dtype(name: str, tmp_path: Path):
    small = quantize_model("llama3.2-tiny", name, torch.float32)
    quest.save(small, tmp_path / "small")
    again = quest.load(tmp_path / "small", dtype="bfloat16")
    matrix, before = again.blocks[0].mixer.layer.qkv.matrix, small.blocks[0].mixer.layer.qkv.matrix
    assert matrix.q.dtype is torch.int8
    assert again.blocks[0].mixer.norm.weight.dtype is torch.bfloat16
    assert torch.equal(matrix.q, before.q)
    assert torch.equal(matrix.scale.float(), before.scale), "scales are bfloat16 numbers in any dtype"
    assert again(random_tokens(again, 1, 5)).dtype is torch.bfloat16


@pytest.mark.parametrize("page", ["llama3.2-tiny", "gpt2-tiny", "mixtral-tiny", "deepseek-v3-tiny"])
@every_format
def test_an_adapter_learns_on_quantized_weights_and_nothing_else_moves(page: str, name: str):
    """QLoRA: the gradients are those of the same adapter on the dequantized model."""
    small = LoRA(rank=2)(quantize_model(page, name))
    plain = LoRA(rank=2)(dequantize_model(page, name))
    frozen = {path: parameter.clone() for path, parameter in small.named_parameters() if not parameter.requires_grad}
    learned = {path: parameter for path, parameter in small.named_parameters() if parameter.requires_grad}
    assert learned
    assert all(".edit" in path for path in learned)
    tokens = random_tokens(small, 2, 7)
    with torch.no_grad():
        for parameters in (small, plain):
            for path, parameter in parameters.named_parameters():
                if path in learned:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(path)))
    expected = dict(plain.named_parameters())
    for model in (small, plain):
        model(tokens).logsumexp(dim=-1).sum().backward()
    for path, parameter in learned.items():
        torch.testing.assert_close(parameter.grad, expected[path].grad, rtol=1e-8, atol=1e-8)
    torch.optim.SGD(learned.values(), lr=0.1).step()
    assert all(torch.equal(parameter, frozen[path]) for path, parameter in small.named_parameters() if path in frozen)


def dequantize_model(page: str, name: str) -> Any:
    """The float model with the numbers of the quantized one."""
    small, plain = quantize_model(page, name), own(page)
    with torch.no_grad():
        for path, module in small.named_modules():
            if isinstance(module, QuantizedMatrix):
                target = path.removesuffix(".matrix")
                stacked = target.endswith(("experts.gate_up", "experts.down"))
                plain.get_parameter(target if stacked else f"{target}.weight").copy_(module.weight)
    return plain


def test_an_adapter_of_a_quantized_model_is_peft_s_and_loads_onto_either_model(tmp_path: Path):
    model = LoRA(rank=2)(quantize_model("llama3.2-tiny", "nf4"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(model, 1, 5)
    with pytest.raises(ValueError, match="base is quantized"):
        merge_adapter(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(quantize_model("llama3.2-tiny", "nf4"), tmp_path / "adapter")
    torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=1e-6)
    merged = load_adapter(dequantize_model("llama3.2-tiny", "nf4"), tmp_path / "adapter")
    merge_adapter(merged)
    torch.testing.assert_close(merged(tokens), model(tokens), rtol=0, atol=1e-6)
    quest.save(model, tmp_path / "both")
    torch.testing.assert_close(quest.load(tmp_path / "both")(tokens), model(tokens), rtol=0, atol=1e-10)


def test_what_cannot_be_quantized_is_refused_before_anything_changes():
    model = LoRA(rank=2)(own("llama3.2-tiny"))
    with pytest.raises(ValueError, match="merge it first"):
        Quantize()(model)
    merge_adapter(model)
    small = Quantize()(model)
    for other in ("int8", "int4"):
        with pytest.raises(ValueError, match="already"):
            Quantize(other)(small)  # type: ignore[arg-type]
    fresh = own("llama3.2-tiny")
    before = [id(module) for module in fresh.modules()]
    with pytest.raises(ValueError, match="expected one of int8, int4, nf4"):
        Quantize("int3")(fresh)  # type: ignore[arg-type]
    assert [id(module) for module in fresh.modules()] == before


def test_the_former_name_is_explained():
    with pytest.raises(ValueError, match=r"write \{name: quantize, format: int8\}"):
        parse_technique_entry("int8")
    assert parse_technique_entry({"name": "quantize", "format": "int8"}) == {"name": "quantize", "format": "int8"}


STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
"""A trained model, if it is there."""


@pytest.fixture(scope="module")
def stories() -> tuple[list[list[int]], Any]:
    if not STORIES.exists():
        pytest.skip("the trained model is not here")
    tokenizer, model = load_tokenizer(STORIES), quest.load(STORIES, dtype="float32")
    starts = ("Once upon a time", "The dog", "Lily and Tom went", "One day, a cat", "She saw a", "In the park")
    return [tokenizer.encode(start) for start in starts], model


def nats(model: Any, rows: list[list[int]]) -> float:
    """The mean of -ln p of all tokens but the first of each row."""
    with torch.inference_mode():
        found = [
            -model(row[None, :-1]).double().log_softmax(-1).gather(-1, row[None, 1:, None]).flatten()
            for row in map(torch.tensor, rows)
        ]
    return float(torch.cat(found).mean())


def test_int8_changes_the_perplexity_of_a_trained_model_by_less_than_half_a_percent(stories):
    prompts, model = stories
    texts = quest.generate(model, prompts, max_new_tokens=100, temperature=1.0, seed=1, eos_token_id=())
    rows = [prompt + text.tokens for prompt, text in zip(prompts, texts, strict=True)]
    losses = {name: nats(Quantize(name)(quest.load(STORIES, dtype="float32")), rows) for name in FORMATS}
    assert abs(losses["int8"] - nats(model, rows)) < 0.005
    assert losses["int8"] < losses["int4"] < losses["nf4"]


@every_format
def test_a_trained_models_rows_have_the_same_text_alone_and_in_a_batch(stories, name: str):
    prompts, _ = stories
    model = Quantize(name)(quest.load(STORIES, dtype="float32"))  # type: ignore[arg-type]
    how: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0, "seed": 1, "eos_token_id": ()}
    together = quest.generate(model, prompts, **how)
    alone = [quest.generate(model, [prompt], **how)[0] for prompt in prompts]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
