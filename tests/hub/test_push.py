"""A folder is pushed to a stand-in of the hub, which then holds the files; the card says how the model was made."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants

import llm_quest as quest
from llm_quest.cli.export import export_run
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.hub.load_save import save
from llm_quest.hub.model_card import Readme
from llm_quest.hub.push import push_folder
from llm_quest.report.run_card import run_readme
from llm_quest.techniques.lora import LoRA
from tests.gguf_models import tiny
from tests.gguf_texts import train_byte_level

TOKEN = "hf_" + "x" * 34


class Hub(BaseHTTPRequestHandler):
    """Takes commits as the hub does: large files apart, by their hash. `server.status`: of every answer whose path
    holds `server.place`; 0: the connection is cut instead."""

    def log_message(self, *given: object) -> None:
        pass

    def reply(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        status = self.server.status if self.server.place in self.path else 200  # type: ignore[attr-defined]
        if status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()  # type: ignore[attr-defined]
        self.reply({})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        hub, raw = self.server, self.body()
        address = f"http://127.0.0.1:{hub.server_port}"
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path.endswith("/api/repos/create"):
            hub.made.append(json.loads(raw))
            self.reply({"url": f"{address}/me/model", "name": "me/model", "id": "1"})
        elif self.path.endswith("/validate-yaml"):
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(raw)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.reply(
                {"files": [{"path": one, "uploadMode": mode, "shouldIgnore": False} for one, mode in modes.items()]}
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{address}/upload/{one['oid']}"}}}
                for one in json.loads(raw)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": found})
        elif "/commit/" in self.path:
            for line in map(json.loads, raw.splitlines()) if hub.status == 200 else ():
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self.reply({"success": True, "commitOid": "1" * 40, "commitUrl": f"{address}/me/model/commit/1"})
        else:
            self.reply({})


@pytest.fixture
def hub(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.status, server.files, server.objects, server.made, server.tokens = 200, {}, {}, [], set()
    server.place = ""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path) -> Path:
    model = quest.build("llama3.2-tiny")
    save(model, tmp_path / "model", tokenizer=character_tokenizer("abcdefghij klmnop"))
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"not for others")
    return tmp_path / "model"


def test_the_hub_holds_the_model_and_nothing_else(hub, folder, tmp_path):
    report = push_folder(folder, "me/model", private=True)
    assert hub.made[0]["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert report.left_out == ("optimizer.pt",)
    assert set(hub.files) == {file.name for file in folder.iterdir()} - {"optimizer.pt"} == set(report.files)
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("me/model")' in card
    assert "path/to/this/folder" not in card
    for name, content in hub.files.items():
        (tmp_path / "fetched").mkdir(exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(quest.load(tmp_path / "fetched")(ids), quest.load(folder)(ids))


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, DataError, "does not accept"),
        (403, DataError, "may not"),
        (409, MissingError, "409"),
        (500, MissingError, "500"),
        (0, MissingError, "cannot be reached"),
    ],
)
@pytest.mark.parametrize("place", ["", "/preupload/", "/upload/", "/commit/"])
def test_a_hub_that_refuses_or_is_cut_off_is_one_message_without_the_token(hub, folder, status, kind, words, place):
    hub.status, hub.place = status, place
    if place == "/upload/" and status:
        kind, words = MissingError, f"storage answered {status}"
    with pytest.raises(kind, match=words) as caught:
        push_folder(folder, "me/model")
    assert TOKEN not in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_one_message(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingError, match="cannot be reached"):
        push_folder(folder, "me/model")


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(hub, folder, tmp_path, monkeypatch):
    for name in ("model", "me/you/model", "me/", "me/mo del"):
        with pytest.raises(UsageError, match="OWNER/NAME"):
            push_folder(folder, name)
    with pytest.raises(DataError, match="no model folder"):
        push_folder(tmp_path, "me/model")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="does not load"):
        push_folder(folder, "me/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        push_folder(folder, "me/model")
    assert hub.made == []


CONFIG = """
recipe: sft
learning_rate: 0.001
batch_size: 4
techniques: [{name: lora}]
data: {source: ["hf:me/rows", {path: "/home/me/secret/rows.jsonl", weight: 2}], held_out: 0.05}
model: {load: org/base}
"""


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    rows = [{"step": step, "tokens": step * 100, "eval/loss": 3.0 - step / 10} for step in (10, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"step": 20, "scores": {"loss": 1.0, "accuracy": 0.5}}))
    (run / "data.json").write_text(json.dumps({"train_rows": 1234}))
    return run


def test_a_runs_card_says_data_recipe_numbers_and_license(run):
    readme = run_readme(run, "mit")
    model = quest.build("llama3.2-tiny")
    from llm_quest.models.build import family_of

    text = readme.render(model, family_of(model.config))
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["base_model"], head["datasets"]) == ("mit", "org/base", ["me/rows"])
    for line in (
        "| source | hf:me/rows, rows.jsonl |", "| rows | 1,234 |", "| recipe | sft |", "| techniques | lora |",
        "| steps | 20 |", "| tokens | 2,000 |", "| learning_rate | 0.001 |", "| loss | 1 |", "| accuracy | 0.5 |",
        "## License\n\nmit", "quest.load(", "from_pretrained(", "vllm serve",
    ):  # fmt: skip
        assert line in text, line
    assert "/home/me" not in text


def test_an_adapters_card_names_its_base(run):
    model = LoRA(rank=2)(quest.build("llama3.2-tiny"))
    text = run_readme(run, "mit").render_adapter(model, "org/base")
    head = yaml.safe_load(text.split("---")[1])
    assert (head["library_name"], head["base_model"], head["license"]) == ("peft", "org/base", "mit")
    for line in (
        "| recipe | sft |",
        "AutoPeftModelForCausalLM",
        "quest serve org/base --adapter name=",
        "An adapter (LoRA, ",
    ):
        assert line in text


def test_a_checkpoints_card_has_the_numbers_of_its_step(run):
    folder = run / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    readme = run_readme(folder)
    assert readme.results == {"loss": "2"}
    assert (readme.training["steps"], readme.training["tokens"]) == ("10", "1,000")


def test_an_export_of_an_export_keeps_what_the_card_says(run, folder, tmp_path):
    model, tokenizer = quest.load(folder), Tokenizer.load(folder)
    readme = replace(run_readme(run, "mit"), training={"a|b": "x < 1", "recipe": "sft"}, title="")
    save(model, tmp_path / "first", tokenizer=tokenizer, readme=readme)
    first = (tmp_path / "first" / "README.md").read_text()
    assert "| a\\|b | x &lt; 1 |" in first
    export_run(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == first
    export_run(tmp_path / "first", tmp_path / "third", license="apache-2.0")
    assert (tmp_path / "third" / "README.md").read_text() == re.sub(r"\bmit\b", "apache-2.0", first)
    (tmp_path / "first" / "README.md").write_text(
        "---\nlicense: gpl\ntags: [theirs]\n---\n\n## Data\n\n| | |\n| --- | --- |\n| a | b |\n"
    )
    assert run_readme(tmp_path / "first") == Readme(license="gpl")
    for text in ("", "---\n", "---\n[\n---\n", "---\n3\n---\n", "---\ntags: 3\n---\n"):
        (tmp_path / "first" / "README.md").write_text(text)
        assert run_readme(tmp_path / "first", "mit") == Readme(license="mit")


def test_a_card_names_llama_cpp_where_the_command_works(tmp_path):
    tokenizer = train_byte_level("qwen2", size=320)
    for name, changes, works in (("llama3.2", {}, True), ("gemma3", {"query_pre_attn_scalar": 7.0}, False)):
        config = tiny(name, vocab_size=tokenizer.vocab_size, **changes)
        folder = save(quest.build(config), tmp_path / name, tokenizer=tokenizer)
        card = (folder / "README.md").read_text()
        assert ("quest export path/to/this/folder model.gguf\nllama-server -m model.gguf" in card) is works
        with contextlib.nullcontext() if works else pytest.raises(UsageError):
            export_run(folder, tmp_path / f"{name}.gguf")


def test_a_folder_that_is_no_run_has_a_card_without_them(tmp_path, folder):
    assert run_readme(folder, "mit").training == {}
    (tmp_path / "config.yaml").write_text("a: [")
    assert run_readme(tmp_path).data == {}
