"""Headless Chromium for the proofs of pages, and what makes a page readable: nothing wider than the window, texts with
enough contrast, a ring around what has the focus, no error in the console."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe "
    "--host-resolver-rules='MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'"
)
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    "ArrowLeft": (37, ""),
}
"""Name of a key -> its Windows code and the text that it types."""
WIDTHS, SCHEMES = (400, 1200), ("light", "dark")
"""How a page is looked at: pixels, prefers-color-scheme."""
MIN_CONTRAST = 4.5
"""Of texts with their background (WCAG 2.2, 1.4.3)."""
MIN_RING_CONTRAST = 3.0
"""Of the ring around the focus with the page (WCAG 2.2, 1.4.11)."""
PAGE_SIZE = "({width: innerWidth, height: document.documentElement.scrollHeight})"
SCRIPT = Path(__file__).with_name("readable_page.js")
FAILURES = ("The model", "The text", "No text", "This browser", "Opened from")


class Browser:
    """Headless Chromium with one page, over the pipes of its debugging protocol."""

    def __init__(self, chromium: str, profile: Path):
        (read_theirs, write_ours), (read_ours, write_theirs) = os.pipe(), os.pipe()
        command = f"exec {chromium} {FLAGS} --user-data-dir={profile} 3<&{read_theirs} 4>&{write_theirs}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(read_theirs, write_theirs), stderr=subprocess.DEVNULL
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self.out, self.into = os.fdopen(write_ours, "wb"), os.fdopen(read_ours, "rb")
        self.count, self.session, self.rest = 0, None, b""
        self.target: str | None = None
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> Any:
        self.count += 1
        request = {"id": self.count, "method": method, "params": params}
        self.out.write(json.dumps(request | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.out.flush()
        while True:
            answer = self.read()
            self.errors += console_errors(answer)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def read(self) -> Any:
        while b"\0" not in self.rest:
            piece = self.into.read1(2**16)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str, width: int = 400, scheme: str = "light") -> None:
        """A new page in place of the last one, without its errors."""
        self.session, last = None, self.target
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        if last is not None:
            self.call("Target.closeTarget", targetId=last)
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setHardwareConcurrencyOverride", hardwareConcurrency=4)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.errors = []
        for domain in ("Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script[:80]}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        code, text = KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Replace what the focused field holds."""
        self.evaluate("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def tab_to(self, selector: str) -> None:
        """Press Tab until the focus is there. RuntimeError where it never comes there."""
        for _ in range(60):
            if self.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            self.press("Tab")
        raise RuntimeError(f"Tab does not lead to {selector}")

    def screenshot(self, file: Path) -> None:
        """The whole page, beyond the window too."""
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        clip = {"x": 0, "y": 0, "scale": 1, **self.evaluate(PAGE_SIZE)}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        self.call("Emulation.setScrollbarsHidden", hidden=False)
        file.write_bytes(base64.b64decode(found["data"]))

    def reading_problems(self, *, keyboard: bool = True) -> list[str]:
        """What makes this page hard to read or to use by keyboard: text by text, focus by focus."""
        self.evaluate(SCRIPT.read_text(encoding="utf-8"))
        over = self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        wide = [f"{over} pixels wider than the window"] if over > 0 else []
        texts = self.evaluate(f"readable.contrast({MIN_CONTRAST})")
        assert texts["count"] > 0
        return [*wide, *texts["found"], *(self.focus_problems() if keyboard else []), *self.errors]

    def focus_problems(self) -> list[str]:
        """Go around the page with Tab: every control that has a place in the order gets the focus, and shows it."""
        found = []
        controls = self.evaluate("readable.startTabs()")
        for number in range(4 * controls + 40):  # what scrolls has a place in the order too
            self.press("Tab")
            found += self.evaluate(f"readable.focus({MIN_RING_CONTRAST})")
            if number >= controls and not self.evaluate("readable.unvisited().length"):
                break
        return [
            *dict.fromkeys(found),
            *(f"Tab does not lead to {one}" for one in self.evaluate("readable.unvisited()")),
        ]

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def wait_for_status(self, *beginnings: str, seconds: float = 60.0) -> str:
        end = time.monotonic() + seconds
        while not (found := self.text("#status")).startswith(beginnings):
            if time.monotonic() > end or found.startswith(FAILURES):
                raise RuntimeError(f"the page says: {found or 'nothing'}")
            time.sleep(0.05)
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call("Browser.close")
        self.process.wait(timeout=20)


def console_errors(message: Any) -> list[str]:
    """What a message of the protocol says of errors in the page."""
    params = message.get("params", {})
    match message.get("method"):
        case "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            return [f"error: {details.get('exception', {}).get('description', details['text'])}"]
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
            return [f"console: {[one.get('value', one.get('description')) for one in params['args']]}"]
        case "Log.entryAdded" if params["entry"]["level"] == "error":
            return [f"console: {params['entry']['text']} {params['entry'].get('url', '')}"]
    return []
