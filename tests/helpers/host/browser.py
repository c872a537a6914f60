"""A headless Chromium, driven through its DevTools protocol: enough to load a page, act on it, look at it."""

import base64
import json
import shutil
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.helpers.host.comfy_server import WebSocket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Devtools(WebSocket):
    """A websocket that can also send text."""

    def send(self, text: str) -> None:
        payload = text.encode()
        size = len(payload)
        if size < 126:
            length = bytes([0x80 | size])
        elif size < 1 << 16:
            length = struct.pack(">BH", 0xFE, size)
        else:
            length = struct.pack(">BQ", 0xFF, size)
        mask = bytes(4)  # of zeros: it leaves the payload as it is
        self.socket.sendall(b"\x81" + length + mask + payload)


class Browser:
    """One Chromium with one page of `width` x `height`.

    Attributes:
        errors: uncaught exceptions and console errors of the page so far.
    """

    def __init__(self, width: int = 1400, height: int = 900, timeout: float = 120):
        self.errors: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        self._number = 0
        self.process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0",
                "--hide-scrollbars",
                f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = self._port(time.monotonic() + timeout)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=timeout) as answer:
                target = next(item for item in json.load(answer) if item["type"] == "page")
            path = "/" + target["webSocketDebuggerUrl"].split("/", 3)[3]
            self._devtools = Devtools("127.0.0.1", port, path, timeout)
            self.call("Page.enable")
            self.call("Runtime.enable")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def _port(self, deadline: float) -> int:
        file = Path(self._profile.name) / "DevToolsActivePort"
        while time.monotonic() < deadline:
            if file.exists() and (lines := file.read_text().split()):
                return int(lines[0])
            if self.process.poll() is not None:
                raise RuntimeError(f"Chromium ended with code {self.process.returncode}.")
            time.sleep(0.1)
        raise TimeoutError("Chromium did not open its DevTools port.")

    def call(self, method: str, **parameters) -> dict:
        """One DevTools command, and its answer."""
        self._number += 1
        self._devtools.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._devtools.receive())
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            elif message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                parts = message["params"]["args"]
                self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in parts))
            elif message.get("method") == "Page.javascriptDialogOpening":  # "leave the page?"
                accept = {"id": -1, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                self._devtools.send(json.dumps(accept))
            elif message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait(self, condition: str, timeout: float = 120) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Not true in {timeout:.0f} s: {condition}")
            time.sleep(0.2)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._profile.cleanup()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.close()
