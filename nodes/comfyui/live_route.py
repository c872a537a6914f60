"""The one address of ours on the host's server: a caption for a run that goes on, or its end after this chunk."""

from typing import Any

from server import PromptServer, web  # the host's aiohttp: the pack itself opens nothing

from ...flowcache_core.errors import UserError
from ...flowcache_core.storage.files import parse_json
from ...flowcache_core.timeline import LONGEST, MOST_BLENDED
from .live import RUNS, Change, TooLate

ADDRESS = "/flowcache/live"
MOST = LONGEST + 2**10  # bytes of a request: a caption, and the names beside it
LONGEST_NAME = 200  # characters of the name of a run or node
KINDS = {"prompt_id": str, "node_id": str, "text": str, "blend": int, "stop": bool}


class Wrong(Exception):
    """A request that cannot be followed: the answer's status, and why."""


def listen() -> None:
    """From now on the host answers at the address."""
    routes = PromptServer.instance.routes
    if ADDRESS not in {getattr(route, "path", "") for route in routes}:  # it may have asked for the nodes before
        routes.post(ADDRESS)(answer)


async def answer(request: web.Request) -> web.Response:
    """200 with what will be, or another status with what was wrong."""
    try:
        if request.content_type != "application/json":
            raise Wrong(415, "The request is no JSON; send it with 'Content-Type: application/json'.")
        asked = _read(await _body(request))
        run = RUNS.find(asked["prompt_id"], asked["node_id"])
        if run is None:
            raise Wrong(404, "No such run is on: it is over, waits in the queue, or its first chunk has not begun.")
        told = run.post(Change(asked.get("text"), asked.get("blend"), asked.get("stop", False)))
    except Wrong as wrong:
        status, why = wrong.args
        return web.json_response({"error": why}, status=status)
    except TooLate:
        return web.json_response({"error": "All chunks of the run have begun; none is left to show it."}, status=409)
    except UserError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response({"said": told})


async def _body(request: web.Request) -> bytes:
    """The request's body, of which no more is taken than it may have."""
    parts, size = [], 0
    async for part in request.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MOST:
            raise Wrong(413, f"The request has more than {MOST:,} bytes; write a shorter caption.")
    return b"".join(parts)


def _read(body: bytes) -> dict[str, Any]:
    try:
        asked = parse_json(body)
    except ValueError as error:
        raise Wrong(400, f"The request is no JSON ({error}).") from error
    if not isinstance(asked, dict) or not asked.keys() <= KINDS.keys():
        raise Wrong(400, f"The request is not an object of {', '.join(KINDS)}.")
    for name, value in asked.items():
        if type(value) is not KINDS[name]:
            raise Wrong(400, f"'{name}' is no {KINDS[name].__name__}.")
    if not all(0 < len(asked.get(name, "")) <= LONGEST_NAME for name in ("prompt_id", "node_id")):
        raise Wrong(400, "'prompt_id' or 'node_id' is missing: the run's, as /prompt gave it, and Live Prompt's.")
    if "text" not in asked and not asked.get("stop"):
        raise Wrong(400, "There is nothing to do: give 'text', or 'stop': true.")
    if not 0 <= asked.get("blend", 0) <= MOST_BLENDED:
        raise Wrong(400, f"'blend' is out of range, expected 0 to {MOST_BLENDED} chunks.")
    return asked
