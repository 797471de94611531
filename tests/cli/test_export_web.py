"""`quest export --web` with a stand-in for wllama's package. `python -m tests.web_page` runs the real one."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli import export_web as module
from llm_quest.cli.export import export_run
from llm_quest.cli.export_web import WEB_FILES
from llm_quest.cli.main import app
from llm_quest.data.chat import CHATML_TEMPLATE
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.hub import wllama
from llm_quest.techniques.lora import LoRA
from tests.gguf_models import tiny
from tests.gguf_texts import train_byte_level

CONTENT = {name: f"the bytes of {name}".encode() for name in wllama.FILES}


def write_package(file: Path, extra: str | None = None, **changed: bytes) -> Path:
    """A package of npm with wllama's paths, and perhaps one more member."""
    members = {f"package/{one.path}": changed.get(name, CONTENT[name]) for name, one in wllama.FILES.items()}
    with tarfile.open(file, "w:gz") as archive:
        for name, content in {**members, **({extra: b"x"} if extra else {})}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


@pytest.fixture(autouse=True)
def other_hashes(monkeypatch, tmp_path):
    """The hashes of the stand-in; an empty cache; no npm."""
    files = {name: replace(one, sha256=hashlib.sha256(CONTENT[name]).hexdigest()) for name, one in wllama.FILES.items()}
    monkeypatch.setattr(wllama, "FILES", files)
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wllama.shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "a <b>&amp; model"
    tokenizer = train_byte_level("qwen2", size=320)
    tokenizer.chat_template = CHATML_TEMPLATE
    quest.save(quest.build(tiny("llama3.2", vocab_size=tokenizer.vocab_size)), folder, tokenizer=tokenizer)
    return folder


def test_the_folder_has_all_files_and_no_address_of_another_server(model, tmp_path):
    out, package = tmp_path / "out", write_package(tmp_path / "w.tgz")
    report = export_run(model, out, web=True, wllama=package, quantize="q8_0", license="mit")
    assert {file.name for file in out.iterdir()} == WEB_FILES == set(report.files)
    assert {name: (out / name).read_bytes() for name in CONTENT} == CONTENT
    assert quest.load(out / "model.gguf").config.vocab_size == quest.load(model).config.vocab_size
    for name in ("index.html", "page.js", "style.css", "README.md"):
        assert not re.search(r"(?:https?:)?//\w", (out / name).read_text().replace("// ", "")), name
    html = (out / "index.html").read_text()
    assert "a &lt;b&gt;&amp;amp; model</h1>" in html
    assert "default-src 'none'" in html
    assert '<input type="radio" name="form" value="chat" checked>' in html
    assert all(f"{report.parameters:,}" in (out / name).read_text() for name in ("index.html", "README.md"))
    assert "<dt>License</dt><dd>mit</dd>" in html
    assert report.parameters == sum(parameter.numel() for parameter in quest.load(model).parameters())
    assert "python -m http.server" in report.lines()[-1]


def test_all_elements_that_the_program_names_are_on_the_page(model, tmp_path):
    export_run(model, tmp_path / "out", web=True, wllama=write_package(tmp_path / "w.tgz"))
    html, program = ((tmp_path / "out" / name).read_text() for name in ("index.html", "page.js"))
    assert {f'id="{name}"' for name in re.findall(r'at\("(\w+)"\)', program)} <= set(re.findall(r'id="\w+"', html))
    assert set(re.findall(r'(?:src|href)="([^":,]+)"', html)) <= WEB_FILES


def test_a_model_without_a_template_has_no_chat(tmp_path):
    tokenizer = train_byte_level("qwen2", size=320)
    model = quest.build(tiny("llama3.2", vocab_size=tokenizer.vocab_size))
    quest.save(model, tmp_path / "model", tokenizer=tokenizer)
    export_run(tmp_path / "model", tmp_path / "out", web=True, wllama=write_package(tmp_path / "w.tgz"))
    assert "radio" not in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (lambda file: write_package(file, **{"wllama.wasm": b"other"}), "not that of wllama 3.13.0"),
        (lambda file: write_package(file, extra="../outside"), "is no package of npm"),
        (lambda file: write_package(file, extra="/etc/outside"), None),  # its first / is taken away
        (lambda file: (file.write_bytes(b"no archive"), file)[1], "is no package of npm"),
        (lambda file: (file.write_bytes(write_package(file).read_bytes()[:150]), file)[1], "package"),
        (lambda file: (tarfile.open(file, "w:gz").close(), file)[1], "is missing"),
    ],
)
def test_a_package_that_is_not_wllamas_leaves_nothing(package, message, model, tmp_path):
    file = package(tmp_path / "w.tgz")
    if message is None:
        assert wllama.load_wllama(file) == CONTENT
        return
    with pytest.raises(DataError, match=message):
        export_run(model, tmp_path / "out", web=True, wllama=file)
    assert [one.name for one in tmp_path.iterdir()] == ["w.tgz"]


def test_a_model_that_cannot_be_written_leaves_nothing(model, tmp_path):
    package = write_package(tmp_path / "w.tgz")
    with pytest.raises(UsageError, match="q9"):
        export_run(model, tmp_path / "out", web=True, wllama=package, quantize="q9")
    quest.save(LoRA(rank=2)(quest.load(model)), tmp_path / "adapter", tokenizer=Tokenizer.load(model))
    with pytest.raises(UsageError, match=r"add --merge$"):
        export_run(tmp_path / "adapter", tmp_path / "out", web=True, wllama=package)
    assert {one.name for one in tmp_path.iterdir()} == {"w.tgz", "adapter"}


def test_a_model_beyond_two_gigabytes_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(UsageError, match="add --quantize q4_0"):
        export_run(model, tmp_path / "out", web=True, wllama=write_package(tmp_path / "w.tgz"))
    assert not (tmp_path / "out").exists()


def test_a_page_is_replaced_and_nothing_else(model, tmp_path):
    package = write_package(tmp_path / "w.tgz")
    kind = {"web": True, "wllama": package}
    export_run(model, tmp_path / "out", **kind)
    with pytest.raises(UsageError, match="not empty"):
        export_run(model, tmp_path / "out", **kind)
    export_run(model, tmp_path / "out", overwrite=True, **kind)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        export_run(model, tmp_path / "out", overwrite=True, **kind)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_npm_gets_the_package_once(tmp_path, monkeypatch):
    with pytest.raises(MissingError, match=r"npm pack @wllama/wllama@3\.13\.0"):
        wllama.load_wllama()
    calls = []

    def npm(command, *, cwd, **options):
        calls.append(command)
        write_package(Path(cwd) / "wllama.tgz")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wllama.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(wllama.subprocess, "run", npm)
    assert wllama.load_wllama() == wllama.load_wllama() == CONTENT
    assert len(calls) == 1
    assert "--ignore-scripts" in calls[0]
    (tmp_path / "cache" / "wllama-3.13.0" / "wllama.wasm").write_bytes(b"damaged")
    assert wllama.load_wllama() == CONTENT
    assert len(calls) == 2


def test_npm_without_a_network_is_one_message(monkeypatch):
    monkeypatch.setattr(wllama.shutil, "which", lambda name: "/usr/bin/npm")
    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error network request failed\n")
    monkeypatch.setattr(wllama.subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(MissingError, match="request failed; get it once"):
        wllama.load_wllama()


def test_an_unpacked_package_serves_too(tmp_path):
    with tarfile.open(write_package(tmp_path / "w.tgz")) as archive:
        archive.extractall(tmp_path / "w", filter="data")
    assert wllama.load_wllama(tmp_path / "w") == wllama.load_wllama(tmp_path / "w" / "package") == CONTENT
    (tmp_path / "w" / "package" / "LICENCE").unlink()
    with pytest.raises(DataError, match="LICENCE is missing"):
        wllama.load_wllama(tmp_path / "w")


def test_the_command_line_says_what_goes_with_what(model, tmp_path):
    package = str(write_package(tmp_path / "w.tgz"))
    done = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "out"), "--web", "--wllama", package])
    assert done.exit_code == 0, done.output
    for words in (["out2", "--wllama", package], ["x.gguf", "--web"], ["out2", "--web", "--adapter"]):
        failed = CliRunner().invoke(app, ["export", str(model), str(tmp_path / words[0]), *words[1:]])
        assert isinstance(failed.exception, UsageError), words
        assert "--web" in str(failed.exception)


def test_the_page_is_part_of_the_package():
    assert all(Path(module.PAGE.with_name(module.PAGE.name + ending)).is_file() for ending in (".html", ".js", ".css"))
    assert '"report/web_page.*"' in Path("pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("npm error code EFBIG\nnpm error syscall write\nnpm error errno -27\nnpm error EFBIG: file too large, write\n"
         "npm error A complete log of this run can be found in: /x.log\n", "EFBIG: file too large, write"),
        ("npm error code E404\nnpm error 404 Not Found - GET https://registry.npmjs.org/x\nnpm error 404\n",
         "404 Not Found - GET https://registry.npmjs.org/x"),
        ("npm error code ENOSPC\n", "code ENOSPC"),
        ("node: not found\n", "node: not found"),
        ("", "no reason given"),
    ],
)  # fmt: skip
def test_the_reason_of_npm_is_its_sentence(stderr: str, reason: str):
    assert wllama.find_npm_reason(stderr) == reason
