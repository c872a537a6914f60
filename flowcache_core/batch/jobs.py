"""Jobs: a workflow in the API's form, and for each line of a file what is filled in."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

EXTEND, RESUME = "FlowCacheAutoregressiveExtend", "FlowCacheResume"
RESUME_GB = 50.0
LONGEST = 2**20  # characters of a line


@dataclass(frozen=True)
class Job:
    """One line of the file.

    Attributes:
        number: of the line, from 1.
        graph: the workflow, filled in.
        digest: 16 hexadecimal digits that stand for the graph.
        model: stands for the files that its loaders read.
        error: why it cannot be run; the graph is then empty.
    """

    number: int
    graph: dict
    digest: str
    model: str = ""
    error: str = ""


class Workflow:
    """A workflow in the API's form, whose inputs jobs fill in by name.

    Args:
        graph: node id -> class_type and inputs.

    Raises:
        UserError: it is no such thing.
    """

    def __init__(self, graph: dict):
        nodes = graph.values() if isinstance(graph, dict) else []
        if not nodes or not all(isinstance(node, dict) and "class_type" in node and "inputs" in node for node in nodes):
            raise UserError(
                "The workflow is not in the API's form; in ComfyUI's menu take Workflow, Export (API), or a file of "
                "workflows/api/."
            )
        self.graph = graph
        self.digest = hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> "Workflow":
        """Reads it from a file."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(
                f"Cannot read the workflow {path} ({error}); give a JSON file in the API's form."
            ) from error

    def filled(self, values: dict) -> dict:
        """The graph with inputs set, each named by itself where one node has it, else "node.input", where the node is
        an id, a title or a class.

        Raises:
            UserError: no node, or several, have it.
        """
        graph = copy.deepcopy(self.graph)
        for name, value in values.items():
            node, key = self._place(name)
            graph[node]["inputs"][key] = value
        return graph

    def _place(self, name: str) -> tuple[str, str]:
        of, _, key = name.rpartition(".")
        found = [
            number
            for number, node in self.graph.items()
            if key in node["inputs"]
            and not isinstance(node["inputs"][key], list)  # a link
            and (not of or of in (number, node["class_type"], node.get("_meta", {}).get("title")))
        ]
        if len(found) == 1:
            return found[0], key
        if not found:
            raise UserError(f"no node has an input '{name}'")
        titles = ", ".join(
            f"{number}.{key} ({self.graph[number].get('_meta', {}).get('title', '')})" for number in found
        )
        raise UserError(f"several nodes have an input '{name}': write {titles}")


def read_jobs(path: Path, workflow: Workflow, done: "Done") -> Iterator[Job]:
    """Reads the jobs that are not done, one at a time; a bad line is a job with an error."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not done.has(number, line_digest(workflow, line)):
                    yield _job(number, line, workflow)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """What is said of a file of jobs that cannot be read."""
    return UserError(f"Cannot read the jobs {path} ({error.strerror}); give a file with one JSON object a line.")


def count_lines(path: Path) -> int:
    """Counts the lines that are jobs."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return sum(bool(line.strip()) for line in file)
    except OSError as error:
        raise unreadable(path, error) from error


def line_digest(workflow: Workflow, line: str) -> str:
    """Stands for a line and the workflow that it fills."""
    return hashlib.sha256((workflow.digest + line.strip()).encode()).hexdigest()[:16]


def _job(number: int, line: str, workflow: Workflow) -> Job:
    digest = line_digest(workflow, line)
    try:
        if len(line) > LONGEST:
            raise ValueError(f"{len(line):,} characters, expected at most {LONGEST:,}")
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        graph = kept(workflow.filled(values))
    except (ValueError, RecursionError, UserError) as error:
        return Job(number, {}, digest, error=f"line {number}: {error}")
    return Job(number, graph, digest, model_of(graph))


def kept(graph: dict) -> dict:
    """Has every Autoregressive Extend keep its chunks, so that another worker can go on."""
    lacking = [node for node in graph.values() if node["class_type"] == EXTEND and "resume" not in node["inputs"]]
    if lacking:
        graph["resume"] = {"class_type": RESUME, "inputs": {"limit_gb": RESUME_GB}}
        for node in lacking:
            node["inputs"]["resume"] = ["resume", 0]
    return graph


def model_of(graph: dict) -> str:
    """Stands for what the loaders of a graph read, so that a worker that has it is found."""
    read = sorted(
        json.dumps(
            [node["class_type"], {key: value for key, value in node["inputs"].items() if isinstance(value, str)}]
        )
        for node in graph.values()
        if "load" in node["class_type"].lower()
    )
    return hashlib.sha256("".join(read).encode()).hexdigest()[:8]


class Done:
    """Jobs that are done, in eight bytes each, whatever their number.

    Args:
        lines: of the file of jobs.
    """

    def __init__(self, lines: int):
        self._digests = bytearray(8 * (lines + 1))
        self.count = 0

    def add(self, number: int, digest: str) -> None:
        """Notes that a line's job is done."""
        if 8 * number + 8 > len(self._digests):
            self._digests.extend(bytes(8 * number + 8 - len(self._digests)))
        if not any(self._digests[8 * number : 8 * number + 8]):
            self.count += 1
        self._digests[8 * number : 8 * number + 8] = bytes.fromhex(digest)

    def has(self, number: int, digest: str) -> bool:
        """Whether it is, as it is now written."""
        return self._digests[8 * number : 8 * number + 8] == bytes.fromhex(digest)
