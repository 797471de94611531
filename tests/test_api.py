"""Training, evaluation, generation and conversation from Python: what the functions give is what the commands give."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llm_quest as quest
from llm_quest.api import GenerateOptions, Result, data_settings, setting_pairs
from llm_quest.cli.evaluate import evaluate_held_out
from llm_quest.data.chat import ChatTemplate
from llm_quest.errors import UsageError
from llm_quest.generation import generate as decoding
from llm_quest.hub.load_save import load_model_and_tokenizer, save
from llm_quest.models.decoder import GenerationConfig
from tests.recipes.tuned import WORDS, base, metrics, write_rows

PACKAGE = Path(__file__).parents[1] / "llm_quest"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base(tmp_path / "base")


@pytest.fixture
def result(tmp_path: Path, folder: Path) -> Result:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"say {a} {b}", "completion": a} for a in WORDS for b in WORDS]
    )
    return quest.train(
        "sft", model=folder, data=rows, max_steps=4, batch_size=4, sequence_length=40, samples={"every_steps": 0},
        techniques=["lora"], precision="fp32", compile=False, out=tmp_path / "run",
    )  # fmt: skip


def test_a_run_from_python_is_a_run(result: Result, tmp_path: Path):
    assert (result.run, result.status, result.step) == (tmp_path / "run", "finished", 4)
    assert result.metrics["eval/loss"] == metrics(result.run)[-1]["eval/loss"]
    assert "model" not in vars(result)  # not read yet
    assert result.model is result.model
    assert result.tokenizer.vocab_size == result.model.config.vocab_size


def test_every_mistake_is_told_at_once(folder: Path):
    with pytest.raises(UsageError) as error:
        quest.train("sft", model=folder, max_step=3, lr=1, techniques=["lra"])
    assert all(word in str(error.value) for word in ("did you mean 'max_steps'", "here it is learning_rate", "'lora'"))


def test_a_group_of_settings_keeps_its_other_defaults():
    groups = {"samples": {"every_steps": 0}, "model": {}, "techniques": ["lora"], "seed": 3, "max_time": None}
    assert list(setting_pairs(groups)) == [
        "samples.every_steps=0", 'techniques=["lora"]', "seed=3", "max_time=null",
    ]  # fmt: skip


def test_a_presets_name_is_built_and_anything_else_loaded():
    with pytest.raises(UsageError, match="preset and family given"):
        quest.train("pretrain", model={"preset": "gpt2-tiny", "family": "gpt2"})
    with pytest.raises(Exception, match=r"no folder 'llama3.3-tiny'"):
        quest.train("sft", model="llama3.3-tiny")


def test_data_are_names_and_what_is_none_is_told_with_the_remedy(tmp_path: Path):
    some = [tmp_path / "a.jsonl", {"path": tmp_path / "b.jsonl", "weight": 2}]
    expected = [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "weight": 2}]
    assert data_settings(some) == {"source": expected}
    assert data_settings(tmp_path) == {"source": str(tmp_path)}
    for rows in ([{"prompt": "a", "completion": "b"}], iter([1]), 5):
        with pytest.raises(UsageError, match=r"data is a .*; expected the name of a file or folder.*FILE\.py:FUNCTION"):
            data_settings(rows)
    for ask in (lambda model: quest.train("sft", model=model), quest.evaluate):
        with pytest.raises(UsageError, match=r"model is a Linear; expected .*save a model with quest\.save first"):
            ask(torch.nn.Linear(1, 1))


def test_evaluating_a_run_gives_what_the_command_gives(result: Result):
    found = quest.evaluate(result)
    command = evaluate_held_out(str(result.run), device="auto", dtype="auto", threads=0, log=lambda text: None)
    assert found == command.as_json()
    assert found["loss"] == pytest.approx(result.metrics["eval/loss"])
    assert quest.evaluate(f"{result.run}@last")["loss"] == found["loss"]


def test_a_text_or_a_task_is_evaluated_too(folder: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("say red green blue\n" * 20)
    assert quest.evaluate(folder, str(tmp_path / "text.txt"))["bits_per_byte"] > 0
    assert quest.evaluate(folder, task="reverse", num_problems=3)["num_problems"] == 3
    with pytest.raises(UsageError, match="give one of them"):
        quest.evaluate(folder, "builtin", task="reverse")


def test_texts_are_continued_with_the_folders_tokenizer(folder: Path):
    done = quest.generate(folder, ["say red", "say"], max_new_tokens=5, temperature=0.0)
    model, tokenizer = load_model_and_tokenizer(folder)
    ids = [tokenizer.encode(text) for text in ("say red", "say")]
    straight = quest.generate(model, ids, max_new_tokens=5, temperature=0.0, tokenizer=tokenizer)
    assert [one.text for one in done] == [one.text for one in straight]
    assert quest.generate(folder, "say red", max_new_tokens=5, temperature=0.0)[0].text == done[0].text
    assert quest.generate(model, "say red", tokenizer=tokenizer, max_new_tokens=5, temperature=0.0) == done[:1]
    with pytest.raises(UsageError, match="texts need the model's tokenizer"):
        quest.generate(model, "say red")


def test_the_sampling_is_what_the_folder_advises(folder: Path, tmp_path: Path):
    model, tokenizer = load_model_and_tokenizer(folder)
    model.generation_config = GenerationConfig(eos_token_ids=(), do_sample=False)
    save(model, tmp_path / "greedy", tokenizer=tokenizer)
    seeds = [quest.generate(tmp_path / "greedy", "say", max_new_tokens=8, seed=seed)[0].tokens for seed in range(4)]
    assert all(one == seeds[0] for one in seeds)
    warm = [
        quest.generate(tmp_path / "greedy", "say", max_new_tokens=8, seed=s, temperature=1.5)[0].tokens
        for s in range(4)
    ]
    assert any(one != seeds[0] for one in warm)


def test_a_conversation_goes_through_the_template(folder: Path):
    model, tokenizer = load_model_and_tokenizer(folder)
    messages = [{"role": "user", "content": "say red"}]
    prompt = ChatTemplate(tokenizer).encode_prompt(messages)
    written_out = quest.generate(model, [prompt], max_new_tokens=6, temperature=0.0, tokenizer=tokenizer)[0].text
    answer = quest.chat(folder, messages, max_new_tokens=6, temperature=0.0)
    assert answer.strip() == (written_out or "").strip()
    assert quest.chat(folder, "say red", max_new_tokens=6, temperature=0.0) == answer
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        quest.chat(model, "say red")


def test_the_names_for_type_checkers_are_the_names_there_are():
    module = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in module.body if isinstance(node, ast.If))
    imported = {
        (alias.name, node.module) for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == set(quest._EXPORTS.items())


def test_quest_train_is_a_function_though_a_package_has_its_name():
    code = "import llm_quest.train.loop, llm_quest as quest; quest.train('stf')"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert "no recipe is called 'stf', did you mean 'sft'?" in found.stderr


def test_the_package_is_a_command_and_imports_nothing_heavy():
    command = [sys.executable, "-m", "llm_quest", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout.startswith(
        "llm-quest"
    )
    code = "import llm_quest, sys; print([name for name in ('torch', 'pydantic', 'numpy') if name in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout == "[]\n"


def test_every_option_of_generating_is_an_option_here():
    known = set(inspect.signature(decoding.generate).parameters) - {"model", "prompts", "tokenizer"}
    assert set(GenerateOptions.__annotations__) == known
