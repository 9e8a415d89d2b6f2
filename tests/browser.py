"""A headless Chromium, driven by its own protocol through two pipes; nothing has to be installed.

with Browser(folder) as browser:
    page = browser.opened(path.as_uri(), width=390, dark=True)
    page.click("th button")
    assert page.complaints == []
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
MISSING = f"no browser is installed ({', '.join(BROWSERS)}); `make browser` installs Debian's"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# The protocol is spoken on 3 and 4, which are the pipes of standard input and output here.
SHELL = 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null 2>&1'
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
PATIENCE = 180.0  # seconds, for one answer


class Browser:
    """Closed at the end of its `with`, whatever happens within."""

    def __init__(self, folder: Path) -> None:
        profile = f"--user-data-dir={folder / 'profile'}"
        command = ["sh", "-c", SHELL, "sh", str(BROWSER), *FLAGS, profile, "about:blank"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._number, self._read = 0, b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()  # it ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def opened(
        self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> Page:
        """A page in a tab of its own, after it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.go(address)
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """The answer to one command; events that come before it are kept."""
        assert self._process.stdin
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._next()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def events(self, session: str, until: str | None = None) -> list[dict[str, Any]]:
        """Events of a tab that have come; waits for one named `until`."""
        while True:
            found = [event for event in self._events if event.get("sessionId") == session]
            if until is None or any(event["method"] == until for event in found):
                return found
            self._events.append(self._next())

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout
        end, pipe = time.monotonic() + PATIENCE, self._process.stdout.fileno()
        while b"\0" not in self._read:
            ready, _, _ = select.select([pipe], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the browser gave no answer in {PATIENCE:.0f} s"
            more = os.read(pipe, 1 << 16)
            assert more, "the browser has ended"
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        return self._browser.call(method, self._session, **parameters)

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self._browser.events(self._session, until="Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; what is thrown there fails here."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str, index: int = 0) -> None:
        """With the pointer, in the middle of what is matched; it has to be on top there."""
        x, y, hit = self.run(
            f"(() => {{const e = document.querySelectorAll({json.dumps(selector)})[{index}];"
            "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(), x = b.x + b.width / 2, y = b.y + b.height / 2;"
            "return [x, y, e.contains(document.elementFromPoint(x, y))]})()"
        )
        assert hit, f"something covers {selector}"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """One of KEYS, to what has the focus."""
        code, text = KEYS[key]
        given = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(found))

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the page so far: thrown, logged, or by the browser itself."""
        self.run("0")  # what came before has been told by then
        found = []
        for event in self._browser.events(self._session):
            told, given = event["method"], event["params"]
            if told == "Runtime.exceptionThrown":
                found.append(json.dumps(given["exceptionDetails"]))
            if told == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
                found.append(json.dumps(given["args"]))
            if told == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                found.append(given["entry"]["text"])
        return found
