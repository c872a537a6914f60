"""A running ComfyUI, asked over HTTP: graphs in, pictures and texts out."""

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import UserError


class Graph(dict):
    """A graph in the API's form. `add` gives a node's id; an input (id, slot) is a link."""

    def add(self, kind: str, /, **inputs) -> str:
        name = str(len(self) + 1)
        linked = {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()}
        self[name] = {"class_type": kind, "inputs": linked}
        return name


@dataclass(frozen=True)
class ComfyUI:
    """Attributes:
    address: such as http://127.0.0.1:8188.
    """

    address: str

    def run(self, graph: Graph) -> dict[str, dict]:
        """What each node of a graph gave to the page, once the graph is done.

        Raises:
            UserError: no ComfyUI there, or it refuses the graph or fails.
        """
        prompt = self._ask("/prompt", {"prompt": graph})["prompt_id"]
        while True:
            told = self._ask(f"/history/{prompt}").get(prompt)
            if told and told["status"]["completed"]:
                return told["outputs"]
            if told and told["status"]["status_str"] == "error":
                last = next(words for kind, words in reversed(told["status"]["messages"]) if kind == "execution_error")
                raise UserError(f"{last['node_type']}: {last['exception_message'].strip()}")
            time.sleep(0.5)

    def pictures(self, outputs: dict[str, dict], node: str) -> np.ndarray:
        """Those that a SaveImage or PreviewImage node made: uint8 [T, H, W, 3]."""
        frames = []
        for file in outputs[node]["images"]:
            with urllib.request.urlopen(f"{self.address}/view?{urllib.parse.urlencode(file)}") as answer:
                frames.append(np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")))
        return np.stack(frames)

    def _ask(self, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise UserError(f"ComfyUI refuses the graph: {error.read().decode()[:600]}") from error
        except OSError as error:
            raise UserError(
                f"There is no ComfyUI at {self.address} ({error}); start it, or give its address."
            ) from error
