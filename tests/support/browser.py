# SPDX-License-Identifier: GPL-2.0-or-later
"""A headless Chromium, controlled over a pipe by the DevTools protocol."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import WAIT_S

Json = dict[str, Any]


class Browser:
    """One page of a browser.  ``sent``: the addresses that it has asked for; ``complaints``: what
    it has written to its log.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session = ""
        self.sent: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Json:
        """Return the result of a command.  Raises ``AssertionError`` for an error."""
        number = next(self._numbers)
        message: Json = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: Json = answer["result"]
                return result

    def value(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def open(self, path: Path, *, width: int, scheme: str, media: str = "screen") -> None:
        """Show a file, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.call("Page.navigate", url=path.as_uri())
        ends_at = time.monotonic() + WAIT_S
        ready = "document.readyState === 'complete' && location.protocol === 'file:'"
        while not self.value(ready):
            assert time.monotonic() < ends_at, "the page is not loaded"
            time.sleep(0.02)

    def _receive(self) -> Json:
        while b"\0" not in self._buffer:
            readable = select.poll()
            readable.register(self._answers, select.POLLIN)
            assert readable.poll(WAIT_S * 1000), "the browser does not answer"
            data = os.read(self._answers, 2**20)
            assert data, "the browser has ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: Json = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.sent.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(params))
        return message


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser, whose proxy is a port at which nobody listens."""
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    # The protocol is at the descriptors 3 and 4.
    shell = f'exec chromium "$@" 3<&{theirs_in} 4>&{theirs_out}'
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        "--remote-debugging-pipe", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}",
    ]  # fmt: skip
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *options],
            pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    for fd in (theirs_in, theirs_out):
        os.close(fd)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for fd in (ours_in, ours_out):
            os.close(fd)
