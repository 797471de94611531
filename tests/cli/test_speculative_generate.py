"""`quest generate --draft`: the same greedy text, what it brought, and a draft that reads other tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import llm_quest as quest
from llm_quest.cli import chat
from llm_quest.cli.chat import load_text_model
from llm_quest.cli.generation_options import GenerationOptions
from llm_quest.cli.speculative_generate import generate_speculative, load_draft
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate
from llm_quest.machine.compiler import CompilerTrial
from llm_quest.models.build import build, preset

MANNER = GenerationOptions(12, 0.0, None, None, None, 1.0, (), False, 0)


def save_model(folder: Path, name: str, alphabet: str, seed: int, **sizes: int) -> str:
    tokenizer = character_tokenizer(alphabet)
    config = replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size, **sizes)
    quest.save(build(config, seed=seed), folder / name, tokenizer=tokenizer)
    return str(folder / name)


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_a_drafted_text_is_the_plain_one_and_its_gain_is_told(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_model(tmp_path, "target", "abcdefgh ", 0)
    draft = save_model(tmp_path, "draft", "abcdefgh ", 1) if kind == "model" else kind
    generate_speculative(
        target, draft, "abc abc", MANNER, device="cpu", dtype="float32", as_json=True, log=lambda text: None
    )
    told = json.loads(capsys.readouterr().out)
    model, tokenizer = load_text_model(target, "cpu", "float32", lambda text: None)
    ids = tokenizer.encode("abc abc") or [tokenizer.start_token_id]
    (plain,) = generate(model, [ids], max_new_tokens=12, temperature=0.0, eos_token_id=tokenizer.eos_token_ids)
    assert told["tokens"] == plain.tokens
    assert 0.0 <= told["draft"]["acceptance"] <= 1.0
    assert told["draft"]["speed_up"] > 0


def test_a_draft_with_another_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    target, other = save_model(tmp_path, "target", "abcd", 0), save_model(tmp_path, "other", "abcx", 0)
    model, tokenizer = load_text_model(target, "cpu", "float32", lambda text: None)
    with pytest.raises(UsageError, match=r"another tokenizer than .*--draft ngram"):
        load_draft(other, model, tokenizer, target, "cpu", "float32", lambda text: None)


def test_without_a_compiler_compile_is_refused_before_the_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = save_model(tmp_path, "target", "abcd", 0)
    monkeypatch.setattr(
        chat, "load_compiler", lambda log: CompilerTrial(None, "no C++ compiler was found (install g++)")
    )
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler.*install g\+\+"):
        chat.generate_text(
            target, "ab", replace(MANNER, compile=True), device="cpu", dtype="float32", as_json=True,
            log=lambda text: None,
        )  # fmt: skip


def test_compiled_passes_write_the_plain_text(tmp_path: Path) -> None:
    target = save_model(
        tmp_path, "target", "abcdefgh ", 0, num_hidden_layers=1
    )  # each layer is seconds of the compiler
    model, tokenizer = load_text_model(target, "cpu", "float32", lambda text: None)
    ids = tokenizer.encode("abc abc") or [tokenizer.start_token_id]
    (plain,) = generate(model, [ids], max_new_tokens=12, temperature=0.0, eos_token_id=tokenizer.eos_token_ids)
    words = ["generate", target, "-p", "abc abc", "-n", "12", "--temperature", "0", "--compile", "--json", "--quiet"]
    quest_command = [sys.executable, "-c", "from llm_quest.cli.main import main; main()"]
    done = subprocess.run([*quest_command, *words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tokens"] == plain.tokens
