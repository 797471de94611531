"""Images in chat completions: the answers are those of `quest generate --image`, in any company, for every layout."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_quest as quest
from llm_quest.cli.serve import load_model, load_with_adapter
from llm_quest.cli.vision import ImagePrompt
from llm_quest.data.image_chat import ImageTurn
from llm_quest.generation.generate import generate
from llm_quest.hub.load_adapter import load_adapter
from llm_quest.hub.save_adapter import save_adapter
from llm_quest.serve.images import BODY_BYTES
from llm_quest.techniques.lora import LoRA
from tests.cli.test_gemma3_folder import folder as gemma3  # noqa: F401
from tests.cli.test_llava_folder import folder as llava  # noqa: F401
from tests.cli.test_qwen3_5_folder import folder as qwen3_5  # noqa: F401
from tests.serve.local_server import LocalServer, serving

QUESTION = "compare with now"
PIXEL = base64.b64encode(b"GIF89a" + b"\x00" * 20).decode()


@pytest.fixture(scope="module", params=["llava", "gemma3", "qwen3_5"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[LocalServer]:
    with serving({"model": load_model(str(folder), "cpu", "float32", lambda line: None)}, inside=True) as running:
        yield running


def images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def data_url(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def ask(local: LocalServer, files: Sequence[Path], tokens: int = 8, **fields: Any) -> tuple[int, Any]:
    """Status and answer of a question about these images."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | fields
    return local.ask("POST", "/v1/chat/completions", body)[:2]


def answer_of(local: LocalServer, files: Sequence[Path], tokens: int = 8) -> tuple[str, list[float]]:
    """The text, and its tokens' log-probabilities."""
    status, answer = ask(local, files, tokens, logprobs=True)
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["message"]["content"], [one["logprob"] for one in choice["logprobs"]["content"]]


def library_answer(folder: Path, files: Sequence[Path], tokens: int, adapter: Path | None = None) -> tuple[str, Any]:
    """What the model writes through the library, from the prompt that tests/cli holds equal to transformers'."""
    shown = ImagePrompt.load(str(folder), [str(file) for file in files], "cpu", "float32", lambda line: None)
    ids = shown.chat.encode_turns([ImageTurn("user", QUESTION, len(files))], shown.image_lengths)
    decoder: Any = shown.decoder if files else shown.model
    if adapter is not None:
        load_adapter(shown.model.decoder, adapter)
    options: dict[str, Any] = {"temperature": 0.0, "tokenizer": shown.tokenizer, "eos_token_id": ()}
    done = generate(decoder, [ids], max_new_tokens=tokens, **options)[0]
    return done.text, pytest.approx(list(done.logprobs), abs=1e-4)


def test_an_answer_about_images_is_that_of_the_library_alone_and_in_company(local: LocalServer, folder: Path):
    first, *others = images(folder)
    shown = [[first], [*others, first], [], [first, first], [*others] or [first]]
    tokens = [3, 12, 7, 9, 5]
    wanted = [library_answer(folder, files, count) for files, count in zip(shown, tokens, strict=True)]
    alone = [answer_of(local, files, count) for files, count in zip(shown, tokens, strict=True)]
    assert alone == wanted
    assert abs(alone[0][1][0] - alone[2][1][0]) > 1e-3, "the images matter"
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(lambda files, count: answer_of(local, files, count), shown, tokens)) == wanted


def test_an_adapter_of_the_text_part_answers_about_images_too(folder: Path, tmp_path: Path):
    loaded: Any = quest.load(folder)
    tuned = LoRA(rank=2, alpha=64)(getattr(loaded, "decoder", loaded))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(tuned, tmp_path / "adapter", base=str(folder))
    served = load_with_adapter(str(folder), str(tmp_path / "adapter"), "model", "cpu", "float32", lambda line: None)
    first = images(folder)[:1]
    with serving({"adapted": served}) as running:
        for files in (first, []):
            found = answer_of(running, files)
            assert found == library_answer(folder, files, 8, tmp_path / "adapter")
            assert found != library_answer(folder, files, 8), "the adapter matters"


def test_a_prompt_with_another_image_reuses_nothing(local: LocalServer, folder: Path):
    texts = []
    for file in (images(folder)[0], images(folder)[-1], images(folder)[0]):
        texts.append(answer_of(local, [file, file]))
        status, answer = ask(local, [file, file])
        assert (status, answer["usage"]["prompt_tokens_details"]["cached_tokens"]) == (200, 0)
    assert texts[0] == texts[2]
    listed = local.ask("GET", "/inside/texts")[1]["texts"]
    assert answer["id"] not in {one["id"] for one in listed}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/cat.png", "fetches no address"),
        ("file:///etc/hostname", "fetches no address"),
        ("/etc/hostname", "fetches no address"),
        (None, "fetches no address"),
        (7, "fetches no address"),
        ("data:image/png,abc", "not in base64"),
        ("data:image/png;base64", "not in base64"),
        ("data:image/png;base64,@@@@", "base64 is not valid"),
        ("data:image/png;base64,", "no image that can be read"),
        (f"data:image/gif;base64,{PIXEL}", "no image that can be read"),
        ("data:;base64," + base64.b64encode(b"hello").decode(), "no image that can be read"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(local: LocalServer, url: Any, words: str):
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]
    status, answer, _ = local.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["param"] == "messages.0.content.1"


def test_more_images_than_the_context_holds_are_refused_before_they_are_all_read(local: LocalServer, folder: Path):
    status, answer = ask(local, images(folder)[:1] * 300)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert local.server.limits.body_bytes == BODY_BYTES


def test_a_marker_that_somebody_types_is_text(local: LocalServer, folder: Path):
    reader = local.served.images
    assert reader is not None
    content = [{"type": "image_url", "image_url": data_url(images(folder)[0])}, {"type": "text", "text": "<image>"}]
    typed = [*content, {"type": "text", "text": reader.chat.image_markup}]
    for parts in (content, typed):
        messages = [{"role": "user", "content": parts}]
        status, answer, _ = local.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        assert status == 200, answer
