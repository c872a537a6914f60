"""A real ComfyUI, started for the tests and driven as its users drive it: HTTP and websocket."""

import base64
import json
import os
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.paths import ROOT

PACK = Path(os.environ.get("FLOWCACHE_PACK", ROOT))
HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))


def host_python(host: Path = HOST) -> Path:
    own = host / ".venv" / "bin" / "python"
    return own if own.exists() else HOST / ".venv" / "bin" / "python"


@dataclass
class Outcome:
    """How a prompt ended.

    Attributes:
        error: the websocket's execution_error, or None.
        outputs: for each node id, what it gave to the page.
        executed: node ids that were run, in order; cached ones are not among them.
        progress: (value, max) of each progress event.
        texts: lines shown on nodes, (node id, text).
        previews: number of preview images.
    """

    error: dict | None = None
    outputs: dict = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    previews: int = 0
    interrupted: bool = False


class Refused(Exception):
    """The server did not take a prompt; the message is its answer."""


class Server:
    """One server process with folders of its own under `base`."""

    def __init__(self, base: Path, host: Path = HOST, arguments: tuple[str, ...] = ()):
        self.base = base
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/vae"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "flowcache"
        if not link.exists():
            link.symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = base / f"server-{self.port}.log"
        command = [
            str(host_python(host)), "main.py", "--cpu", "--disable-api-nodes",
            "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
            "--preview-method", "latent2rgb", "--database-url", "sqlite:///:memory:", *arguments,
        ]  # fmt: skip
        if "--database-url" not in (host / "comfy" / "cli_args.py").read_text():
            at = command.index("--database-url")
            del command[at : at + 2]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        if host != HOST:
            environment["PYTHONPATH"] = str(_older_templates(base))
        self.process = subprocess.Popen(
            command, cwd=host, stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=environment
        )
        deadline = time.monotonic() + 180
        while True:
            try:
                self.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(0.3)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str):
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None

    def free(self) -> None:
        """Has ComfyUI drop its models and what nodes returned, before the next prompt is begun.

        It does so between two prompts, so a prompt of its own sees to it that there is one before the next.
        """
        self.post("/free", {"free_memory": True, "unload_models": True})
        value = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
        self.run({"value": value, "shown": {"class_type": "PreviewAny", "inputs": {"source": ["value", 0]}}})

    def run(self, prompt: dict, timeout: float = 300, on_event=lambda kind, data: None, **more) -> Outcome:
        """Posts a prompt, and `more` beside it, and follows it on the websocket to its end."""
        client = uuid.uuid4().hex
        outcome = Outcome()
        with WebSocket("127.0.0.1", self.port, f"/ws?clientId={client}", timeout) as events:
            prompt_id = self.post("/prompt", {"prompt": prompt, "client_id": client, **more})["prompt_id"]
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                message = events.receive()
                if isinstance(message, bytes):
                    kind = struct.unpack(">I", message[:4])[0]
                    if kind == 3:
                        size = struct.unpack(">I", message[4:8])[0]
                        outcome.texts.append((message[8 : 8 + size].decode(), message[8 + size :].decode()))
                    elif kind in (1, 4):
                        outcome.previews += 1
                    on_event("binary", message)
                    continue
                event = json.loads(message)
                data = event.get("data", {})
                on_event(event["type"], data)
                if data.get("prompt_id") not in (None, prompt_id):
                    continue
                if event["type"] == "executing" and data["node"] is not None:
                    outcome.executed.append(data["node"])
                elif event["type"] == "progress":
                    outcome.progress.append((data["value"], data["max"]))
                elif event["type"] == "executed":
                    outcome.outputs[data["node"]] = data["output"]
                elif event["type"] == "execution_error":
                    outcome.error = data
                    return outcome
                elif event["type"] == "execution_interrupted":
                    outcome.interrupted = True
                    return outcome
                elif event["type"] == "execution_success":
                    return outcome
        raise TimeoutError(f"The prompt did not end in {timeout} s:\n{self.log.read_text()[-3000:]}")

    def saved(self, outcome: Outcome, node: str) -> list[Path]:
        """Files that a save node wrote."""
        files = [item for items in outcome.outputs[node].values() if isinstance(items, list) for item in items]
        return [
            self.base / item["type"] / item.get("subfolder", "") / item["filename"]
            for item in files
            if isinstance(item, dict) and "filename" in item
        ]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _older_templates(base: Path) -> Path:
    """A stand-in for the page's template package, in which an older host asks for a folder that newer ones lack."""
    package = base / "packages" / "comfyui_workflow_templates"
    (package / "templates").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    return package.parent


class WebSocket:
    """The reading half of RFC 6455, as much as a test needs; pings are answered."""

    def __init__(self, host: str, port: int, path: str, timeout: float):
        self.socket = socket.create_connection((host, port), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._read(1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(f"No websocket: {head!r}")

    def __enter__(self) -> "WebSocket":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            if not part:
                raise ConnectionError("The server closed the websocket.")
            parts += part
        return bytes(parts)

    def receive(self) -> str | bytes:
        """The next whole message: text or binary."""
        message = bytearray()
        text = False
        while True:
            first, second = self._read(2)
            size = second & 0x7F
            if size >= 126:
                size = int.from_bytes(self._read(2 if size == 126 else 8), "big")
            payload = self._read(size)
            code = first & 0x0F
            if code == 9:
                mask = os.urandom(4)
                self.socket.sendall(
                    bytes([0x8A, 0x80 | size]) + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
                )
                continue
            if code == 8:
                raise ConnectionError("The server closed the websocket.")
            text = text or code == 1
            message += payload
            if first & 0x80:
                return message.decode() if text else bytes(message)
