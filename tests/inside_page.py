"""Proves the page of `quest serve --inside`: a tiny gpt-oss (experts, windows, sinks) and a tiny DeepSeek-V3 (latent
attention, a dense layer before those with experts) are served, each with a draft, and the page is used in headless
Chromium by keyboard alone, 400 and 1200 pixels wide, light and dark. The numbers that it shows are those of the
server's JSON, texts have a contrast of at least 4.5, every control gets the focus and shows it, nothing is wider than
the window, and the console has no error.

python -m tests.inside_page [--chromium PATH] [--screenshots FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llm_quest as quest
from tests.browser import SCHEMES, WIDTHS, Browser
from tests.gguf_judge import randomize_for_judging
from tests.web_page import ascii_tokenizer

MODELS = {"gpt-oss-tiny": "itself", "deepseek-v3-tiny": "mtp"}
"""Name -> draft; itself: the folder once more."""
PROMPT = "One loop trains a model of any kind, and"
STEPS_RIGHT = 5
CELL = "(one) => one.children.length ? [...one.children].map((part) => part.textContent).join('\\n') : one.textContent"
LONGEST_TOKEN = (
    "[...document.querySelectorAll('#tokens button')].reduce((a, b) => a.innerText.length > b.innerText.length ? a : b)"
)
LARGEST_SURPRISE = 12.0
"""In bits: from here on a token has the darkest shade."""


def write_model(name: str, folder: Path) -> None:
    """Its head is so large that some tokens are very improbable."""
    tokenizer = ascii_tokenizer()
    config = replace(quest.preset(name).config, vocab_size=tokenizer.vocab_size)
    model = randomize_for_judging(quest.build(config, seed=0))
    with torch.no_grad():
        model.head.weight.mul_(3)
    quest.save(model, folder, tokenizer=tokenizer)


@contextmanager
def inside_server(folder: Path, draft: str) -> Iterator[str]:
    """`quest serve --inside --draft` in a process of its own; its address."""
    command = [sys.executable, "-m", "llm_quest", "serve", str(folder), "--inside", "--port", "0", "--threads", "1"]
    command += ["--draft", str(folder) if draft == "itself" else draft]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "http://" in line)
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]
        finally:
            process.terminate()


def fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    data, headers = (json.dumps(body).encode(), {"Content-Type": "application/json"}) if body else (None, {})
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return answer.read()


def is_rounded_value(text: str, value: float) -> bool:
    """Whether a written number (`3.25`, `12.5 %`, `< 0.1 %`) is this one, rounded to its digits."""
    number, scale = re.search(r"[\d.]+", re.sub(r"^-", "", text))[0], 100 if "%" in text else 1  # type: ignore[index]
    if text.startswith("<"):
        return 0 < abs(value) * scale < float(number)
    places = len(number.partition(".")[2])
    same = abs(float(number) - abs(value) * scale) <= 0.5 * 10**-places + 1e-9
    return same and (text.startswith("-") == (value < 0) or float(number) == 0)


def table(browser: Browser, name: str) -> list[list[str]]:
    """The cells of a table, without its head; the texts of a cell that lists several are lines."""
    rows = f"[...document.querySelectorAll('#{name} tbody tr')].map((row) => [...row.cells].map({CELL}))"
    return browser.evaluate(rows)  # type: ignore[no-any-return]


class PageNumbers:
    """Counts the numbers of a page that are those of the server, and keeps the others."""

    def __init__(self, browser: Browser, url: str):
        self.browser, self.url, self.count, self.wrong = browser, url, 0, list[str]()
        newest = json.loads(fetch(f"{url}/inside/texts"))["texts"][0]
        self.name = newest["model"]
        self.text = f"{url}/inside/texts/{newest['id']}/{newest['choice']}"
        self.view = json.loads(fetch(f"{self.text}?top=8"))

    def compare(self, what: str, written: str, value: float) -> None:
        self.count += 1
        if not is_rounded_value(written, value):
            self.wrong.append(f"{what}: the page shows {written!r}, the server says {value}")

    def compare_rows(self, what: str, found: list[list[str]], expected: list[list[float]]) -> None:
        """Each number of each row; the first cell is a name."""
        if len(found) != len(expected):
            self.wrong.append(f"{what}: {len(found)} rows for {len(expected)}")
        for cells, numbers in zip(found, expected, strict=False):
            if len(cells) != len(numbers):
                self.wrong.append(f"{what}: {cells} for {numbers}")
            for cell, number in zip(cells, numbers, strict=False):
                self.compare(what, cell, number)

    def tokens(self) -> None:
        """The surprise under every token of the text."""
        script = "[...document.querySelectorAll('#tokens small')].map((one) => [one.textContent])"
        self.compare_rows("surprise", self.browser.evaluate(script), [[one["surprise"]] for one in self.view["tokens"]])

    def check_chosen_token(self, place: int) -> None:
        """What is said of one token."""
        token = self.view["tokens"][place]
        about = self.browser.text("#about").rpartition(": rank ")[2]
        found = re.fullmatch(r"(\d+), surprise (\S+) bits, log-probability (\S+), entropy (\S+) bits", about)
        names = ("rank", "surprise", "logprob", "entropy")
        self.compare_rows("token", [list(found.groups()) if found else []], [[token[name] for name in names]])
        rows = [row[1:] for row in table(self.browser, "alternatives")]
        self.compare_rows("alternatives", rows, [one["probabilities"] for one in token["alternatives"]])
        layers = json.loads(fetch(f"{self.text}/lens?top=4"))["layers"]
        rows = [re.findall(r"(?<= )< [\d.]+ %$|[\d.]+ %$", row[1], re.MULTILINE) for row in table(self.browser, "lens")]
        self.compare_rows("lens", rows, [[one["p"] for one in layer[place]] for layer in layers])
        row = len(self.view["prompt"]) + place - 1
        layers = json.loads(fetch(f"{self.text}/routing"))["layers"]
        rows = [[row[0], *re.split(r": |\n", row[1])] for row in table(self.browser, "routing")]
        numbers = [
            [number, *(value for one in layer[row] for value in (one["expert"], one["weight"]))]
            for number, layer in enumerate(layers)
            if layer
        ]
        self.compare_rows("experts", rows, numbers)

    def drafts(self, place: int) -> None:
        """The proposals of the chosen token's cycle, and the count of all."""
        cycles = json.loads(fetch(f"{self.text}/drafts"))["cycles"]
        proposals = [one for cycle in cycles for one in cycle["proposals"]]
        accepted = sum(one["is_accepted"] for one in proposals)
        counts = re.findall(r"\d+", self.browser.text("#drafted"))
        expected = [accepted, len(proposals), len(self.view["tokens"]), len(cycles)]
        self.compare_rows("counts of drafts", [counts], [expected])
        underlined = self.browser.evaluate("document.querySelectorAll('#tokens .accepted').length")
        self.compare_rows("underlined", [[str(underlined)]], [[accepted]])
        cycle = next(one for one in cycles if place < one["place"] + one["num_taken"])
        judged = sum(one["p"] is not None for one in cycle["proposals"])
        rows = [[row[0], *row[2:5]] for row in table(self.browser, "proposals")][:judged]
        numbers = [[cycle["place"] + n, one["q"], one["p"], one["chance"]] for n, one in enumerate(cycle["proposals"])]
        self.compare_rows("proposals", rows, numbers[:judged])

    def attention(self, layer: int, head: int, place: int) -> None:
        """The largest weights of a token's row, and every pixel of the drawing: opacity is the weight's square root."""
        size = len(self.view["prompt"]) + len(self.view["tokens"])
        raw = fetch(f"{self.text}/attention?layer={layer}&head={head}")
        weights = np.frombuffer(raw, "<f2").astype(np.float64).reshape(size, size)
        row = weights[len(self.view["prompt"]) + place - 1]
        found = table(self.browser, "looks")
        self.compare_rows("looks at", [cells[2:] for cells in found], [[w] for w in np.sort(row)[::-1][:8].tolist()])
        self.compare_rows("position", [cells[2:] for cells in found], [[float(row[int(cells[1])])] for cells in found])
        script = "document.getElementById('matrix')"
        pixels = f"[...{script}.getContext('2d').getImageData(0, 0, {size}, {size}).data].filter((_, i) => i % 4 === 3)"
        alpha = np.array(self.browser.evaluate(pixels)).reshape(size, size)
        self.count += alpha.size
        if np.abs(alpha - 255 * np.sqrt(weights)).max() > 1:
            self.wrong.append(f"the drawing of layer {layer}, head {head} is not its weights")


def wait_until_quiet(browser: Browser, seconds: float = 60.0) -> None:
    """Until the page is not at work. RuntimeError for a message."""
    end = time.monotonic() + seconds
    while (found := browser.text("#status")) or not browser.evaluate("document.readyState === 'complete'"):
        if found not in ("", "\u2026") or time.monotonic() > end:
            raise RuntimeError(f"the page says: {found}")
        time.sleep(0.05)


def use_page(browser: Browser, url: str) -> PageNumbers:
    """Write a text, walk to a token, choose another layer and head, all by keyboard; the numbers on the way."""
    for field, value in {
        "#prompt": PROMPT,
        "#max": "24",
        "#temperature": "0.7",
        "#top_k": "40",
        "#top_p": "0.9",
    }.items():
        browser.tab_to(field)
        browser.type(value)
    browser.tab_to("#ask button")
    browser.press("Enter")
    wait_until_quiet(browser)
    numbers = PageNumbers(browser, url)
    numbers.tokens()
    numbers.check_chosen_token(0)
    numbers.drafts(0)
    numbers.attention(0, 0, 0)
    browser.tab_to("#tokens [aria-selected=true]")
    for _ in range(STEPS_RIGHT):
        browser.press("ArrowRight")
    numbers.check_chosen_token(STEPS_RIGHT)
    numbers.drafts(STEPS_RIGHT)
    for field in ("#layer", "#head"):
        browser.tab_to(field)
        browser.press("ArrowDown")
        wait_until_quiet(browser)
    numbers.attention(1, 1, STEPS_RIGHT)
    return numbers


def check_empty(browser: Browser, url: str) -> bool:
    """The page before the first text; then a text with tokens of the darkest shade is there."""
    browser.open(f"{url}/inside")
    time.sleep(0.5)
    wait_until_quiet(browser)
    problems = browser.reading_problems()
    fetch(f"{url}/v1/completions", {"prompt": PROMPT, "max_tokens": 64, "temperature": 2, "top_k": 0, "seed": 1})
    largest = max(one["surprise"] for one in PageNumbers(browser, url).view["tokens"])
    print(f"before the first text: {len(problems)} problems {problems[:5]}; then one of up to {largest:.1f} bits")
    return not problems and largest >= LARGEST_SURPRISE


def check_view(browser: Browser, url: str, width: int, scheme: str, screenshots: Path) -> bool:
    browser.open(f"{url}/inside", width, scheme)
    time.sleep(0.3)
    wait_until_quiet(browser)
    browser.evaluate(f"{LONGEST_TOKEN}.click()")
    first = browser.reading_problems()
    numbers = use_page(browser, url)
    problems = [*first, *numbers.wrong, *browser.reading_problems()]
    browser.screenshot(screenshots / f"{numbers.name}-{width}-{scheme}.png")
    print(f"{numbers.name}, {width} pixels, {scheme}: {numbers.count} numbers compared, {len(problems)} problems")
    print("".join(f"  {one}\n" for one in problems[:20]), end="")
    return not problems


def check_model(browser: Browser, name: str, folder: Path, screenshots: Path) -> bool:
    write_model(name, folder)
    with inside_server(folder, MODELS[name]) as url:
        good = [check_empty(browser, url)]
        good += [check_view(browser, url, width, scheme, screenshots) for width in WIDTHS for scheme in SCHEMES]
    return all(good)


def main() -> None:
    parser = argparse.ArgumentParser(description="Proves the page of quest serve --inside in headless Chromium.")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--screenshots", type=Path, help="where the pictures of the page remain")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        pictures: Any = given.screenshots or Path(home)
        pictures.mkdir(parents=True, exist_ok=True)
        browser = Browser(given.chromium, Path(home, "profile"))
        try:
            good = [check_model(browser, name, Path(home, name), pictures) for name in MODELS]
        finally:
            browser.close()
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
