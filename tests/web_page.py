"""Proves that the page of `quest export RUN FOLDER --web` computes our models: a llama of about 10 MB, random, in
float32; the page is opened in headless Chromium, which reaches no other server, and its greedy texts are compared with
those of `quest generate --temperature 0`, token by token. Prints the times until the page is ready and until the first
token. Threads: a second run, whose server sends the two headers. Then the page is used by keyboard alone, 400 and 1200
pixels wide, light and dark, and looked at as tests/browser.py says.

python -m tests.web_page [--wllama FILE.tgz|FOLDER] [--chromium PATH] [--tokens 64] [--screenshots FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.server
import itertools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

import llm_quest as quest
from llm_quest.cli.export import export_run
from llm_quest.data.chat import CHATML_TEMPLATE
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.layers.rotary import RotaryEmbedding
from tests.browser import SCHEMES, WIDTHS, Browser
from tests.gguf_judge import randomize_for_judging
from tests.gguf_models import tiny
from tests.gguf_texts import train_byte_level

VOCAB = 1024
TEXT = Path(__file__).parents[1] / "README.md"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GOAL_SECONDS = 3.0
PROMPTS = ["Once upon a time", "quest train", "The model", "a", "One loop for all objectives;"]
QUESTION = "Who are you?"


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server of one folder. isolated: it sends the headers without which a browser gives a page no threads."""

    isolated = False

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *words: Any) -> None:
        pass


@contextlib.contextmanager
def serve_folder(folder: Path, isolated: bool) -> Iterator[str]:
    handler = type("OneHandler", (Handler,), {"isolated": isolated})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def ascii_tokenizer() -> Tokenizer:
    """Byte-level BPE whose tokens are all ASCII, so that a text of random tokens is text, and its tokens show in it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=CONTROL, show_progress=False)
    backend.train_from_iterator(text, trainer)
    return Tokenizer(backend, eos_tokens=[CONTROL[0]], chat_template=CHATML_TEMPLATE)


def write_model(folder: Path) -> None:
    """A random llama of about 10 MB in float32."""
    tokenizer = ascii_tokenizer()
    changes: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 640, "max_position_embeddings": 512,
        "rotary": RotaryEmbedding(64, 10_000.0),
    }  # fmt: skip
    config = dataclasses.replace(quest.preset("llama3.2-tiny").config, **changes)
    quest.save(randomize_for_judging(quest.build(config, seed=0)), folder, tokenizer=tokenizer)


def ask(browser: Browser, prompt: str, tokens: int, temperature: float) -> None:
    """Fill in the form and send it."""
    for name, value in {"prompt": prompt, "temperature": str(temperature), "tokens": str(tokens)}.items():
        browser.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}")
    browser.evaluate("document.getElementById('generate').click()")


def page_text(browser: Browser, form: str, prompt: str, tokens: int) -> str:
    """What the page writes in a form (chat, text), greedily; of a reply the message, which the template trims, as
    `quest.chat` returns it."""
    browser.evaluate(f"document.querySelector('input[value={form}]').checked = true")
    ask(browser, prompt, tokens, 0.0)
    browser.wait_for_status("Done.")
    written = browser.text("#output > :last-child")
    return written.strip() if form == "chat" else written


def our_texts(folder: Path, tokens: int) -> dict[tuple[str, str], str]:
    """What `quest generate --temperature 0` and `quest chat` write."""
    found = quest.generate(str(folder), PROMPTS, max_new_tokens=tokens, temperature=0.0)
    texts = {("text", prompt): one.text or "" for prompt, one in zip(PROMPTS, found, strict=True)}
    return texts | {
        ("chat", QUESTION): quest.chat(str(folder), QUESTION, max_new_tokens=tokens, temperature=0.0).strip()
    }


def check_page(browser: Browser, url: str, texts: dict[tuple[str, str], str], tokens: int, threads: int) -> bool:
    """Open the page, compare every text and stop one; print the times."""
    begin = time.monotonic()
    browser.open(url)
    ready = browser.wait_for_status("Ready")
    loaded = time.monotonic() - begin
    same, first = 0, 0.0
    for number, ((form, prompt), text) in enumerate(texts.items()):
        written = page_text(browser, form, prompt, tokens)
        speed = browser.text("#speed")
        same += written == text
        first = first or float(speed.split("after ")[1].split(" s")[0])
        if written != text:
            print(f"  {form} {prompt!r}\n    page: {written!r}\n    here: {text!r}")
        if number == len(texts) - 2:
            print(f"  {speed}")
    overflow = browser.evaluate("document.documentElement.scrollWidth - innerWidth")
    print(
        f"  {ready}\n  first token {loaded + first:.2f} s after opening (goal {GOAL_SECONDS} s), {first:.2f} s after "
        "asking"
    )
    print(f"  texts equal: {same} of {len(texts)}; pixels beyond a width of 400: {max(overflow, 0)}")
    in_time = loaded + first <= GOAL_SECONDS
    return same == len(texts) and overflow <= 0 and in_time and f", {threads} thread" in ready and stops(browser)


def stops(browser: Browser) -> bool:
    """Whether Escape ends a long text, and what was written remains."""
    ask(browser, PROMPTS[0], 500, 1.0)
    while not browser.text("#output > :last-child"):
        time.sleep(0.02)
    browser.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    found = browser.wait_for_status("Stopped.", "Done.")
    print(f"  Escape: {found} {browser.text('#speed')}")
    return found == "Stopped."


def check_bytes(browser: Browser, home: Path, wllama: Path | None) -> bool:
    """A model whose tokens are mostly lone bytes: texts are written, and after those that end early the next one is."""
    tokenizer = train_byte_level("qwen2", size=300)
    config = tiny("llama3.2", vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    quest.save(quest.build(config, seed=0), home / "bytes", tokenizer=tokenizer)
    export_run(home / "bytes", home / "bytes-page", web=True, wllama=wllama)
    found = []
    with serve_folder(home / "bytes-page", False) as url:
        browser.open(url)
        browser.wait_for_status("Ready")
        for _ in range(10):
            ask(browser, PROMPTS[0], 100, 1.0)
            found.append(wait_for_end(browser))
        ask(browser, "", 10, 0.0)
        empty = browser.wait_for_status("No text")
        ask(browser, "much too long " * 300, 10, 0.0)
        refused = browser.wait_for_status("No text: request")
    print(f"random bytes: {len(found)} texts, {found.count('Done.')} whole; a prompt beyond the context: {refused}")
    return "Done." in found and "context" in refused and "first" in empty


def wait_for_end(browser: Browser) -> str:
    """The last status of a text, which may end early; the next text can then be written."""
    while not (found := browser.text("#status")).endswith(("Done.", "was started again.")):
        if "Load this page" in found:
            raise RuntimeError(found)
        time.sleep(0.05)
    return found


def check_reading(browser: Browser, url: str, texts: dict[tuple[str, str], str], screenshots: Path) -> bool:
    """Chat by keyboard at both widths, in both color schemes: the same text, nothing hard to read."""
    good = True
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        browser.open(url, width, scheme)
        browser.wait_for_status("Ready")
        for field, value in {"#prompt": QUESTION, "#temperature": "0", "#tokens": "16"}.items():
            browser.tab_to(field)
            browser.type(value)
        browser.tab_to("#generate")
        browser.press("Enter")
        browser.wait_for_status("Done.")
        written = browser.text("#output > :last-child").strip()
        problems = browser.reading_problems()
        if not written or not texts["chat", QUESTION].startswith(written):
            problems.append(f"another text: {written!r}")
        browser.screenshot(screenshots / f"web-{width}-{scheme}.png")
        print(
            f"{width} pixels, {scheme}: {len(problems)} problems\n" + "".join(f"  {one}\n" for one in problems), end=""
        )
        good = good and not problems
    return good


def check_file(browser: Browser, page: Path) -> bool:
    """A page opened from a file says what it needs."""
    browser.open(page.as_uri())
    time.sleep(1)
    print(f"from a file: {browser.text('#status')}")
    return browser.text("#status").startswith("Opened from a file")


def main() -> None:
    parser = argparse.ArgumentParser(description="Proves the page of quest export --web in headless Chromium.")
    parser.add_argument("--wllama", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--screenshots", type=Path, help="where the pictures of the page remain")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        model, page = Path(home, "model"), Path(home, "page")
        write_model(model)
        print("\n".join(export_run(model, page, web=True, wllama=given.wllama).lines()))
        texts = our_texts(model, given.tokens)
        browser = Browser(given.chromium, Path(home, "profile"))
        try:
            good = [check_file(browser, page / "index.html"), check_bytes(browser, Path(home), given.wllama)]
            for isolated in (False, True):
                print(f"served {'with' if isolated else 'without'} the headers for threads:")
                with serve_folder(page, isolated) as url:
                    good.append(check_page(browser, url, texts, given.tokens, 1 + isolated))
            pictures: Path = given.screenshots or Path(home)
            pictures.mkdir(parents=True, exist_ok=True)
            with serve_folder(page, False) as url:
                good.append(check_reading(browser, url, texts, pictures))
        finally:
            browser.close()
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
