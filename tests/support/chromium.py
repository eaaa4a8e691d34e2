"""Chromium without a window, spoken to through a pipe: pages at any width and colour scheme, and what they ask for.

The Chrome DevTools Protocol (--remote-debugging-pipe): JSON between NULs, read at descriptor 3 and written at 4.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WORDS = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--no-proxy-server", "--hide-scrollbars"] + [
    f"--disable-{what}"
    for what in ("gpu", "quic", "dev-shm-usage", "background-networking", "component-update", "sync", "extensions")
]


class Browser:
    """One page, and every event that it has sent."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes, self.left, self.id, self.session = reads, writes, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            data = os.read(self.reads, 1 << 16)
            assert data, "chromium has ended"
            self.left += data
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self.id += 1
        message: dict[str, Any] = {"id": self.id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file at a width in CSS pixels; when this returns, its scripts have run."""
        self.events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="screen", features=scheme)
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        self.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def complaints(self) -> list[str]:
        """Exceptions, console messages and refusals by the page's policy so far."""
        wanted = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in wanted]

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed on A4."""
        self.call("Emulation.setEmulatedMedia", media="print")
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        path.write_bytes(base64.b64decode(printed["data"]))


@contextmanager
def started(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in the folder `profile`; ended with the block."""
    assert PROGRAM is not None
    (its_reads, writes), (reads, its_writes) = os.pipe(), os.pipe()
    # The pipe's ends must be 3 and 4 over there: bash puts them there, whatever their numbers are here.
    words = [
        "bash",
        "-c",
        f'exec "$@" 3<&{its_reads} 4>&{its_writes}',
        "bash",
        PROGRAM,
        *WORDS,
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(words, pass_fds=(its_reads, its_writes), stderr=subprocess.DEVNULL)
    os.close(its_reads)
    os.close(its_writes)
    try:
        yield Browser(reads, writes)
    finally:
        os.close(writes)  # it ends when its pipe does
        os.close(reads)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
