"""Drive a headless Chromium over its debugging pipe: open pages, run scripts and take screenshots."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage "
    "--hide-scrollbars --force-color-profile=srgb --remote-debugging-pipe"
).split()


def find_chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


class Page:
    """One open page; ``errors`` collects console errors and exceptions, ``requests`` every requested URL."""

    def __init__(self, command_fd: int, answer_fd: int) -> None:
        self.command_fd, self.answer_fd = command_fd, answer_fd
        self.pending, self.sequence, self.session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.events: list[str] = []

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.answer_fd], [], [], left)[0]:
                raise TimeoutError("Chromium did not answer in time")
            content = os.read(self.answer_fd, 1 << 20)
            if not content:
                raise RuntimeError("Chromium closed its pipe")
            self.pending += content
        message, self.pending = self.pending.split(b"\0", 1)
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(values["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def call(self, method: str, timeout: float = 30.0, **values: Any) -> dict[str, Any]:
        """Send one DevTools command and return its answer."""
        self.sequence += 1
        command = {"id": self.sequence, "method": method, "params": values}
        if self.session:
            command["sessionId"] = self.session
        content = json.dumps(command).encode() + b"\0"
        while content:
            content = content[os.write(self.command_fd, content) :]
        deadline = time.monotonic() + timeout
        while True:
            message = self._read(deadline)
            if message.get("id") == self.sequence:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def open(self, url: str, timeout: float = 30.0) -> None:
        """Load ``url`` and wait for its load event."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + timeout
        while "Page.loadEventFired" not in self.events:
            self._note(self._read(deadline))

    def run(self, expression: str) -> Any:
        """Value of a script expression; promises are awaited. Raises RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, condition: str, timeout: float = 30.0) -> None:
        """Poll until the script expression ``condition`` is true."""
        deadline = time.monotonic() + timeout
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still false: {condition}")
            time.sleep(0.05)

    def resize(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Set the viewport in CSS pixels and the preferred colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole_page: bool = False) -> None:
        """Write a PNG of the viewport, or of the whole page."""
        answer = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole_page, timeout=60.0
        )
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Run Chromium with one blank page; it is terminated on exit."""
    program = find_chromium()
    assert program is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4; high-numbered copies cannot clash with them.
    high_read, high_write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (command_read, answer_write))

    def use_descriptors() -> None:
        os.dup2(high_read, 3)
        os.dup2(high_write, 4)

    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=use_descriptors,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (command_read, answer_write, high_read, high_write):
        os.close(fd)
    page = Page(command_write, answer_read)
    try:
        targets = page.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(command_write)
        os.close(answer_read)
