"""Embeddings: the pooling that a folder names, by OpenAI's own client; the same alone and in company."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from llm_quest.cli.serve import find_pooling
from llm_quest.errors import DataError, QuestError
from llm_quest.hub.locate import locate_adapter
from llm_quest.hub.pooling import Pooling, read_pooling
from llm_quest.serve import embeddings
from tests.later import Later
from tests.serve.local_server import LocalServer, local_server
from tests.serve.test_server import wait_until

openai = Later("openai")

TEXTS = ["The quick brown fox", "a", "Once upon a time there was a cat, and 12 dogs."]


def embedding_folder(folder: Path, modules: list[str], *on: str) -> Path:
    """The two files of sentence-transformers."""
    (folder / "1_Pooling").mkdir(parents=True)
    listed = [
        {
            "idx": number,
            "path": "1_Pooling" if kind == "Pooling" else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    modes = {f"pooling_mode_{name}": name in on for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8} | modes))
    return folder


def test_a_folder_says_how_its_model_makes_embeddings(tmp_path):
    whole = ["Transformer", "Pooling", "Normalize"]
    assert read_pooling(tmp_path) is None
    assert read_pooling(embedding_folder(tmp_path / "qwen", whole, "lasttoken")) == Pooling("lasttoken", True)
    assert read_pooling(embedding_folder(tmp_path / "mean", whole[:2], "mean_tokens")) == Pooling("mean", False)
    for number, (modules, on) in enumerate(
        [
            ([*whole, "Dense"], ["lasttoken"]),
            (whole, ["max_tokens"]),
            (whole, []),
            (whole, ["lasttoken", "mean_tokens"]),
        ]
    ):
        with pytest.raises(QuestError, match="computed"):
            read_pooling(embedding_folder(tmp_path / str(number), modules, *on))
    for name, given in (("new", "mean"), ("listed", ["mean"])):
        new = embedding_folder(tmp_path / name, whole)
        (new / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 8, "pooling_mode": given}))
        assert read_pooling(new) == Pooling("mean", True)
    for given in ("max", ["mean", "lasttoken"], [], {}, 3):
        (new / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": given}))
        with pytest.raises(QuestError, match="computed"):
            read_pooling(new)
    away = embedding_folder(tmp_path / "away", whole, "lasttoken")
    (away / "modules.json").write_text((away / "modules.json").read_text().replace("1_Pooling", "../qwen/1_Pooling"))
    with pytest.raises(DataError, match="no name of a folder"):
        read_pooling(away)


def test_what_a_folder_says_of_texts_is_kept_or_refused(tmp_path):
    folder = embedding_folder(tmp_path / "texts", ["Transformer", "Pooling"], "lasttoken")
    about, prompts = folder / "sentence_bert_config.json", folder / "config_sentence_transformers.json"
    about.write_text('{"max_seq_length": 128, "do_lower_case": false}')
    prompts.write_text('{"prompts": {"query": "Query: "}, "default_prompt_name": null}')
    assert read_pooling(folder) == Pooling("lasttoken", False, max_tokens=128)
    for file, text, words in (
        (about, '{"do_lower_case": true}', "do_lower_case is on"),
        (about, '{"max_seq_length": "x"}', "a positive number was expected"),
        (prompts, '{"default_prompt_name": "query"}', "the prompt 'query' stands before each text"),
    ):
        before = file.read_text()
        file.write_text(text)
        with pytest.raises(QuestError, match=words):
            read_pooling(folder)
        file.write_text(before)


def test_a_model_of_the_hub_brings_its_pooling_and_an_adapter_its_files(tmp_path, monkeypatch):
    """The stand-in gives what huggingface_hub gives: the files that the patterns let through."""
    published = embedding_folder(tmp_path / "published", ["Transformer", "Pooling"], "lasttoken")
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors", "onnx/model.safetensors", "a.py"):
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_text("{}")

    def download(name: str, *, dry_run: bool = False, tqdm_class: Any = None, **options: Any) -> Any:
        to = tmp_path / "cache" / name.replace("/", "--") / "snapshots" / "1"
        names = [str(file.relative_to(published)) for file in published.rglob("*") if file.is_file()]
        wanted = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
        for one in () if dry_run else huggingface_hub.utils.filter_repo_objects(names, **wanted):
            (to / one).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(published / one, to / one)
        return [] if dry_run else str(to)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_pooling("me/emb", print) == Pooling("lasttoken", False)
    got = {str(file.relative_to(tmp_path)) for file in (tmp_path / "cache" / "me--emb").rglob("*") if file.is_file()}
    assert not [name for name in got if "onnx" in name or name.endswith(".py")]
    files = {file.name for file in locate_adapter("me/lora").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert locate_adapter(published) == published


def test_a_shorter_embedding_is_cut_and_then_has_length_one(tmp_path):
    hidden = torch.tensor([[9.0, 9.0, 9.0], [3.0, 4.0, 12.0]])
    assert Pooling("lasttoken", True)(hidden, 2).tolist() == pytest.approx([0.6, 0.8])
    assert Pooling("lasttoken", True)(hidden).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert Pooling("mean", False)(hidden, 1).tolist() == [6.0]
    folder = embedding_folder(tmp_path / "short", ["Transformer", "Pooling"], "lasttoken")
    for content, allowed in (
        ({}, {8}), ({"is_matryoshka": False}, {8}), ({"is_matryoshka": True}, set(range(1, 9))),
        ({"matryoshka_dimensions": [2, 4, 99]}, {2, 4, 8}), ({"is_matryoshka": True, "matryoshka_dimensions": []}, {8}),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(content))
        pooling = read_pooling(folder)
        assert {number for number in range(-1, 120) if pooling.allows(number, 8)} == allowed
    for wrong in ("4", [0], [True], [2.5], {"4": 8}):
        (folder / "config.json").write_text(json.dumps({"matryoshka_dimensions": wrong}))
        with pytest.raises(DataError, match="a list of positive numbers was expected"):
            read_pooling(folder)


@pytest.fixture(scope="module")
def local():
    with local_server(Pooling("lasttoken", True, max_tokens=200, shorter=(4,)), slots=4, log_requests=True) as running:
        yield running


def reference_vector(local: LocalServer, text: str) -> np.ndarray:
    """The definition, in float64 behind the model."""
    served = local.served
    with torch.no_grad():
        hidden = served.batch.model.hidden_states(torch.tensor([served.tokenizer.encode(text)]))[0, -1].double()
    return (hidden / hidden.norm()).numpy()


def test_vectors_are_the_last_tokens_in_both_encodings(local):
    client = openai.OpenAI(base_url=local.url, api_key="none", max_retries=0)
    default = client.embeddings.create(model="tiny", input=TEXTS)  # base64, which the client asks for and decodes
    plain = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert [one.index for one in default.data] == [0, 1, 2]
    assert default.usage.prompt_tokens == sum(len(local.served.tokenizer.encode(text)) for text in TEXTS)
    for one, other, text in zip(default.data, plain.data, TEXTS, strict=True):
        assert one.embedding == other.embedding
        assert np.abs(np.array(one.embedding) - reference_vector(local, text)).max() < 1e-6
    ids = local.served.tokenizer.encode(TEXTS[0])
    assert client.embeddings.create(model="tiny", input=ids).data[0].embedding == default.data[0].embedding
    short = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=4).data[0].embedding
    first = np.array(default.data[0].embedding[:4])
    assert np.abs(np.array(short) - first / np.linalg.norm(first)).max() < 1e-6
    width = len(default.data[0].embedding)
    with pytest.raises(openai.BadRequestError, match=f"dimensions is 3: this model's vectors have {width}, or 4"):
        client.embeddings.create(model="tiny", input="a", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.embeddings.create(model="tiny", input="fox " * 400)
    with pytest.raises(openai.BadRequestError, match="at most 200 tokens; the text has 210"):
        client.embeddings.create(model="tiny", input=[7] * 210)
    with pytest.raises(openai.BadRequestError, match="token 99999 does not exist") as wrong:
        client.embeddings.create(model="tiny", input=[[5], [99999]])
    assert wrong.value.param == "input.1"
    with pytest.raises(openai.NotFoundError, match="adapted makes no embeddings"):
        client.embeddings.create(model="adapted", input="a")


def test_a_vector_is_the_same_to_the_bit_alone_and_while_texts_are_written(local):
    client = openai.OpenAI(base_url=local.url, api_key="none", max_retries=0)
    alone = [client.embeddings.create(model="tiny", input=text).data[0].embedding for text in TEXTS]
    greedy = {"model": "tiny", "prompt": "Once", "max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**greedy).choices[0].text
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(client.completions.create, **greedy) for _ in range(4)]
        together = [pool.submit(client.embeddings.create, model="tiny", input=TEXTS) for _ in range(4)]
        assert all([one.embedding for one in found.result().data] == alone for found in together)
        assert all(found.result().choices[0].text == text for found in writing)


def test_hundreds_of_texts_are_one_request_which_is_counted_and_logged(local):
    client = openai.OpenAI(base_url=local.url, api_key="none", max_retries=0)
    metrics = local.served.batch.metrics
    tokens, ends = metrics.prompt_tokens, metrics.finished["stop"]
    found = client.embeddings.create(model="tiny", input=[[7]] * 1000)
    assert [one.index for one in found.data] == list(range(1000))
    wait_until(lambda: metrics.finished["stop"] == ends + 1)
    assert metrics.prompt_tokens == tokens + 1000
    assert local.lines[-1].startswith("embeddings tiny: 200, 1000 tokens read")


def test_texts_of_a_client_that_left_are_not_read(local, monkeypatch):
    read: list[int] = []

    def slow(served, pooling, ids, dimensions):
        read.append(len(ids))
        time.sleep(0.05)
        return torch.zeros(8)

    monkeypatch.setattr(embeddings, "embed_text", slow)
    client = openai.OpenAI(base_url=local.url, api_key="none", max_retries=0, timeout=0.4)
    with pytest.raises(openai.APITimeoutError):
        client.embeddings.create(model="tiny", input=[[7]] * 200)
    wait_until(lambda: any(line.startswith("embeddings tiny: 499") for line in local.lines))
    before = len(read)
    time.sleep(0.3)
    assert 0 < before <= len(read) <= before + 1


def test_requests_for_embeddings_wait_in_the_same_queue(local, monkeypatch):
    engine, go_on = local.server.engine, threading.Event()
    monkeypatch.setattr(engine, "max_waiting", 1)
    client = openai.OpenAI(base_url=local.url, api_key="none", max_retries=0, timeout=5.0)
    assert client.embeddings.create(model="tiny", input="a").data
    engine.call(go_on.wait)
    wait_until(lambda: not engine.jobs)
    engine.call(go_on.wait)
    try:
        with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
            client.embeddings.create(model="tiny", input="a")
    finally:
        go_on.set()
