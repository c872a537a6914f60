"""A ComfyUI without a page, kept by a worker: started, fed, watched, ended.

It is started behind a keeper, which ends it when the worker is gone, however that came; so no server is left behind.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

STARTS_WITHIN = 300.0  # seconds
ASKED_EVERY = 2.0  # seconds between two heartbeats
PACK = Path(__file__).resolve().parents[2]


class Hangs(Exception):
    """The server is gone, or gives no answer."""


class Failed(Exception):
    """The workflow failed in it, or was refused."""


@dataclass(frozen=True)
class HostSettings:
    """How a ComfyUI is started.

    Attributes:
        folder: of ComfyUI.
        runs: holds what interrupted runs leave; all workers see it.
        arguments: for its main.py, such as --cpu.
        models: a folder with its kinds of models, or None for ComfyUI's own.
        heartbeat: seconds without an answer, after which it counts as hanging.
    """

    folder: Path
    runs: Path
    arguments: tuple[str, ...] = ()
    models: Path | None = None
    heartbeat: float = 60.0

    @property
    def python(self) -> Path:
        """That it is run with: of the .venv in its folder, else this one."""
        own = self.folder / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        return own if own.exists() else Path(sys.executable)


class Host:
    """A running ComfyUI with folders of its own.

    Args:
        settings: how to start it.

    Raises:
        UserError: no ComfyUI there, or it does not start.
    """

    def __init__(self, settings: HostSettings):
        if not (settings.folder / "main.py").exists():
            raise UserError(f"There is no ComfyUI at {settings.folder}; give its folder with --comfyui.")
        self.settings = settings
        self.base = Path(tempfile.mkdtemp(prefix="flowcache-worker-"))
        for name in ("custom_nodes", "output", "temp", "user", "models"):
            (self.base / name).mkdir()
        given = settings.folder / "input"  # what its LoadImage nodes read
        if given.is_dir():
            (self.base / "input").symlink_to(given.resolve(), target_is_directory=True)
        else:
            (self.base / "input").mkdir()
        self._link_nodes()
        settings.runs.mkdir(parents=True, exist_ok=True)
        (self.base / "user" / "flowcache").mkdir()
        (self.base / "user" / "flowcache" / "runs").symlink_to(settings.runs.resolve(), target_is_directory=True)
        self._hanging = threading.Event()
        self._closed = threading.Event()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._beat, name="flowcache-heartbeat", daemon=True).start()

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = self.base / "server.log"
        known = (self.settings.folder / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        memory = ["--database-url", "sqlite:///:memory:"] if "--database-url" in known else []
        command = [
            str(self.settings.python), "main.py", "--disable-api-nodes", "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(self.base),
            *memory, *self._models(), *self.settings.arguments,
        ]  # fmt: skip
        keeper = [sys.executable, str(Path(__file__).with_name("keeper.py")), str(self.log), *command]
        self.keeper = subprocess.Popen(keeper, stdin=subprocess.PIPE, cwd=self.settings.folder, start_new_session=True)
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                self._ask("/system_stats")
                break
            except Hangs:
                if self.keeper.poll() is not None or time.monotonic() > deadline:
                    words = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
                    raise UserError(f"ComfyUI at {self.settings.folder} does not start: {words}") from None
                time.sleep(0.3)

    def _link_nodes(self) -> None:
        """Takes over ComfyUI's node packs; of FlowCache, the one that this code is of, where it is one."""
        ours = (PACK / "nodes" / "__init__.py").exists()
        there = self.settings.folder / "custom_nodes"
        packs = [one for one in there.iterdir() if not one.name.startswith((".", "_"))] if there.is_dir() else []
        if not ours and not any((pack / "flowcache_core").is_dir() for pack in packs):
            raise UserError(
                f"FlowCache's nodes are not in {there}, and pip installs the engine alone: put the pack there, or run "
                "the command in the pack's folder."
            )
        for pack in packs:
            if not (ours and (pack / "flowcache_core").is_dir()):
                (self.base / "custom_nodes" / pack.name).symlink_to(pack.resolve(), target_is_directory=pack.is_dir())
        if ours:
            (self.base / "custom_nodes" / "flowcache").symlink_to(PACK, target_is_directory=True)

    def _models(self) -> list[str]:
        folder = (self.settings.models or self.settings.folder / "models").resolve()
        if not folder.is_dir():
            return []
        kinds = "".join(f"  {kind.name}: {kind.name}\n" for kind in sorted(folder.iterdir()) if kind.is_dir())
        if not kinds:
            return []
        paths = self.base / "models.yaml"
        paths.write_text(f"flowcache:\n  base_path: {json.dumps(str(folder))}\n{kinds}", encoding="utf-8")
        return ["--extra-model-paths-config", str(paths)]

    def run(self, graph: dict) -> dict[str, Any]:
        """Runs a workflow; gives what each node gave to the page.

        Raises:
            Failed: the workflow did not fit, or failed.
            Hangs: the server is gone or hangs; end it and take another one.
        """
        prompt = self._ask("/prompt", {"prompt": graph}, self.settings.heartbeat)["prompt_id"]
        while True:
            if self._hanging.is_set() or self.keeper.poll() is not None:
                raise Hangs(f"ComfyUI gave no answer for {self.settings.heartbeat:.0f} s, or has ended")
            try:
                told = self._ask(f"/history/{prompt}", seconds=self.settings.heartbeat).get(prompt)
            except Hangs:
                continue  # busy; the heartbeat says when it is more than that
            if told and told["status"]["completed"]:
                return told["outputs"]
            if told and told["status"]["status_str"] == "error":
                words = [words for kind, words in told["status"]["messages"] if kind == "execution_error"]
                raise Failed(
                    f"{words[-1]['node_type']}: {words[-1]['exception_message'].strip()}" if words else "interrupted"
                )
            time.sleep(0.2)

    def files(self, outputs: dict[str, Any]) -> list[tuple[str, bytes]]:
        """What its save nodes wrote: names and contents."""
        found = []
        for node in outputs.values():
            for items in node.values():
                for item in items if isinstance(items, list) else []:
                    if isinstance(item, dict) and item.get("type") == "output" and "filename" in item:
                        path = self.base / "output" / item.get("subfolder", "") / item["filename"]
                        found.append((item["filename"], path.read_bytes()))
                        path.unlink()
        return found

    def close(self) -> None:
        """Ends it, and removes its folders."""
        self._closed.set()
        if hasattr(self, "keeper"):
            with suppress(OSError):
                assert self.keeper.stdin is not None
                self.keeper.stdin.close()  # the keeper ends the server
            try:
                self.keeper.wait(20)
            except subprocess.TimeoutExpired:
                self.keeper.kill()
                self.keeper.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(ASKED_EVERY):
            try:
                self._ask("/prompt", seconds=self.settings.heartbeat)
                last = time.monotonic()
            except Hangs:
                if time.monotonic() - last > self.settings.heartbeat:
                    self._hanging.set()
                    return

    def _ask(self, path: str, body: dict | None = None, seconds: float = 30.0) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Failed(refusal(error.read())) from None
        except (OSError, ValueError) as error:
            raise Hangs(str(error)) from error


def refusal(answer: bytes) -> str:
    """What a server says that does not take a workflow, in one line."""
    try:
        told = json.loads(answer)
        nodes = [
            f"{node['class_type']}: {error['message']} ({error['details']})"
            for node in (told.get("node_errors") or {}).values()
            for error in node["errors"]
        ]
        return "; ".join(nodes) or str(told["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer[:200].decode(errors="replace")
