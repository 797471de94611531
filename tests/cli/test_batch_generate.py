"""`quest generate --prompts`: a row for every prompt, the same whatever the batch, and nothing lost."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli import batch_generate
from llm_quest.cli.batch_generate import BatchGenerateReport, generate_batch
from llm_quest.cli.chat import load_text_model
from llm_quest.cli.generation_options import GenerationOptions
from llm_quest.cli.main import app
from llm_quest.cli.output import run_with_exit_code
from llm_quest.data.corpus import load_corpus
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import BusyError, DataError, UsageError
from llm_quest.generation.generate import generate
from llm_quest.models.build import build, preset

ALPHABET = "abcdefgh "
PROMPTS = ["abc", "a", "abc", "hhhh gg", "", "abc", "b a b a b a", "cab", "abc"]
MANNER = GenerationOptions(9, 1.0, None, None, None, 1.0, ("h",), False, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("writing") / "model", seed=0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", PROMPTS)


def save_model(folder: Path, *, seed: int) -> str:
    tokenizer = character_tokenizer(ALPHABET)
    sizes = replace(
        preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size, num_hidden_layers=2, max_position_embeddings=24
    )
    quest.save(build(sizes, seed=seed), folder, tokenizer=tokenizer)
    return str(folder)


def write_prompts(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


def generate_to_file(
    model: str,
    prompts: Path,
    out: Path,
    manner: GenerationOptions = MANNER,
    *,
    batch: int = 4,
    said: list[str] | None = None,
) -> BatchGenerateReport:
    said = [] if said is None else said
    return generate_batch(model, prompts, out, manner, batch=batch, device="cpu", dtype="float32", log=said.append)


def rows_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_for_every_prompt_in_their_order_whatever_the_batch(model: str, prompts: Path, tmp_path: Path) -> None:
    found = [generate_to_file(model, prompts, tmp_path / f"{size}.jsonl", batch=size) for size in (1, 4, 64)]
    texts = [(tmp_path / f"{size}.jsonl").read_text() for size in (1, 4, 64)]
    assert texts[0] == texts[1] == texts[2]
    rows = rows_of(tmp_path / "4.jsonl")
    assert [row["row"] for row in rows] == list(range(len(PROMPTS)))
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["text"] == f"{row['prompt']}{row['completion']}" for row in rows)
    assert found[0].finished == {why: sum(row["finished"] == why for row in rows) for why in found[0].finished}
    assert {"length", "stop"} <= set(found[0].finished)
    same = [row["completion"] for row in rows if row["prompt"] == "abc"]
    assert len(set(same)) == 4  # an equal prompt gets another text


def test_a_row_is_what_generate_says_alone(model: str, prompts: Path, tmp_path: Path) -> None:
    generate_to_file(model, prompts, tmp_path / "texts.jsonl")
    built, tokenizer = load_text_model(model, "cpu", "float32", lambda text: None)
    ids, until = tokenizer.encode("abc"), MANNER.stopping_criteria(built, tokenizer)
    alone = generate(
        built, [ids], n=4, max_new_tokens=9, seed=3, eos_token_id=until.eos_token_ids, stop="h", tokenizer=tokenizer
    )
    assert [row["completion"] for row in rows_of(tmp_path / "texts.jsonl") if row["prompt"] == "abc"] == [
        one.text for one in alone
    ]


def test_training_reads_the_file_as_it_stands(model: str, prompts: Path, tmp_path: Path) -> None:
    generate_to_file(model, prompts, tmp_path / "texts.jsonl")
    corpus = load_corpus(str(tmp_path / "texts.jsonl"), columns={"text": "text"})
    wanted = [str(row["text"]) for row in rows_of(tmp_path / "texts.jsonl") if str(row["text"]).strip()]
    assert sorted({one.text for one in corpus.documents}) == sorted(set(wanted))


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_killed_command_goes_on_with_what_is_missing(
    cut: int, model: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "texts.jsonl"
    generate_to_file(model, prompts, whole)
    complete, calls = batch_generate.complete_prompts, []

    def complete_twice(*choices: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*choices, **options)

    monkeypatch.setattr(batch_generate, "complete_prompts", complete_twice)
    with pytest.raises(KeyboardInterrupt):
        generate_to_file(model, prompts, out, batch=2)
    assert len(rows_of(out)) == 4
    monkeypatch.undo()
    content = out.read_bytes()
    out.write_bytes(content[: len(content) - cut])
    said: list[str] = []
    done = generate_to_file(model, prompts, out, batch=3, said=said)
    assert done.new == (5 if cut == 0 else 6)
    assert any("generating the missing" in line for line in said)
    assert any("rows/s" in line and "tokens/s" in line and "ETA 0:00:00" in line for line in said)
    assert out.read_text() == whole.read_text()


def test_a_finished_file_is_left_as_it_is(model: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    generate_to_file(model, prompts, out)
    before = out.stat().st_mtime_ns, out.stat().st_ino
    again = generate_to_file(model, prompts, out, batch=1)
    assert (again.new, again.tokens, again.rows) == (0, 0, len(PROMPTS))
    assert "nothing was written" in again.lines()[-1]
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == before
    out.write_text("".join(reversed(out.read_text().splitlines(keepends=True))))  # killed before it was put in order
    generate_to_file(model, prompts, out)
    assert [row["row"] for row in rows_of(out)] == list(range(len(PROMPTS)))


def test_another_model_prompts_or_manner_is_refused(model: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    generate_to_file(model, prompts, out)
    before = out.read_text()
    with pytest.raises(UsageError, match=r"temperature 1.0, now 0.5: give the same settings, or choose another --out"):
        generate_to_file(model, prompts, out, replace(MANNER, temperature=0.5))
    with pytest.raises(UsageError, match="written with weights"):
        generate_to_file(save_model(tmp_path / "other", seed=1), prompts, out)
    with pytest.raises(UsageError, match="written with prompts"):
        generate_to_file(model, write_prompts(tmp_path / "more.jsonl", ["a", *PROMPTS]), out)
    (tmp_path / "mine.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(
        UsageError, match=r"without mine\.jsonl.settings.json, which records its settings; choose another --out"
    ):
        generate_to_file(model, prompts, tmp_path / "mine.jsonl")
    with FileLock(tmp_path / ".texts.jsonl.lock"), pytest.raises(BusyError, match="written by another process"):
        generate_to_file(model, prompts, out)
    out.write_text(before + before)
    with pytest.raises(DataError, match=rf"texts.jsonl:{len(PROMPTS) + 1} is not a row of this command, or repeats"):
        generate_to_file(model, prompts, out)
    with pytest.raises(UsageError, match=r"call the file texts\.jsonl"):
        generate_to_file(model, prompts, tmp_path / "texts.txt")


def test_prompts_that_fill_the_context_are_counted(model: str, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "long.jsonl", ["ab", "a" * 24, "c", "a" * 23])
    said: list[str] = []
    done = generate_to_file(model, file, tmp_path / "texts.jsonl", said=said)
    assert (done.rows, done.dropped) == (3, {"the prompt fills the context of 24 tokens": 1})
    assert any(f"dropped: 1 prompts that fill the context of 24 (first: {file}:2)" in line for line in said)
    assert [row["row"] for row in rows_of(tmp_path / "texts.jsonl")] == [0, 2, 3]
    assert generate_to_file(model, file, tmp_path / "texts.jsonl").new == 0
    assert generate_to_file(model, file, tmp_path / "slid.jsonl", replace(MANNER, slide=True)).rows == 4
    with pytest.raises(UsageError, match=r"every prompt of .* fills the context of 24 .*the shortest has 30.*--slide"):
        generate_to_file(model, write_prompts(tmp_path / "all.jsonl", ["a" * 30]), tmp_path / "none.jsonl")


def test_a_text_file_is_a_prompt_a_line_and_mistakes_name_file_line_and_field(model: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"abc\r\n\n  a b\nc")
    generate_to_file(model, tmp_path / "lines.txt", tmp_path / "texts.jsonl", replace(MANNER, tokens=1))
    assert [row["prompt"] for row in rows_of(tmp_path / "texts.jsonl")] == ["abc", "  a b", "c"]
    for name, content, said in [
        ("wrong.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "wrong.jsonl:2: has no 'prompt'; it has 'text'"),
        ("number.jsonl", '{"prompt": 1}\n', "number.jsonl:1: 'prompt' is a int"),
        ("half.jsonl", '{"prompt": "a"}\n{"prom', "half.jsonl:2: is not JSON"),
        ("empty.txt", "\n\n", "holds no prompts: write one a line"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=said):
            generate_to_file(model, tmp_path / name, tmp_path / "never.jsonl")
    assert not (tmp_path / "never.jsonl").exists()


def test_options_that_exclude_each_other_and_a_file_in_use_are_refused(
    model: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_generate(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quest", "generate", model, *words])
        code = run_with_exit_code(lambda: app(prog_name="quest"))
        said = capsys.readouterr()
        return code, said.out, said.err

    threads = torch.get_num_threads()
    out = str(tmp_path / "texts.jsonl")
    many = ("--prompts", str(prompts), "--out", out)
    code, told, _ = run_generate(*many, "-n", "3", "--batch", "2", "--json", "--quiet", "--threads", str(threads))
    assert (code, json.loads(told)["rows"], json.loads(told)["new"]) == (0, len(PROMPTS), len(PROMPTS))
    for words, said in [
        ((), "give --prompt TEXT, or --prompts FILE"),
        (("-p", "a", *many), "--prompt is for one text, --prompts for many"),
        ((*many, "--draft", "ngram"), "--draft is for one text"),
        ((*many, "--image", "x.png"), "--image is for one text"),
        (("--prompts", str(prompts)), "--prompts needs --out"),
        (("-p", "a", "--out", out), "--out belongs to --prompts FILE"),
        (("-p", "a", "--batch", "2"), "--batch belongs to --prompts FILE"),
    ]:
        code, _, told = run_generate(*words)
        assert code == 2, words
        assert said in told, told


TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<|endoftext|>{% endfor %}a"


@pytest.fixture
def chat_model_folder(tmp_path: Path) -> str:
    """A model whose folder has a chat template and its makers' advice."""
    folder = Path(save_model(tmp_path / "chatty", seed=1))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    advice = {"do_sample": False, "temperature": 1.0, "repetition_penalty": 1.3, "top_k": 0}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    return str(folder)


def run_json(*words: str, capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as stopped:
        app(["generate", *words, "--threads", "1"], standalone_mode=True)
    assert stopped.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_the_makers_advice_is_where_generate_starts_and_it_says_so(chat_model_folder: str, capsys):
    words = (chat_model_folder, "-p", "abc", "-n", "9", "--json", "--quiet")
    advised = run_json(*words, capsys=capsys)
    asked_for = run_json(*words, "--temperature", "0", "--repetition-penalty", "1.3", capsys=capsys)
    other = run_json(*words, "--repetition-penalty", "1", capsys=capsys)
    model, tokenizer = load_text_model(chat_model_folder, "cpu", "float32", lambda text: None)
    ends = {"eos_token_id": tokenizer.eos_token_ids, "max_new_tokens": 9, "temperature": 0.0}
    penalized, plain = (
        generate(model, [tokenizer.encode("abc")], repetition_penalty=penalty, **ends)[0].tokens
        for penalty in (1.3, 1.0)
    )
    assert advised["tokens"] == asked_for["tokens"] == penalized
    assert other["tokens"] == plain
    said: list[str] = []
    options = GenerationOptions(9, None, None, None, None, None, (), False, 0)
    decided = options.with_advice(model.generation_config, {"temperature": 0.8}, said.append)
    assert said == ["generation_config.json advises repetition_penalty 1.3, temperature 0"]
    assert (decided.temperature, decided.repetition_penalty) == (0.0, 1.3)
    alone = options.with_advice(None, {"temperature": 0.7, "top_p": 0.95}, said.append)
    assert (alone.temperature, alone.top_p, alone.repetition_penalty, len(said)) == (0.7, 0.95, 1.0, 1)


def test_chat_applies_the_template_and_rows_are_messages(chat_model_folder: str, tmp_path: Path, capsys):
    model, tokenizer = load_text_model(chat_model_folder, "cpu", "float32", lambda text: None)
    ids = tokenizer.encode("sbe<|endoftext|>uabc<|endoftext|>a", allow_special_tokens=True)
    (expected,) = generate(
        model, [ids], max_new_tokens=9, temperature=0.0, repetition_penalty=1.3, tokenizer=tokenizer,
        eos_token_id=tokenizer.eos_token_ids,
    )  # fmt: skip
    words = (chat_model_folder, "-n", "9", "--chat", "--system", "be", "--quiet", "--json")
    assert run_json(*words, "-p", "abc", capsys=capsys)["tokens"] == expected.tokens
    out = tmp_path / "rows.jsonl"
    run_json(*words, "--prompts", str(write_prompts(tmp_path / "p.jsonl", ["abc"])), "--out", str(out), capsys=capsys)
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["completion"] == expected.text
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("system", "be"), ("user", "abc"), ("assistant", expected.text.strip())
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no chat template"):
        replace(MANNER, chat=True).encode_prompts(character_tokenizer("ab"), ["a"])


def test_control_tokens_of_a_prompt_are_control_tokens_by_choice():
    tokenizer, text = character_tokenizer(ALPHABET), "ab<|endoftext|>"
    plain, special = (replace(MANNER, special_tokens=one).encode_prompts(tokenizer, [text])[0] for one in (0, 1))
    assert special == [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in plain


def test_beams_write_what_beam_search_finds(model: str, capsys):
    loaded, tokenizer = load_text_model(model, "cpu", "float32", lambda text: None)
    (expected,) = generate(
        loaded, [tokenizer.encode("abc")], max_new_tokens=6, temperature=0.0, num_beams=3, length_penalty=2.0,
        eos_token_id=tokenizer.eos_token_ids,
    )  # fmt: skip
    words = (model, "-p", "abc", "-n", "6", "--beams", "3", "--length-penalty", "2", "--json", "--quiet")
    assert run_json(*words, capsys=capsys)["tokens"] == expected.tokens


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"system": "be"}, "give --chat too"),
        ({"length_penalty": 2.0}, "give --beams too"),
    ],
)
def test_options_that_would_do_nothing_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        replace(MANNER, **choice)


@pytest.mark.parametrize(
    "command",
    [
        "generate X -p a",
        "generate X -p a --draft Y",
        "generate X -p a --image Z",
        "generate X --prompts P --out O",
        "chat X",
    ],
)
def test_a_choice_out_of_its_range_is_told_before_a_model_or_a_file_is_looked_for(command: str):
    done = CliRunner().invoke(app, [*command.split(), "--top-p", "0", "--quiet"])
    assert isinstance(done.exception, UsageError)
    assert "top_p" in str(done.exception)
