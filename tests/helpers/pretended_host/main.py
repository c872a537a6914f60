"""A server that answers as ComfyUI does, in a few lines: what a graph asks for is in its node "1"."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT = int(sys.argv[sys.argv.index("--port") + 1])
BASE = Path(sys.argv[sys.argv.index("--base-directory") + 1])
prompts: list[dict] = []


class Handler(BaseHTTPRequestHandler):
    def _answer(self, what, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(what).encode())

    def do_GET(self):
        number = self.path.rpartition("/")[2]
        if not self.path.startswith("/history/"):
            return self._answer({})
        asked = prompts[int(number)]
        if asked.get("endless"):
            return self._answer({})
        if asked.get("fails"):
            words = {"node_type": "Sampler", "exception_message": "too hot\n"}
            return self._answer(
                {
                    number: {
                        "status": {"completed": False, "status_str": "error", "messages": [["execution_error", words]]}
                    }
                }
            )
        (BASE / "output").mkdir(exist_ok=True)
        (BASE / "output" / "a.txt").write_text(asked.get("says", ""))
        outputs = {"2": {"images": [{"filename": "a.txt", "type": "output", "subfolder": ""}]}, "3": {"text": ["fine"]}}
        return self._answer({number: {"status": {"completed": True}, "outputs": outputs}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]["1"]["inputs"]
        if asked.get("refused"):
            problem = {"class_type": "Sampler", "errors": [{"message": "Value too small", "details": "steps"}]}
            return self._answer({"error": {"message": "no"}, "node_errors": {"1": problem}}, 400)
        prompts.append(asked)
        return self._answer({"prompt_id": str(len(prompts) - 1)})

    def log_message(self, *words):
        pass


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
