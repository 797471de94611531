"""`quest serve`: what it loads and under which names; mistakes show before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_quest.cli import serve
from llm_quest.cli.export_gguf import export_gguf
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.load_save import save
from llm_quest.hub.save_adapter import save_adapter
from llm_quest.serve.app import QuestServer
from llm_quest.serve.server import ServeOptions, bind_socket
from tests.serve.local_server import tiny_adapter, tiny_model, tiny_tokenizer

MACHINE = {"name": None, "draft": None, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tiny_model(tiny_tokenizer()), tmp_path / "base", tokenizer=tiny_tokenizer())


def test_a_model_and_its_adapters_are_served_under_their_names(folder, tmp_path, monkeypatch):
    adapted = tiny_adapter(tiny_tokenizer())
    save_adapter(adapted, tmp_path / "adapter", base=str(folder))
    servers: list[QuestServer] = []
    monkeypatch.setattr(serve, "run_server", lambda server, *given: servers.append(server))
    lines: list[str] = []
    options = ServeOptions(port=0, slots=3, max_model_len=100)
    serve.serve_models(str(folder), [f"odd={tmp_path / 'adapter'}"], options, log=lines.append, **MACHINE)
    served = servers[0].served
    assert {name: one.parent for name, one in served.items()} == {"base": None, "odd": "base"}
    assert [one.batch.limits.slots for one in served.values()] == [3, 3]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(served["odd"].batch.model(ids), adapted(ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(served["base"].batch.model(ids), tiny_model(tiny_tokenizer())(ids))
    assert "base, odd: 3 slots of 100 tokens" in lines
    assert f"{tmp_path / 'adapter'}: adapter of {folder}" in lines
    save_adapter(adapted, tmp_path / "other", base="someone/else")
    serve.serve_models(str(folder), [f"odd={tmp_path / 'other'}"], options, log=lines.append, **MACHINE)
    assert f"{tmp_path / 'other'}: adapter of {folder}; it says that its base is someone/else" in lines
    assert lines[-1].startswith("http://127.0.0.1:")


def test_mistakes_show_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "load_text_model", lambda *given: pytest.fail("a model was loaded"))
    for adapters, words in ((["x"], "a name and a folder"), (["x=", "y=a"], "a name"), (["x=a", "x=b"], "twice")):
        with pytest.raises(UsageError, match=words):
            serve.serve_models("model", adapters, ServeOptions(port=0), log=print, **MACHINE)
    with pytest.raises(UsageError, match="--api-key-file"):
        serve.serve_models("model", [], ServeOptions(host="0.0.0.0", port=0), log=print, **MACHINE)
    with pytest.raises(DataError, match="No such file"):
        serve.serve_models("model", [], ServeOptions(port=0, api_key_file=tmp_path / "no"), log=print, **MACHINE)
    with bind_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is in use"):
            serve.serve_models("model", [], ServeOptions(port=port), log=print, **MACHINE)


def test_a_folder_without_an_adapter_is_named_with_what_to_give(folder, tmp_path):
    for place, words in (("nowhere", "there is no such folder"), ("base", "quest export RUN FOLDER --adapter")):
        with pytest.raises(DataError, match=f"{place}.*{words}"):
            serve.serve_models(str(folder), [f"x={tmp_path / place}"], ServeOptions(port=0), log=print, **MACHINE)


def test_an_adapter_does_not_take_the_models_name(folder, monkeypatch):
    monkeypatch.setattr(serve, "run_server", lambda *given: pytest.fail("it is served"))
    with pytest.raises(UsageError, match="the name of the model"):
        serve.serve_models(str(folder), ["base=x"], ServeOptions(port=0), log=print, **MACHINE)
    with pytest.raises(UsageError, match="more than the model's context of 256"):
        serve.serve_models(str(folder), [], ServeOptions(port=0, max_model_len=300), log=print, **MACHINE)


def test_a_template_that_fails_is_told_at_the_start_and_in_a_gguf_file(folder, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(serve, "run_server", lambda server, *given: None)
    assert export_gguf(folder, tmp_path / "good.gguf").notes == ()
    for template, said in (
        ("{% for x in %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only tools') }}", "only tools"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        serve.serve_models(str(folder), [], ServeOptions(port=0), log=lines.append, **MACHINE)
        assert any(
            line.startswith("note: chats are refused: the chat template failed") and said in line for line in lines
        )
        (note,) = export_gguf(folder, tmp_path / "broken.gguf", overwrite=True).notes
        assert said in note
        assert "programs that chat with this file fail too" in note


def test_the_adapter_of_a_run_is_called_as_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "model.json").write_text("{}")
    monkeypatch.setattr(serve, "locate_adapter", lambda path: tmp_path)
    monkeypatch.setattr(serve, "export_run", lambda *given, **options: None)
    refused = pytest.raises(DataError, match=r"^runs/french is an adapter of another base$")
    with refused, serve.adapter_folder("runs/french") as adapter:
        raise DataError(f"{adapter} is an adapter of another base")
