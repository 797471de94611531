"""llama.cpp computes our files: a quick part of `python -m tests.gguf_proof`, which does every position of every
family, greedy texts and perplexities. Here: three positions of each, every way of cutting words, adapters."""

from __future__ import annotations

import pytest
import torch

import llm_quest as quest
from llm_quest.hub.gguf_adapter import save_gguf_adapter
from llm_quest.hub.gguf_export import save_gguf
from llm_quest.hub.gguf_pretokenizers import WORD_SPLITS
from llm_quest.techniques.lora import DoRA, LoRA
from tests.gguf_judge import LlamaCpp, compare_distributions, randomize_for_judging, word_tokenizer
from tests.gguf_models import GGUF_MODELS, VOCAB, tiny
from tests.gguf_proof import GELU_FAMILIES, counterpart, limit_of
from tests.gguf_texts import differing_texts, has_combining_mark, has_other_space, sentencepiece_bpe, train_byte_level
from tests.hub.test_gguf_tokenizer import t5_unigram

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(0, VOCAB - 1, (40,), generator=torch.Generator().manual_seed(1)).tolist()
LONG_RUNNING = ("exaone4, windows", "deepseek_v2, lite")


@pytest.mark.parametrize("name", [name for name in GGUF_MODELS if name not in LONG_RUNNING])
def test_llama_cpp_computes_the_same_log_probabilities(name, tmp_path):
    model = randomize_for_judging(quest.build(GGUF_MODELS[name](), seed=0))
    save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf")
    judge = LlamaCpp(tmp_path / "m.gguf")
    assert compare_distributions(counterpart(name, model), judge, IDS, every=13) <= limit_of(name, model, IDS)


def test_the_judge_sees_a_wrong_order_of_rows(tmp_path, monkeypatch):
    """Halves instead of pairs: the trap that still writes fluent text."""
    from llm_quest.hub import gguf_tensors

    monkeypatch.setattr(gguf_tensors, "rotation_order", lambda view, layout, mixer, rows: (view, None))
    model = randomize_for_judging(quest.build(GGUF_MODELS["llama, llama3"](), seed=0))
    save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf")
    assert compare_distributions(model, LlamaCpp(tmp_path / "m.gguf"), IDS, every=13) > 0.1
    assert "gemma" in GELU_FAMILIES


KINDS = {name: lambda name=name: train_byte_level(name, size=600) for name in WORD_SPLITS} | {
    "sentencepiece": sentencepiece_bpe,
    "sentencepiece, no prefix": lambda: sentencepiece_bpe(prepend=False),
    "T5": t5_unigram,
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_200_texts_the_same_ids(kind, tmp_path):
    tokenizer = KINDS[kind]()
    model = quest.build(tiny("llama3.2", vocab_size=tokenizer.vocab_size + 3))
    report = save_gguf(model, tokenizer, tmp_path / "m.gguf")
    wrong = differing_texts(tokenizer, LlamaCpp(tmp_path / "m.gguf").tokenize)
    marked, spaced = ("".join(report.notes).count(words) for words in ("combining marks", "tabs and line ends"))
    wrong = [text for text in wrong if not (marked and has_combining_mark(text))]
    assert [text for text in wrong if not (spaced and has_other_space(text))] == []


@pytest.mark.parametrize("name", ["llama, llama3", "gpt2", "mixtral", "qwen3_next"])
def test_llama_cpp_applies_our_adapters(name, tmp_path):
    model = randomize_for_judging(quest.build(GGUF_MODELS[name](), seed=0))
    save_gguf(model, word_tokenizer(VOCAB), tmp_path / "m.gguf")
    adapted = LoRA(rank=4, alpha=8, targets=["all"])(model)
    generator = torch.Generator().manual_seed(3)
    for path, parameter in adapted.named_parameters():
        if path.endswith(".B"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    save_gguf_adapter(adapted, tmp_path / "adapter.gguf")
    judge = LlamaCpp(tmp_path / "m.gguf", lora=tmp_path / "adapter.gguf")
    assert compare_distributions(adapted, judge, IDS, every=13) <= limit_of(name, adapted, IDS)
    assert compare_distributions(adapted, LlamaCpp(tmp_path / "m.gguf"), IDS, every=13) > 0.1


def test_adapters_that_llama_cpp_lacks_are_refused(tmp_path):
    with pytest.raises(quest.errors.UsageError, match="DoRA"):
        save_gguf_adapter(DoRA(rank=2)(quest.build(tiny("llama3.2"))), tmp_path / "a.gguf")
    with pytest.raises(quest.errors.UsageError, match="kv_up in another form"):
        save_gguf_adapter(LoRA(rank=2, targets=["all"])(quest.build(tiny("deepseek-v3"))), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
