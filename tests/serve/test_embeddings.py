"""Embeddings: the pooling that a folder names, by OpenAI's own client; the same alone and in company."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

from llm_quest.errors import DataError, QuestError
from llm_quest.hub.pooling import Pooling, read_pooling
from tests.serve.local_server import LocalServer, local_server

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
    away = embedding_folder(tmp_path / "away", whole, "lasttoken")
    (away / "modules.json").write_text((away / "modules.json").read_text().replace("1_Pooling", "../qwen/1_Pooling"))
    with pytest.raises(DataError, match="no name of a folder"):
        read_pooling(away)


@pytest.fixture(scope="module")
def local():
    with local_server(Pooling("lasttoken", True), slots=4) as running:
        yield running


def expected_vector(local: LocalServer, text: str) -> np.ndarray:
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
        assert np.abs(np.array(one.embedding) - expected_vector(local, text)).max() < 1e-6
    ids = local.served.tokenizer.encode(TEXTS[0])
    assert client.embeddings.create(model="tiny", input=ids).data[0].embedding == default.data[0].embedding
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="a", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.embeddings.create(model="tiny", input="fox " * 400)
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
